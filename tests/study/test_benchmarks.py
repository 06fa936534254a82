"""The benchmarks measure what they say: the ways solve the problem, the floor is its products."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mpmath
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import (
    accuracy,
    fused,
    fused_problem,
    fused_ways,
    fused_worker,
    record,
    turns,
    versions,
)
from benchmarks.fused_problem import IGNORED
from benchmarks.fused_worker import Cell, HostGauge
from benchmarks.turns import FLOOR, Timed
from helpers.pages import ROOT

pytestmark = pytest.mark.extended

TINY = Cell("spoloss", 3, 8, 16, 50, "float32", "cpu", frozen=False)
FROZEN = pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The threads of this process, and what `fused_worker` holds, are put back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    fused_worker._benches.clear()


# -------------------------------------------------------------------------- ways and their errors


@FROZEN
@pytest.mark.parametrize(
    "way",
    [
        "full_logits",
        "torch_linear_ce",
        "trl",
        *("spoloss", "spoloss_spo", "spoloss_apo_down", "spoloss_kto"),
    ],
)
def test_the_ways_solve_the_problem(way: str, frozen: bool) -> None:
    if way == "torch_linear_ce" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    fused_worker.set_up(replace(TINY, way=way, frozen=frozen), 1)
    assert fused_worker.error() < 1e-5
    assert fused_worker.timed().seconds > 0.0


def test_losses_as_published() -> None:
    chosen, rejected = torch.tensor([3.0, -2.0]), torch.tensor([1.0, 5.0])
    s = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    down = [s(0.3) + 1 - s(0.2), s(-0.2) + 1 - s(-0.7)]
    torch.testing.assert_close(fused_problem.apo_down(chosen, rejected), torch.tensor(down))
    # 1.75 is the mean of the four log-ratios, KTO's reference point here.
    point = [1 - s(0.125), 1 - s(-0.375), 1 - s(0.075), 1 - s(-0.325)]
    torch.testing.assert_close(fused_problem.kto(chosen, rejected), torch.tensor(point))


class CountProducts(TorchDispatchMode):
    """Counts the multiplications in matrix products; PyTorch's own counter leaves addmm_ out."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.count += len(a) * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [None, 7])
@FROZEN
def test_the_floor_is_the_products_alone(rows, frozen) -> None:
    fused_worker.set_up(replace(TINY, way=FLOOR, frozen=frozen), 1)
    (bench,) = fused_worker._benches
    with CountProducts() as products:
        fused_ways.floor(rows)(bench.problem)
    assert products.count == (2 if frozen else 3) * (2 * 3 * 8) * 16 * 50


def test_growth_is_that_of_the_peak() -> None:
    gauge = HostGauge()
    gauge.reset()
    for _ in range(3):
        torch.ones(8 * 2**20)  # 32 MiB, freed at once
    growth = gauge.growth_mib()
    assert growth is None or 31.0 < growth < 60.0


def test_a_real_head_is_the_models_own(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    from helpers.tiny_llama import write_tiny_llama

    write_tiny_llama(tmp_path / "model", ["the sea is calm"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "model")
    pairs, states = tmp_path / "pairs.jsonl", tmp_path / "states.safetensors"
    pairs.write_text('{"prompt": "the sea", "chosen": "is calm .", "rejected": "is"}\n')
    shape = fused_problem.write_states(str(tmp_path / "model"), pairs, 1, states)
    problem = fused_problem.real_problem(states, dtype=torch.float32, device="cpu")
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[*tokenizer("the sea is calm .").input_ids, tokenizer.eos_token_id]])
    want = whole(ids).logits[0, :-1].log_softmax(1).gather(1, ids[0, 1:, None])[1:].sum()
    got = fused_problem.logps_in_tiles(problem.hidden, problem.weight, problem.labels)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert shape.ignored == (problem.labels == IGNORED).float().mean()
    assert shape.size[:2] == (1, problem.labels.shape[1])


# ----------------------------------------------------------------------------- from turns to a file


