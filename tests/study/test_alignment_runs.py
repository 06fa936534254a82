"""Whole runs of the alignment experiment: what they leave, how they resume, what they refuse."""

from __future__ import annotations

import json
import statistics
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from benchmarks.alignment import __main__ as command
from benchmarks.alignment.evaluation import win_rate
from benchmarks.alignment.figures import draw_frontier, draw_margins
from benchmarks.alignment.language_protocols import QUICK
from benchmarks.alignment.results import Results
from benchmarks.alignment.store import Store, open_store
from helpers.alignment import TINY, published, rows_of
from helpers.interpreter import run_python

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick_is_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    # Should a refusal fail to come, a test must not train for minutes before it says so.
    monkeypatch.setattr(command, "QUICK", TINY)


def run_main(*argv: str | Path) -> int:
    return command.main([str(argument) for argument in argv])


# ---------------------------------------------------------------------------------- a whole run


@dataclass(frozen=True)
class Finished:
    folder: Path
    printed: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("alignment") / "run"
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(StringIO()) as printed,
        redirect_stderr(StringIO()) as progress,
    ):
        patch.setattr(command, "QUICK", TINY)
        assert run_main("--quick", "--output", folder, "--workers", "1") == 0
    assert "100%" in progress.getvalue()
    return Finished(folder, printed.getvalue())


