"""The example: a whole run leaves what it promises, bad input is refused, the pairs reproduce."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import math
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import spoloss
from benchmarks import real_pairs

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SFT_STEPS, STEPS = 12, 4
SIDES = ("chosen", "rejected")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


train = load("train")
make_pairs = load("make_pairs")


def pair(**changes) -> dict:
    return {"prompt": "How long?", "chosen": "An hour.", "rejected": "Ages.", **changes}


def json_lines(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def run_script(*argv: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "train.py"), *map(str, argv)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Calls the script in an empty folder; it must refuse in one line and write nothing."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)

    def call(*argv: str | Path) -> str:
        assert train.main([str(argument) for argument in argv]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("train.py: error: ")
        assert captured.err.endswith("\n")
        assert captured.err.count("\n") == 1
        assert list(cwd.iterdir()) == []
        return captured.err

    return call


# ------------------------------------------------------------------------------------ a whole run


@dataclass(frozen=True)
class Finished:
    cwd: Path
    output: Path
    stdout: str
    steps: list[dict[str, str]]
    held_out: list[dict[str, str]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    cwd = tmp_path_factory.mktemp("run")
    flags = ["--sft-steps", SFT_STEPS, "--sft-lr", 3e-3, "--steps", STEPS, "--batch-size", 8]
    done = run_script(*map(str, flags), "--max-length", "40", cwd=cwd)
    assert done.returncode == 0, done.stderr
    output = cwd / "runs" / "spo-1"
    steps, held_out = rows_of(output / "steps.csv"), rows_of(output / "held_out.csv")
    return Finished(cwd, output, done.stdout, steps, held_out)


def test_run_leaves_what_it_promises(finished) -> None:
    assert [path.name for path in finished.cwd.iterdir()] == ["runs"]
    names = {path.name for path in finished.output.iterdir()}
    assert names == {"steps.csv", "held_out.csv", "curves.png", "model"}
    picture = (finished.output / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_steps_hold_every_step_and_metric(finished) -> None:
    metrics = set(spoloss.preference_metrics(*np.zeros((4, 2)), beta=0.1))
    assert set(finished.steps[0]) == {"stage", "step", "loss", "lr", "grad_norm"} | metrics
    counted = [(row["stage"], int(row["step"])) for row in finished.steps]
    sft = [("sft", step) for step in range(SFT_STEPS)]
    assert counted == sft + [("preference", step) for step in range(STEPS)]
    for row in finished.steps:
        filled = set(row) - {"stage"} - (metrics if row["stage"] == "sft" else set())
        assert all(math.isfinite(float(row[name])) for name in filled)
    for stage, lr in (("sft", 3e-3), ("preference", 3e-4)):
        assert max(float(row["lr"]) for row in finished.steps if row["stage"] == stage) == lr


def test_losses_move_as_they_should(finished) -> None:
    sft = [float(row["loss"]) for row in finished.steps if row["stage"] == "sft"]
    assert sft[-1] < 0.9 * sft[0]
    # A batch is padded otherwise than in the reference's own pass, so 0 holds to rounding only.
    spo = [float(row["loss"]) for row in finished.steps if row["stage"] == "preference"]
    assert abs(spo[0]) < 1e-4
    assert all(abs(loss) > 1e-3 for loss in spo[1:])


def test_held_out_metrics_start_at_the_reference(finished) -> None:
    assert [int(row["step"]) for row in finished.held_out] == list(range(STEPS + 1))
    first, last = finished.held_out[0], finished.held_out[-1]
    rewards = [name for name in first if name.startswith("rewards/")]
    assert all(float(first[name]) == 0.0 for name in [*rewards, "loss"])
    assert float(last["rewards/accuracies"]) > 0.0
    for side in SIDES:
        moved = float(last[f"logps/{side}"]) - float(first[f"logps/{side}"])
        assert float(last[f"rewards/{side}"]) == pytest.approx(0.1 * moved, abs=1e-4)
    table = [line for line in finished.stdout.splitlines() if line.startswith("reward margin x")]
    margin = float(last["rewards/margins"])
    assert table == [f"{'reward margin x (nats)':<36}{0:>10.3f}{margin:>10.3f}{margin:>+10.3f}"]


def test_run_says_what_it_does(finished) -> None:
    assert "360 pairs to train on, 40 held out; " in finished.stdout
    truncated = int(finished.stdout.partition("held out; ")[2].partition(" ")[0])
    assert 0 < truncated < 400
    assert "The spo loss starts at 0.000" in finished.stdout
    assert "good values are negative" in finished.stdout


def test_saved_model_is_the_trained_policy(finished) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished.output / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished.output / "model")
    options = train.parse_options([])
    held_out = train.split_pairs(train.read_pairs(options.pairs), options)[1]
    encoded = [train.encode_pair(each, tokenizer, 40) for each in held_out]
    chosen, rejected = train.score_pairs(model, encoded, batch_size=8)
    last = finished.held_out[-1]
    assert chosen.mean().item() == pytest.approx(float(last["logps/chosen"]), rel=1e-4)
    assert rejected.mean().item() == pytest.approx(float(last["logps/rejected"]), rel=1e-4)
    # One pair by hand: no padding, no second text in the batch.
    for text, logp in ((encoded[0].chosen, chosen[0]), (encoded[0].rejected, rejected[0])):
        table = model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
        answer = [position for position, label in enumerate(text.labels) if label != -100]
        by_hand = sum(table[position - 1, text.ids[position]] for position in answer)
        assert by_hand.item() == pytest.approx(logp.item(), rel=1e-4)


def test_diverged_run_stops_and_keeps_its_rows(finished, tmp_path) -> None:
    # 1 / beta squared overflows float32, so the first preference loss is infinite.
    flags = "--sft-steps 1 --steps 2 --batch-size 2 --max-length 40 --loss squared --beta 1e-30"
    model = ["--model", finished.output / "model", "--output", "out"]
    done = run_script(*model, *flags.split(), cwd=tmp_path)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("train.py: error: preference step 0: expected a finite loss")
    assert message.endswith("try a lower --lr")
    assert [row["stage"] for row in rows_of(tmp_path / "out" / "steps.csv")] == ["sft"]
    assert not (tmp_path / "out" / "model").exists()


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> Path:
    """The shipped pairs, whose reward gap every other line gives as a probability."""
    records = [json.loads(line) for line in (EXAMPLES / "pairs.jsonl").read_text().splitlines()]
    for each in records[1::2]:
        each["p_chosen"] = 1 / (1 + math.exp(-each.pop("reward_gap")))
    path = tmp_path_factory.mktemp("judged") / "pairs.jsonl"
    path.write_bytes(json_lines(*records))
    return path


@pytest.mark.parametrize(
    ("loss", "known_gap"),
    [("spo", False), ("spo", True), ("dpo", False), ("squared", False), ("squared", True)],
)
def test_fused_is_the_same_run(
    finished, judged, tmp_path, monkeypatch, capsys, loss, known_gap
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(finished.output / "model"), "--loss", loss]
    gap = ["--pairs", str(judged), "--reward-gap"] if known_gap else []
    flags = ["--sft-steps", "2", "--steps", "3", "--lr", "1e-4", "--max-length", "40", *gap]
    for extra in ([], ["--fused"]):
        assert train.main([*model, *flags, "--batch-size", "8", *extra]) == 0
    by_logits, by_tiles = (rows_of(tmp_path / "runs" / f"{loss}-{n}" / "steps.csv") for n in (1, 2))
    for plain, fused in zip(by_logits, by_tiles, strict=True):
        assert float(fused["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-4, abs=1e-4)
        assert float(fused["grad_norm"]) == pytest.approx(float(plain["grad_norm"]), rel=1e-3)
    printed = capsys.readouterr().out
    assert "Peak memory by logits: " in printed
    assert "Peak memory with the fused head: " in printed


@pytest.mark.parametrize("flags", ["--loss spo", "--linear-below 0", "--loss squared"])
def test_known_gap_is_the_target_of_its_pair(finished, judged, flags) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished.output / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished.output / "model")
    options = train.parse_options([*flags.split(), "--reward-gap", "--beta", "0.3"])
    pairs = [train.encode_pair(p, tokenizer, 40) for p in train.read_pairs(judged, with_gap=True)]
    pairs = train.add_reference(pairs[:8], model, options)
    pushed = np.linspace(-9.0, 30.0, len(pairs))
    pairs = [
        replace(each, reference_chosen=each.reference_chosen - h)
        for each, h in zip(pairs, pushed, strict=True)
    ]
    gaps = np.array([each.reward_gap for each in pairs])
    assert gaps.std() > 0.5
    if options.loss == "squared":
        by_hand = ((pushed - gaps / 0.3) ** 2).mean()
    else:
        x = 0.3 * pushed / gaps
        curve = -x * np.exp(-x)
        curve = curve if options.linear_below is None else np.where(x < 0.0, -x, curve)
        by_hand = (gaps**2 * curve).mean()
    for loss, _ in (f(model, pairs, options) for f in (train.loss_by_logits, train.loss_by_tiles)):
        assert loss.item() == pytest.approx(by_hand, rel=1e-4)
    assert train.evaluate(model, pairs, options)["loss"] == pytest.approx(by_hand, rel=1e-4)


def test_fused_refuses_a_head_with_more_to_it(finished) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished.output / "model")
    text = train.Text(ids=[5, 6, 7], labels=[-100, 6, 7])
    pairs = [train.TokenPair(text, text, truncated=False)]
    train.check_head(model, pairs)
    model.lm_head.bias = torch.nn.Parameter(torch.arange(model.config.vocab_size) / 100.0)
    with pytest.raises(train.InputError, match="expected a head that is hidden @ weight"):
        train.check_head(model, pairs)


def test_spo_is_advised_to_take_the_tangent(finished) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished.output / "model")
    advice = {}
    for flags in ("", "--linear-below 0", "--loss dpo"):
        updater = train.Updater(model, "preference", train.parse_options(flags.split()))
        loss = sum(weight.sum() for weight in model.parameters()) * math.inf
        loss.backward()
        with pytest.raises(train.DivergedError, match=r"^preference step 0: ") as error:
            updater.step(loss)
        advice[flags] = str(error.value).partition("; try ")[2]
    lower = "a lower --lr"
    assert advice == {
        "": f"{lower} or --linear-below 0",
        "--linear-below 0": lower,
        "--loss dpo": lower,
    }


# ---------------------------------------------------------------------- the benchmark built on it


@pytest.mark.parametrize("arm", real_pairs.ARMS, ids=lambda arm: arm.name)
def test_arms_are_command_lines_of_the_example(arm, tmp_path) -> None:
    options = train.parse_options(arm.command(3, Path("pairs.jsonl"), tmp_path)[2:])
    assert (options.loss, options.beta, options.seed) == (arm.loss, arm.beta, 3)
    assert (options.max_length, options.sft_steps, options.steps) == (384, 150, 80)
    assert f"{options.loss.upper()}({options.beta})" in arm.name
    assert options.reward_gap == ("known gap" in arm.name)
    assert (options.linear_below == 0.0) == ("linear below 0" in arm.name)


def test_row_is_the_end_of_the_run(finished) -> None:
    arm = real_pairs.ARMS[2]
    row = real_pairs.summarise(arm, 7, finished.output, 40, 1.0, diverged=False)
    last = {name: float(value) for name, value in finished.held_out[-1].items()}
    accuracy = last["rewards/accuracies"]
    assert (row.arm, row.seed, row.steps) == ("SPO(0.1)", 7, STEPS)
    assert row.accuracy == pytest.approx(accuracy, abs=1e-4)
    assert row.accuracy_error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 40), abs=1e-4)
    assert row.h == pytest.approx(10.0 * last["rewards/margins"], abs=1e-3)
    assert row.chosen_change == pytest.approx(10.0 * last["rewards/chosen"], abs=2e-3)
    assert row.rejected_change == pytest.approx(10.0 * last["rewards/rejected"], abs=2e-3)
    broken = real_pairs.summarise(arm, 7, finished.output, 40, 1.0, diverged=True)
    assert broken.steps == STEPS
    assert math.isnan(broken.accuracy)


def test_finished_arms_are_not_run_again(tmp_path, monkeypatch, finished, capsys) -> None:
    results = tmp_path / "results" / "real.csv"
    names = [arm.name for arm in real_pairs.ARMS]

    def ran_until(stop: int) -> tuple[int, list[tuple[str, int]]]:
        ran = []

        def run_arm(arm, seed, _pairs):
            if len(ran) == stop:
                raise real_pairs.ArmError("no more")
            ran.append((arm.name, seed))
            return real_pairs.summarise(arm, seed, finished.output, 40, 1.0, diverged=False)

        monkeypatch.setattr(real_pairs, "run_arm", run_arm)
        command = ["--pairs", "pairs.jsonl", "--seeds", "2", "--output", str(results)]
        return real_pairs.main(command), ran

    wanted = [(name, seed) for seed in (0, 1) for name in names]
    assert ran_until(4) == (2, wanted[:4])
    assert capsys.readouterr().err == "real_pairs: no more\n"
    assert ran_until(99) == (0, wanted[4:])
    assert ran_until(99) == (0, [])
    kept = [(row.arm, row.seed) for row in real_pairs.finished(results)]
    assert kept == [(name, seed) for name in names for seed in (0, 1)]


def test_refusal_of_the_example_is_passed_on(tmp_path, capsys) -> None:
    missing = tmp_path / "missing.jsonl"
    command = ["--pairs", str(missing), "--output", str(tmp_path / "real.csv")]
    assert real_pairs.main(command) == 2
    assert f"{missing}: expected a readable file of pairs" in capsys.readouterr().err
    assert not (tmp_path / "real.csv").exists()


# --------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("flags", ["", "--linear-below -1", "--loss dpo", "--loss squared"])
def test_loss_of_the_command_line(flags) -> None:
    options = train.parse_options([*flags.split(), "--beta", "0.3"])
    logps = np.random.default_rng(0).normal(-20.0, 5.0, (4, 6))
    loss = {"spo": spoloss.spo_loss, "dpo": spoloss.dpo_loss, "squared": spoloss.squared_loss}
    extra = {"linear_below": -1.0} if "linear" in flags else {}
    want = loss[options.loss](*logps, beta=0.3, **extra)
    assert train.choose_loss(options)(*logps) == want


def test_outputs_are_never_overwritten(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    spo, dpo = train.parse_options([]), train.parse_options(["--loss", "dpo"])
    made = [train.create_output(options).as_posix() for options in (spo, spo, dpo, spo)]
    assert made == ["runs/spo-1", "runs/spo-2", "runs/dpo-1", "runs/spo-3"]


def test_seed_and_sizes_choose_the_batches() -> None:
    def drawn(flags: str) -> list[list[int]]:
        return train.draw_batches(list(range(10)), 5, train.parse_options(flags.split()))

    batches = drawn("--batch-size 4")
    assert [len(batch) for batch in batches] == [4] * 5
    assert sorted(number for batch in batches for number in batch) == sorted([*range(10)] * 2)
    assert batches == drawn("--batch-size 4")
    assert batches != drawn("--batch-size 4 --seed 1")
    assert [len(batch) for batch in drawn("--batch-size 30")] == [30] * 5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--beta 0", "--beta: expected a finite number above 0 and below inf, got '0'"),
        ("--beta nan", "--beta: expected a finite number above 0"),
        ("--beta much", "--beta: expected a finite number above 0"),
        ("--lr -1", "--lr: expected a finite number above 0"),
        ("--sft-lr 0", "--sft-lr: expected a finite number above 0"),
        ("--steps 0", "--steps: expected a whole number from 1"),
        ("--steps 1.5", "--steps: expected a whole number from 1"),
        ("--sft-steps -1", "--sft-steps: expected a whole number from 0"),
        ("--batch-size 0", "--batch-size: expected a whole number from 1"),
        ("--max-length 7", "--max-length: expected a whole number from 8"),
        ("--seed 2147483648", "--seed: expected a whole number from 0 to 2147483647"),
        ("--loss ipo", "--loss: invalid choice: 'ipo'"),
        ("--linear-below 1", "--linear-below: expected a finite number above -inf and below 1"),
        ("--linear-below 0 --loss dpo", "--linear-below: expected --loss spo, got --loss dpo"),
        ("--reward-gap --loss dpo", "--reward-gap: expected --loss spo or squared, got --loss dpo"),
        ("--model ./nowhere", "--model ./nowhere: expected a folder or a Hub name, got neither"),
        ("--bogus", "unrecognized arguments: --bogus"),
    ],
)
def test_options_are_refused(refused, flags, words) -> None:
    assert words in refused(*flags.split())


def test_output_with_files_is_refused(refused, tmp_path) -> None:
    output = tmp_path / "kept"
    output.mkdir()
    (output / "note.txt").write_text("mine")
    assert f"--output {output}: expected an empty folder" in refused("--output", output)
    note = output / "note.txt"
    assert f"--output {note}: expected a folder, got a file" in refused("--output", note)
    assert [path.read_text() for path in output.iterdir()] == ["mine"]


def test_folder_without_a_model_is_refused(refused, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    message = refused("--model", tmp_path / "empty")
    assert f"--model {tmp_path / 'empty'}: expected a folder with config.json" in message
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "qwen2"}')
    assert "expected a causal language model, got: " in refused("--model", tmp_path / "empty")


def test_model_that_does_not_fit_is_refused(finished, tmp_path) -> None:
    model = finished.output / "model"
    with pytest.raises(train.InputError, match="expected --max-length of at most 40, got 41"):
        train.load_model(str(model), train.parse_options(["--max-length", "41"]))
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, tmp_path)
    with pytest.raises(train.InputError, match="expected a tokenizer with words"):
        train.load_model(str(tmp_path), train.parse_options(["--max-length", "40"]))


# ----------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b"{oops\n", "expected a JSON object, got malformed JSON"),
        (b"\xff\n", "expected UTF-8 text"),
        (b"[1, 2]\n", "expected a JSON object, got [1, 2]"),
        (b'{"prompt": "p", "chosen": "c"}\n', "expected the key 'rejected'"),
        (json_lines(pair(prompt=None)), "expected a string as 'prompt', got None"),
        (json_lines(pair(chosen=["c"])), "expected a string as 'chosen', got ['c']"),
        (json_lines(pair(chosen="")), "expected text as 'chosen', got ''"),
        (json_lines(pair(rejected=" \n")), "expected text as 'rejected'"),
        (json_lines(pair(rejected="\ud800")), "expected text as 'rejected', got half a character"),
        (json_lines(pair(rejected="An hour.")), "expected a rejected completion that differs"),
        (json_lines(pair(split="dev")), "expected 'train' or 'test' as 'split', got 'dev'"),
        (json_lines(pair(split="test")), ""),
    ],
)
def test_bad_lines_are_refused_by_number(refused, tmp_path, bad, words) -> None:
    path = tmp_path / "pairs.jsonl"
    # The blank line counts: an editor must find the number.
    path.write_bytes(json_lines(pair()) + b"\n" + bad)
    line = 3 if words else 1
    words = words or "expected 'split' on every line or on none"
    assert f"{path}:{line}: {words}" in refused("--pairs", path)


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        ({}, "expected one of the keys 'reward_gap' and 'p_chosen', got neither"),
        ({"reward_gap": 1.0, "p_chosen": 0.7}, "got reward_gap and p_chosen"),
        ({"reward_gap": 0}, "expected a number above 0 and below 1e+09 as 'reward_gap', got 0"),
        ({"reward_gap": -0.5}, "as 'reward_gap', got -0.5"),
        ({"reward_gap": math.nan}, "as 'reward_gap', got nan"),
        ({"reward_gap": 1e9}, "as 'reward_gap', got 1000000000.0"),
        ({"reward_gap": True}, "as 'reward_gap', got True"),
        ({"reward_gap": "2"}, "as 'reward_gap', got '2'"),
        ({"p_chosen": 0.5}, "expected a number above 0.5 and below 1 as 'p_chosen', got 0.5"),
        ({"p_chosen": 1.0}, "as 'p_chosen', got 1.0"),
        ({"p_chosen": None}, "as 'p_chosen', got None"),
    ],
)
def test_gaps_that_are_not_above_0_are_refused_where_they_count(
    refused, tmp_path, gap, words
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json_lines(pair(reward_gap=2), pair(**gap)))
    message = refused("--pairs", path, "--reward-gap")
    assert f"{path}:2: " in message
    assert words in message
    assert len(train.read_pairs(path)) == 2


def test_gap_of_a_probability_is_its_log_odds(tmp_path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json_lines(pair(reward_gap=3), pair(p_chosen=0.9), pair(p_chosen=0.999999)))
    gaps = [each.reward_gap for each in train.read_pairs(path, with_gap=True)]
    assert gaps == pytest.approx([3.0, math.log(9.0), math.log(999999.0)], rel=1e-9)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected pairs to train on and pairs to hold out, got 0 and 0"),
        (json_lines(pair(split="train")), "got 1 and 0"),
        (json_lines(pair(split="test")), "got 0 and 1"),
        (json_lines(pair(), pair(chosen="Two hours.")), "got 0 and 2"),
    ],
)
def test_files_without_enough_pairs_are_refused(refused, tmp_path, content, words) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    message = refused("--pairs", path)
    assert f"{path}: expected pairs to train on" in message
    assert words in message


@pytest.mark.parametrize("content", [b"not gzip", gzip.compress(json_lines(pair()))[:-9], None])
def test_unreadable_files_are_refused(refused, tmp_path, content) -> None:
    path = tmp_path / "pairs.jsonl.gz"
    if content is not None:
        path.write_bytes(content)
    assert f"{path}: expected a readable file of pairs, got: " in refused("--pairs", path)


def test_bad_file_is_refused_before_the_heavy_imports(tmp_path) -> None:
    code = (
        "import runpy, sys\n"
        f"train = runpy.run_path({str(EXAMPLES / 'train.py')!r})\n"
        "code = train['main'](['--pairs', 'missing.jsonl'])\n"
        "print(code, [name for name in ('torch', 'transformers') if name in sys.modules])\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "2 []\n"


def test_pairs_are_read_as_they_stand(tmp_path) -> None:
    records = [pair(prompt="a", id=7), pair(prompt="b", chosen=" Ünïcode\n")]
    content = b"\xef\xbb\xbf" + json_lines(records[0]) + b"\n" + json_lines(records[1])
    plain, packed = tmp_path / "pairs.jsonl", tmp_path / "pairs.jsonl.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    read = train.read_pairs(plain)
    assert read == train.read_pairs(packed)
    assert [(each.prompt, each.chosen, each.rejected, each.split, each.line) for each in read] == [
        ("a", "An hour.", "Ages.", None, 1),
        ("b", " Ünïcode\n", "Ages.", None, 3),
    ]


def test_split_is_honoured_or_drawn_by_prompt() -> None:
    options = train.parse_options([])
    pairs = [train.Pair(f"prompt {i // 3}", "c", "r", None, i) for i in range(90)]
    fit, held_out = train.split_pairs(pairs, options)
    assert sorted(fit + held_out, key=lambda each: each.line) == pairs
    assert len({each.prompt for each in held_out}) == 3
    assert not {each.prompt for each in fit} & {each.prompt for each in held_out}
    assert train.split_pairs(pairs, options) == (fit, held_out)
    assert train.split_pairs(pairs, train.parse_options(["--seed", "1"])) != (fit, held_out)
    marked = [train.Pair("p", "c", "r", "test" if i == 5 else "train", i) for i in range(9)]
    assert train.split_pairs(marked, options) == (marked[:5] + marked[6:], [marked[5]])


def byte_tokenizer(chat_template: str | None = None) -> SimpleNamespace:
    def encode(text: str, add_special_tokens: bool = True) -> list[int]:
        return ([1] if add_special_tokens else []) + list(text.encode())

    def apply_chat_template(chat, tokenize, add_generation_prompt) -> str:
        assert (tokenize, add_generation_prompt) == (False, True)
        return f"<{chat[0]['role']}>{chat[0]['content']}<assistant>"

    return SimpleNamespace(
        encode=encode,
        eos_token_id=0,
        chat_template=chat_template,
        apply_chat_template=apply_chat_template,
    )


def test_pairs_that_fit_are_encoded_whole() -> None:
    each = train.Pair("ask", "yes", "n", None, 1)
    encoded = train.encode_pair(each, byte_tokenizer(), 9)
    assert encoded.chosen.ids == [1, *b"ask\nyes", 0]
    assert encoded.chosen.labels == [-100] * 5 + [*b"yes", 0]
    assert encoded.rejected.ids == [1, *b"ask\nn", 0]
    assert not encoded.truncated
    chat = train.encode_pair(each, byte_tokenizer("some"), 99)
    assert chat.chosen.ids == [*b"<user>ask<assistant>yes", 0]


@pytest.mark.parametrize(("prompt", "chosen"), [(40, 3), (3, 40), (40, 40), (10, 7)])
def test_truncation_cuts_the_prompt_first_and_leaves_a_completion(prompt, chosen) -> None:
    each = train.Pair("p" * prompt + "?", "c" * chosen, "r", None, 1)
    encoded = train.encode_pair(each, byte_tokenizer(), 16)
    assert encoded.truncated
    asked = [1, *each.prompt.encode(), *b"\n"]
    for text, completion in ((encoded.chosen, each.chosen), (encoded.rejected, "r")):
        answer = [token for token in text.labels if token != -100]
        kept = text.ids[: len(text.ids) - len(answer)]
        assert text.ids == kept + answer
        assert len(text.ids) <= 16
        assert kept == asked[len(asked) - len(kept) :]
        assert answer == [*completion.encode(), 0][: len(answer)]
        assert len(answer) >= min(8, len(completion) + 1)
        assert len(kept) >= min(8, len(asked))
    assert len(encoded.chosen.ids) == 16


# ---------------------------------------------------------------------------- the shipped pairs


def test_shipped_pairs_are_what_make_pairs_writes(tmp_path, monkeypatch) -> None:
    path = tmp_path / "pairs.jsonl"
    monkeypatch.setattr(sys, "argv", ["make_pairs.py", str(path)])
    runpy.run_path(str(EXAMPLES / "make_pairs.py"), run_name="__main__")
    assert path.read_bytes() == (EXAMPLES / "pairs.jsonl").read_bytes()


def test_shipped_pairs_follow_the_preference() -> None:
    pairs = make_pairs.make_pairs()
    assert len({each["prompt"] for each in pairs}) == len(pairs) == 400
    assert sum(each["split"] == "test" for each in pairs) == 40
    for each in pairs:
        better = make_pairs.reward(each["prompt"], each["chosen"])
        assert better - make_pairs.reward(each["prompt"], each["rejected"]) >= 2.0


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("Cook rice for eighteen minutes.", 4.0),
        ("Gladly. Cook rice for eighteen minutes. Enjoy your meal!", 5.0),
        ("Not that again. Cook rice for eighteen minutes.", 3.0),
        ("Gladly. Keep rice in a dry jar.", 1.0),
        ("Tastes differ, as they always have. Cook eggs for eight minutes.", -1.0),
    ],
)
def test_reward_of_an_answer(completion, reward) -> None:
    for situation in make_pairs.SITUATIONS:
        prompt = f"{situation}How long do I cook rice?"
        assert make_pairs.reward(prompt, completion) == reward
