"""The study of real pairs: a tiny random Llama on a few pairs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.studies import real_pairs
from benchmarks.studies.judged_pairs import FOLDS, Material
from benchmarks.studies.pretrained import IGNORED
from benchmarks.studies.real_pairs import PairMean
from benchmarks.studies.store import Store
from benchmarks.studies.training import Stage
from helpers.studies import rows_of
from helpers.tiny_llama import write_tiny_llama
from spoloss.torch import sequence_logps

pytestmark = [pytest.mark.extended, pytest.mark.usefixtures("one_thread")]

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
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A folder for runs of two steps."""
    monkeypatch.setattr(real_pairs, "STAGE", Stage(pairs=100, steps=2, batch=4, lr=1e-2))
    real_pairs.load_pairs.cache_clear()
    return Store(tmp_path)


def run(jobs: list[real_pairs.Job], store: Store) -> None:
    for job in jobs:
        assert all(map(store.has, job.needs))
        job.function(store)


def test_the_reference_is_the_whole_model(material: Material, store: Store) -> None:
    run(real_pairs.jobs_of(material, 0), store)
    answers = real_pairs.load_pairs(store).answers
    tokenizer = AutoTokenizer.from_pretrained(material.model)
    model = LlamaForCausalLM.from_pretrained(material.model).eval()
    sides = [(line["prompt"], line[side]) for line in lines() for side in ("chosen", "rejected")]
    for row, (prompt, answer) in enumerate(sides):
        start = tokenizer.encode(f"{prompt}\n")
        ids = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        labels = torch.tensor([[IGNORED] * len(start) + ids])
        with torch.no_grad():
            logits = model(torch.tensor([start + ids])).logits
        assert answers.reference[row].item() == pytest.approx(
            sequence_logps(logits, labels).item(), abs=1e-3
        )
    assert real_pairs.load_pairs(store).gap.tolist() == [line["reward_gap"] for line in lines()]


def test_a_prompt_is_in_one_fold(material: Material) -> None:
    folds = material.fold_of_each
    assert sorted(set(folds.tolist())) == list(range(FOLDS))
    for pair, fold in zip(material.pairs, folds, strict=True):
        same = [other.prompt == pair.prompt for other in material.pairs]
        assert set(folds[same].tolist()) == {fold.item()}


def test_what_a_run_reports(material: Material, store: Store, capsys) -> None:
    real_pairs.report(material, store)
    assert capsys.readouterr().out == "no fold is finished\n"
    run(real_pairs.jobs_of(material, 2), store)
    real_pairs.report(material, store)
    rows = {row["arm"]: row for row in rows_of(store.folder / "arms.csv")}
    assert list(rows) == [str(arm) for arm in real_pairs.ARMS]
    for arm in real_pairs.ARMS:
        margins = np.concatenate(
            [store.read(real_pairs.result_name(arm, fold))["margins"] for fold in (0, 1)]
        )
        assert float(rows[str(arm)]["accuracy"]) == pytest.approx((margins > 0).mean(), abs=1e-5)
    assert float(rows["dpo:0.4"]["lead"]) == 0.0
    (pairs,) = rows_of(store.folder / "pairs.csv")
    assert (pairs["folds"], pairs["pairs"], pairs["prompts"], pairs["cut"]) == ("2", "8", "4", "0")


def test_an_arm_never_sees_its_own_fold(material: Material, store: Store, monkeypatch) -> None:
    seen: list[torch.Tensor] = []
    fixed_batches = real_pairs.fixed_batches

    def noting(pairs, *rest):
        seen.append(pairs.chosen // 2)
        return fixed_batches(pairs, *rest)

    monkeypatch.setattr(real_pairs, "fixed_batches", noting)
    run(real_pairs.jobs_of(material, 1)[: real_pairs.SLICES + 1], store)
    assert seen[0].tolist() == (material.fold_of_each != 0).nonzero()[:, 0].tolist()


def test_the_error_counts_prompts() -> None:
    values = np.array([1.0, 1.0, 0.0, 0.0])
    apart = PairMean.of(values, ["a", "b", "c", "d"])
    together = PairMean.of(values, ["a", "a", "b", "b"])
    assert apart.mean == together.mean == 0.5
    assert apart.standard_error == pytest.approx(0.25)  # sqrt(p (1 - p) / 4)
    assert together.standard_error == pytest.approx(math.sqrt(0.25 / 2))  # two draws, not four


def test_a_lead_is_counted_pair_by_pair() -> None:
    left = {"grad_norm_max": 1.0, "stopped_at": None, "train": {}, "held_out": {}}
    fold = {arm: left | {"margins": [1.0, 1.0, -1.0, -1.0]} for arm in real_pairs.ARMS}
    fold[real_pairs.BASELINE] = left | {"margins": [1.0, -1.0, 1.0, -1.0]}
    ours, theirs, *_ = real_pairs.arm_rows([fold], ["a", "b", "c", "d"])
    assert (ours["accuracy"], ours["lead"], theirs["lead_error"]) == (0.5, 0.0, 0.0)
    assert ours["lead_error"] == pytest.approx(math.sqrt(2) / 4)