def test_a_row_has_medians_of_the_ratios_to_the_floor_on_both_sides() -> None:
    # The machine becomes slower by a tenth with every repetition.
    drift = (1.1**i for i in itertools.count())
    repeat = lambda seconds, others: lambda: Timed(seconds * next(drift), others)  # noqa: E731
    ways = {"a": repeat(3.0, 0.1), "b": repeat(5.0, 0.1)}
    turned = turns.take_turns(repeat(2.0, 0.0), ways, 2)
    rows = turns.summaries(turned)
    assert {name: row["ratios"] for name, row in rows.items()} == {FLOOR: 4, "a": 4, "b": 4}
    assert rows["a"]["of_floor"] == pytest.approx(1.5 * (1.1 + 1 / 1.1) / 2)
    assert rows["b"]["of_floor_low"] == pytest.approx(2.5 / 1.1)
    assert rows["b"]["of_floor_high"] == pytest.approx(2.5 * 1.1)
    assert rows["a"]["seconds"] == pytest.approx(
        3.0 * (1.1 + 1.1**7) / 2
    )  # second, and last but one
    assert rows[FLOOR]["of_floor"] == pytest.approx(1 / 1.1**2)
    assert rows["a"]["others"] == rows[FLOOR]["others"] == pytest.approx(0.8 / 24)


@dataclass(frozen=True)
class Row:
    way: str
    tokens: int


def test_a_file_grows_and_refuses_a_busy_machine(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.csv"
    cells = [Row("a", 1), Row("a", 2), Row("b", 1)]
    table = record.Table(path, "A", Row)
    for cell in list(table.todo(cells))[:2]:
        table.add(cell, x=0.1234567, others=0.09)
    again = record.Table(path, "A", Row)
    assert list(again.todo(cells)) == cells[2:]
    with pytest.raises(SystemExit, match="others: expected at most 10%"):
        again.add(cells[2], x=1.0, others=0.11)
    again.add(cells[2], note="cannot run here")
    assert path.read_text() == "# A\nway,tokens,x,others,note\na,1,0.123457,0.09,\n" + (
        "a,2,0.123457,0.09,\nb,1,,,cannot run here\n"
    )
    assert list(record.Table(path, "B", Row).todo(cells)) == cells


def test_a_run_writes_what_it_measured(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(record, "MOST_OTHERS", 1.0)
    monkeypatch.setitem(fused.SETTINGS, "cpu", fused.QUICK)
    ways = ["matmul_floor", "spoloss", "cut_cross_entropy"]
    options = ["--shapes", "2x8", "--heads", "trained", "--rounds", "2", "--output", str(tmp_path)]
    fused.main([*options, "--ways", *ways])
    with (tmp_path / "fused_cpu.csv").open() as file:
        assert file.readline().startswith("# ")
        rows = {row["way"]: row for row in csv.DictReader(file)}
    assert list(rows) == ways
    assert 0.0 < float(rows["spoloss"]["of_floor_low"]) <= float(rows["spoloss"]["of_floor"])
    assert float(rows["spoloss"]["max_error"]) < 1e-4
    if not torch.cuda.is_available():
        assert "cannot run here" in rows["cut_cross_entropy"]["note"]


def test_two_versions_are_told_apart(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(versions, "MEMORY_PROCESSES", 1)
    other = tmp_path / "other"
    (other / "spoloss").mkdir(parents=True)
    (other / "spoloss" / "__init__.py").write_text("")
    cell = versions.VersionCell("spoloss_spo", *(2, 8, 16, 50, "float32", "cpu", False), threads=1)
    with fused_worker.Apart() as process:
        process.call(fused_worker.use_checkout, other)
        with pytest.raises(ModuleNotFoundError, match=r"spoloss\.torch"):
            process.call(fused_worker.set_up, cell, 1)
    row = versions.measure(cell, [ROOT, ROOT], 2)
    assert row["time_ratio_low"] <= row["time_ratio"] <= row["time_ratio_high"]
    assert all(math.isfinite(value) for value in row.values())


# ------------------------------------------------------------------------------------- the oracles


@pytest.mark.parametrize("name", accuracy.LOSSES)
def test_the_oracles_slope_is_the_derivative_of_its_value(name: str) -> None:
    exact = accuracy.LOSSES[name][1]
    with mpmath.workdps(60):
        for h in (-40.0, -3.0, 0.3, 25.0):
            for beta in accuracy.BETAS:
                slope = mpmath.diff(lambda m, beta=beta: exact(m, beta).value, h)
                assert mpmath.almosteq(exact(h, beta).slope, slope, rel_eps=1e-15)