def run_in_process(before: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own with one worker, after some code."""
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); "
        "from benchmarks.alignment import __main__ as command; "
        "from helpers.alignment import TINY, interrupted; "
        f"{before}; sys.exit(command.main(sys.argv[1:]))"
    )
    options = ["--quick", "--output", str(folder), "--workers", "1"]
    return run_python("-c", code, *options)


def test_a_run_leaves_its_tables_and_figures(finished: Finished) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    tables = {
        f"{name}.csv"
        for name in ("win_rates", "policies", "comparisons", "margins", "limits", "texts")
    }
    pictures = {f"{name}.png" for name in ("frontier", "margins", "gradients")}
    assert names >= tables | pictures | {"settings.json", "tables.md", "work"}
    assert (finished.folder / "work" / ".gitignore").read_text() == "*\n"
    assert (
        finished.printed.strip()
        == (finished.folder / "tables.md").read_text(encoding="utf-8").strip()
    )

    # The paper's own form comes first: three policies, rates that mirror each other.
    table = finished.printed.partition("### SFT, DPO(0.1) and SPO(0.1)")[2].strip().splitlines()
    assert table[0] == "| Win rate (%) of row vs. column | SFT | DPO(0.1) | SPO(0.1) |"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:5]]
    assert [row[0] for row in cells] == ["SFT", "DPO(0.1)", "SPO(0.1)"]
    for i in range(3):
        assert cells[i][i + 1] == "-"
        for j in range(i):
            ours, theirs = (float(cells[a][b + 1].split(" ± ")[0]) for a, b in ((i, j), (j, i)))
            assert ours == pytest.approx(100 - theirs, abs=0.11)
    assert "SPO(0.1) over DPO(0.4), clean labels" in finished.printed


def test_figures_show_what_was_measured(finished: Finished) -> None:
    store = Store(finished.folder)
    preference, memorised = (Results(TINY.foundation, part, store) for part in TINY.parts)
    clean, noisy = draw_frontier(preference).axes
    for axes, labels, forms in ((clean, "clean", ("dpo", "spo")), (noisy, "noisy", ("spo",))):
        drawn = {each.get_label(): each.lines[0] for each in axes.containers}
        assert set(drawn) == set(forms)
        for form, line in drawn.items():
            arms = sorted(a for a in preference.arms if (a.form, a.labels) == (form, labels))
            reward = [preference.estimate(arm, "reward").mean for arm in arms]
            assert line.get_ydata() == pytest.approx(reward)
    for axes, split in zip(draw_margins(memorised).axes, ("train", "held_out"), strict=True):
        (arm,) = memorised.arms
        (line,) = (line for line in axes.lines if line.get_label() == arm.title)
        snapshots = memorised.of(arm)[0]["snapshots"]
        medians = [each["x_q50"] for each in snapshots if each["split"] == split]
        assert line.get_ydata() == pytest.approx(medians)
        assert len(medians) == 2


def test_published_win_rates_are_those_of_the_kept_rewards(finished: Finished) -> None:
    rows = {(row["row"], row["column"]): row for row in rows_of(finished.folder / "win_rates.csv")}
    assert len(rows) == 5 * 4
    rates = []
    for seed in (0, 1):
        work = finished.folder / "work" / f"seed-{seed}"
        a, b = (
            np.array(json.loads((work / f"{name}.json").read_text())["rewards"])
            for name in ("spo_0.1@noisy", "foundation")
        )
        assert a.shape == (32, 4)
        rates.append(win_rate(a, b))
    row = rows["spo:0.1@noisy", "sft"]
    assert float(row["win_rate"]) == pytest.approx(statistics.fmean(rates), rel=1e-5)
    assert float(row["standard_error"]) == pytest.approx(
        abs(rates[0] - rates[1]) / 2, rel=1e-4, abs=1e-6
    )
    assert float(rows["sft", "spo:0.1@noisy"]["win_rate"]) == pytest.approx(
        1 - statistics.fmean(rates), rel=1e-5
    )


def test_an_interrupted_run_goes_on_and_gives_the_same(finished: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run_in_process("command.QUICK = interrupted(TINY, after=3)", folder)
    assert done.returncode == 130, done.stderr
    assert done.stderr.rstrip().endswith("stopped; the same command goes on from here")
    assert not (folder / "tables.md").exists()

    kept = {path: path.stat().st_mtime_ns for path in folder.glob("work/*/*.json")}
    assert len(kept) == 3
    assert run_main("--quick", "--output", folder, "--workers", "2") == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    complete = {path.relative_to(finished.folder) for path in finished.folder.glob("work/*/*.json")}
    assert {path.relative_to(folder) for path in folder.glob("work/*/*.json")} == complete
    assert published(folder).keys() == published(finished.folder).keys()
    # Seeds hang on names, not on processes or their order: arms train alike up to rounding.
    for path in complete:
        norms = [
            json.loads((each / path).read_text()).get("grad_norms")
            for each in (folder, finished.folder)
        ]
        if path.parent.name == "seed-0" and path.stem != "foundation":
            assert norms[0] == pytest.approx(norms[1], rel=1e-3), path


def test_a_finished_run_is_only_reported_again(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.folder.glob("work/*/*")}
    assert run_main("--quick", "--output", finished.folder) == 0
    assert capsys.readouterr().out == finished.printed
    assert {path: path.stat().st_mtime_ns for path in before} == before


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--quick --arms ppo:0.1", "ppo:0.1: expected an arm FORM:BETA with FORM one of dpo, spo"),
        ("--quick --arms dpo:0.1 spo", "spo: expected a finite beta above 0"),
        ("--quick --arms spo:0", "spo:0: expected a finite beta above 0"),
        ("--quick --arms spo:-1", "spo:-1: expected a finite beta above 0"),
        ("--quick --arms spo:nan", "spo:nan: expected a finite beta above 0"),
        (
            "--quick --arms spo:0.1@dirty",
            "spo:0.1@dirty: expected @noisy or @flip20 or @flip40 or nothing",
        ),
        ("--quick --arms spo-gap:1@noisy", "spo-gap:1@noisy: expected clean labels"),
        ("--quick --seeds 0", "--seeds: expected at least 1, got 0"),
        ("--quick --seeds many", "argument --seeds: invalid int value: 'many'"),
        ("--full --workers 0", "--workers: expected at least 1, got 0"),
        ("--quick --full", "not allowed with argument"),
        ("", "one of the arguments --quick --full is required"),
    ],
)
def test_requests_that_make_no_sense(
    arguments: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert run_main(*arguments.split(), "--output", folder) == 2
    assert_refused(capsys, words)
    assert not folder.exists()


def assert_refused(capsys: pytest.CaptureFixture[str], words: str) -> None:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("python -m benchmarks.alignment: error: ")
    assert words in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("content", [{}, {"settings.json": "{broken"}, {"mine.txt": "mine"}])
def test_folders_of_others_stay_as_they_are(
    content: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    if content:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
        words = "expected an empty folder or one with the settings.json of an earlier run"
    else:
        open_store(folder, TINY.settings())
        words = "expected results of the same settings, but these differ: preference"
    before = published(folder)
    assert run_main("--quick", "--seeds", "3", "--arms", "spo:0.1", "--output", folder) == 2
    assert_refused(capsys, words)
    assert published(folder) == before
    # The same settings are the same run.
    first, again = (open_store(tmp_path / "new", QUICK.settings()) for _ in range(2))
    assert first == again


def test_a_file_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out"
    path.write_text("mine")
    assert run_main("--quick", "--output", path) == 2
    assert_refused(capsys, "expected a folder to write to")
    assert path.read_text() == "mine"
