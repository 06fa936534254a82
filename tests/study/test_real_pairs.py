"""The study of real pairs: a tiny random Llama on a few pairs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.alignment.pretrained import IGNORED
from benchmarks.real_pairs import __main__ as command
from benchmarks.real_pairs import task
from benchmarks.real_pairs.material import FOLDS, Material
from benchmarks.real_pairs.report import Finished, PairMean
from helpers.alignment import rows_of
from helpers.tiny_llama import write_tiny_llama
from spoloss.torch import sequence_logps

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = 10
WORDS = ("the sea is calm", "the hill is steep and high", "a road", "many small stones")


def lines() -> list[dict[str, object]]:
    """Two pairs to each prompt, of unequal gaps."""
    return [
        {
            "prompt": f"{WORDS[prompt % 4]} {WORDS[prompt // 4]} ?",
            "chosen": f"{WORDS[each]} .",
            "rejected": f"{WORDS[each + 2]} {WORDS[prompt % 4]} .",
            "reward_gap": 0.5 + prompt + each,
        }
        for prompt in range(PROMPTS)
        for each in (0, 1)
    ]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("real")
    write_tiny_llama(folder / "model", list(WORDS))
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines()))
    return Material(file, str(folder / "model"))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of training, in this process."""
    stage = task.Stage(pairs=100, steps=2, batch=4, lr=1e-2)
    monkeypatch.setattr(task, "STAGE", stage)

    def run_jobs(jobs: list[task.Job], store: task.Store, _: int) -> float:
        task.load_pairs.cache_clear()
        for job in jobs:
            if not store.has(job.name):
                assert all(map(store.has, job.needs))
                job.function(store, lambda: None)
        return 0.0

    monkeypatch.setattr("benchmarks.alignment.command.run_jobs", run_jobs)


def test_the_reference_is_the_whole_model(material: Material) -> None:
    answers = material.encode(range(3, 5), lambda: None)
    tokenizer = AutoTokenizer.from_pretrained(material.model)
    model = LlamaForCausalLM.from_pretrained(material.model).eval()
    sides = [
        (line["prompt"], line[side]) for line in lines()[3:5] for side in ("chosen", "rejected")
    ]
    for row, (prompt, answer) in enumerate(sides):
        start = tokenizer.encode(f"{prompt}\n")
        ids = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        labels = torch.tensor([[IGNORED] * len(start) + ids])
        with torch.no_grad():
            logits = model(torch.tensor([start + ids])).logits
        assert answers.reference[row].item() == pytest.approx(
            sequence_logps(logits, labels).item(), abs=1e-3
        )
    gaps = [line["reward_gap"] for line in lines()[3:5]]
    assert answers.rewards.tolist() == [gaps[0], 0.0, gaps[1], 0.0]


def test_a_prompt_is_in_one_fold(material: Material) -> None:
    folds = material.fold_of_each
    assert sorted(set(folds.tolist())) == list(range(FOLDS))
    for pair, fold in zip(material.pairs, folds, strict=True):
        same = [other.prompt == pair.prompt for other in material.pairs]
        assert set(folds[same].tolist()) == {fold.item()}


@pytest.mark.usefixtures("short")
def test_a_run_goes_on_and_is_reported(
    material: Material, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    given = ["--pairs", str(material.file), "--model", material.model, "--output", str(output)]
    assert command.main([*given, "--report"]) == 0
    assert capsys.readouterr().out == "No fold is finished.\n"
    assert command.main([*given, "--folds", "1"]) == 0
    (kept,) = output.glob("work/fold-0/dpo_0.1.json")
    written = kept.stat().st_mtime_ns
    assert command.main(given) == 0
    assert kept.stat().st_mtime_ns == written

    text = capsys.readouterr().out
    assert "2 of 5 folds: 8 held-out pairs of 4 prompts" in text
    assert (output / "tables.md").read_text() in text
    rows = {row["arm"]: row for row in rows_of(output / "arms.csv")}
    assert list(rows) == [str(arm) for arm in task.ARMS]
    store = task.Store(output)
    for arm in task.ARMS:
        margins = np.concatenate(
            [store.read(task.result_name(arm, fold))["margins"] for fold in (0, 1)]
        )
        assert np.abs(margins).min() > 0.0
        assert float(rows[str(arm)]["accuracy"]) == pytest.approx((margins > 0).mean(), abs=1e-5)
    assert float(rows["dpo:0.4"]["lead"]) == 0.0


@pytest.mark.usefixtures("short")
def test_an_arm_never_sees_its_own_fold(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    train_on_pairs = task.train_on_pairs

    def noting(reference, pairs, *rest, **named):
        seen.append(pairs.chosen // 2)
        return train_on_pairs(reference, pairs, *rest, **named)

    monkeypatch.setattr(task, "train_on_pairs", noting)
    store = task.Store(tmp_path)
    task.load_pairs.cache_clear()
    for job in task.jobs_of(material, 1)[: task.SLICES + 1]:
        job.function(store, lambda: None)
    assert seen[0].tolist() == (material.fold_of_each != 0).nonzero()[:, 0].tolist()
    assert task.load_pairs(store).gap.tolist() == [line["reward_gap"] for line in lines()]


def test_the_error_counts_prompts() -> None:
    values = np.array([1.0, 1.0, 0.0, 0.0])
    apart = PairMean.of(values, ["a", "b", "c", "d"])
    together = PairMean.of(values, ["a", "a", "b", "b"])
    assert apart.mean == together.mean == 0.5
    assert apart.standard_error == pytest.approx(0.25)  # sqrt(p (1 - p) / 4)
    assert together.standard_error == pytest.approx(math.sqrt(0.25 / 2))  # two draws, not four
    assert together.percent("+") == "+50.0 ± 35.4"


def test_a_lead_is_counted_pair_by_pair(material: Material) -> None:
    ours, theirs = task.ARMS[:2]
    margins = {arm: {"margins": [1.0, 1.0, -1.0, -1.0]} for arm in task.ARMS}
    margins[theirs] = {"margins": [1.0, -1.0, 1.0, -1.0]}
    finished = Finished(material, [margins])
    lead = finished.lead(ours, theirs)
    assert lead.mean == 0.0
    assert lead.standard_error > 0.0
    assert finished.lead(ours, task.ARMS[2]) == PairMean(0.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--pairs": "missing.jsonl"}, "missing.jsonl: expected a readable file of pairs"),
        ({"--model": "no such model!"}, "expected a folder or a name on the Hugging Face Hub"),
        ({"--folds": "6"}, "--folds: expected 1 to 5, got 6"),
        ({"--workers": "0"}, "--workers: expected at least 1, got 0"),
    ],
)
def test_bad_input_is_one_sentence(
    material: Material,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    words: str,
) -> None:
    output = tmp_path / "out"
    given = {"--pairs": str(material.file), "--model": material.model, "--output": str(output)}
    assert command.main([part for option in (given | changes).items() for part in option]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m benchmarks.real_pairs: error: ")
    assert words in error
    assert error.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"reward_gap": -1.0}, "expected a finite reward gap above 0"),
        ({"reward_gap": None}, "and reward_gap or p_chosen, got"),
        (
            {"prompt": "the sea is calm?"},
            "expected at least 10 pairs of at least 5 prompts, got 1 of 1",
        ),
    ],
)
def test_pairs_without_gaps_or_prompts_are_refused(
    material: Material,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    line: dict[str, object],
    words: str,
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(lines()[0] | line) + "\n")
    assert command.main(["--pairs", str(file), "--model", material.model]) == 2
    assert words in capsys.readouterr().err
