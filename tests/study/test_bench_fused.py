"""The machinery of the fused head's benchmarks: what it measures, compares and writes."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import bench_fused, compare_versions, fused_ways, fused_worker
from benchmarks.apart import Apart
from benchmarks.csv_file import read, update
from benchmarks.fused_problem import Problem
from benchmarks.fused_table import Found, Turn, make_rows
from benchmarks.fused_ways import FLOOR, FULL, WAYS, Way
from benchmarks.fused_worker import Cell
from benchmarks.gauges import HostGauge, Timed
from benchmarks.real_head import IGNORED, RealHead
from helpers.pages import ROOT

TINY = Cell("spoloss", 3, 8, 16, 50, "float32", "cpu", frozen=False)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The threads of this process, and what `fused_worker` holds, are put back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    fused_worker._benches.clear()


@pytest.fixture
def real_head(tmp_path: Path) -> Path:
    """A file as `benchmarks.real_head` writes it, of a model with a tied head."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "model"
    folder.mkdir()
    weight = torch.randn(30, 8, generator=generator)
    save_file({"model.embed_tokens.weight": weight}, folder / "model.safetensors")
    hidden = np.random.default_rng(0).normal(size=(4, 5, 8)).astype(np.float16)
    labels = np.random.default_rng(1).integers(30, size=(4, 5))
    labels[:, :2] = IGNORED
    RealHead("model", folder, hidden, labels).save(tmp_path / "states.npz")
    return tmp_path / "states.npz"


# -------------------------------------------------------------------------- ways and their errors


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("way", [FULL, "spoloss", "spoloss_spo", "torch_linear_ce"])
@pytest.mark.parametrize("ignored", [0.0, 0.6])
def test_the_ways_solve_the_problem(way: str, frozen: bool, ignored: float) -> None:
    if way == "torch_linear_ce" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    fused_worker.set_up(replace(TINY, way=way, frozen=frozen, ignored=ignored), 1)
    assert fused_worker.error() < 1e-5
    assert fused_worker.timed().seconds > 0.0
    assert fused_worker.growth_mib() >= 0.0


def flipped(problem: Problem) -> torch.Tensor:
    loss = WAYS[FULL].load()(problem)
    problem.hidden.grad.neg_()
    return loss


def lost_weight_gradient(problem: Problem) -> torch.Tensor:
    loss = WAYS[FULL].load()(problem)
    problem.weight.grad = None
    return loss


def wrong_loss(problem: Problem) -> torch.Tensor:
    return 1.01 * WAYS[FULL].load()(problem)


@pytest.mark.parametrize("wrong", [flipped, lost_weight_gradient, wrong_loss])
def test_a_wrong_way_is_found(monkeypatch, wrong) -> None:
    monkeypatch.setitem(WAYS, "wrong", Way(lambda: wrong, "black"))
    fused_worker.set_up(replace(TINY, way="wrong"), 1)
    assert fused_worker.error() > 5e-3


class CountProducts(TorchDispatchMode):
    """Counts the multiplications in matrix products; PyTorch's own counter leaves addmm_ out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.count += len(a) * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_the_floor_is_the_products_alone(rows, frozen) -> None:
    fused_worker.set_up(replace(TINY, way=FLOOR, frozen=frozen), 1)
    (bench,) = fused_worker._benches
    with CountProducts() as products:
        fused_ways.floor(rows)(bench.problem)
    assert products.count == (2 if frozen else 3) * (2 * 3 * 8) * 16 * 50


def test_a_real_head_is_the_problem(real_head: Path) -> None:
    head = RealHead.load(real_head)
    assert head.ignored == 0.4
    cell = replace(TINY, pairs=2, tokens=5, width=8, vocab=30, real_head=str(real_head))
    fused_worker.set_up(cell, 1)
    (bench,) = fused_worker._benches
    torch.testing.assert_close(bench.problem.weight.detach(), head.weight())
    assert (bench.problem.labels == IGNORED).float().mean() == pytest.approx(0.4)
    assert fused_worker.error() < 1e-5


def test_growth_is_that_of_the_peak() -> None:
    gauge = HostGauge()
    gauge.reset()
    for _ in range(3):
        torch.ones(8 * 2**20)  # 32 MiB, freed at once
    growth = gauge.growth_mib()
    assert growth is None or 31.0 < growth < 60.0


# ---------------------------------------------------------------------- from turns to the table


def found(*ratios: float, memory: float) -> Found:
    """Turns on a machine that becomes slower from turn to turn."""
    turns = [Turn(Timed(ratio * 2.0**i, 0.0), Timed(2.0**i, 0.0)) for i, ratio in enumerate(ratios)]
    return Found(turns, [memory, memory + 1.0, memory + 100.0])


def test_rows_are_medians_of_ratios_to_the_floor_beside() -> None:
    ours, floor, full = (replace(TINY, way=way) for way in ("spoloss", FLOOR, FULL))
    masked = [replace(cell, ignored=0.6) for cell in (ours, floor)]
    rows = make_rows(
        {
            floor: found(1.0, 1.1, 0.9, memory=9.0),
            full: found(2.0, 3.0, 2.4, memory=39.0),
            ours: found(1.2, 1.3, 9.0, memory=3.0),
            masked[0]: found(0.65, 0.65, 0.65, memory=1.0),
            masked[1]: found(0.5, 0.5, 0.5, memory=1.0),
        },
        floor,
    )
    by_cell = {row.cell: row for row in rows}
    row = by_cell[ours]
    assert (row.of_floor, row.seconds, row.rounds) == (1.3, 2.6, 3)
    assert row.of_floor_low == pytest.approx(1.25)
    assert row.of_floor_high == pytest.approx(5.15)
    assert row.of_full_logits == pytest.approx(1.3 / 2.4)
    assert (row.memory_mib, row.memory_of_full_logits) == (4.0, 0.1)
    assert row.of_nothing_ignored is None
    assert by_cell[masked[0]].of_floor == pytest.approx(1.3)
    assert by_cell[masked[0]].of_nothing_ignored == pytest.approx(0.5)
    assert by_cell[masked[0]].of_full_logits is None


def test_a_file_grows_and_starts_anew_on_another_machine(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.csv"
    update(path, "A", [{"way": "a", "x": 0.123456}, {"way": "b", "x": None}], ["way"])
    update(path, "A", [{"way": "c", "x": 2.0}, {"way": "a", "x": 1.0}], ["way"])
    assert [tuple(row.values()) for row in read(path, "A")] == [("b", ""), ("c", "2"), ("a", "1")]
    update(path, "B", [{"way": "d", "x": 4.0}], ["way"])
    assert path.read_text() == "# B\nway,x\nd,4\n"


# ------------------------------------------------------------------------- in processes of its own


def test_a_run_writes_what_it_measured(tmp_path: Path, capsys) -> None:
    ways = ["matmul_floor", "spoloss", "cut_cross_entropy"]
    size = ["--quick", "--shapes", "2x8", "--heads", "trained"]
    bench_fused.main([*size, "--ways", *ways, "--output", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    with path.open() as file:
        assert file.readline().strip("#\n ") in capsys.readouterr().out
        rows = {row["way"]: row for row in csv.DictReader(file)}
    assert list(rows) == ways
    ours = rows["spoloss"]
    assert 0.0 < float(ours["of_floor_low"]) <= float(ours["of_floor"])
    assert float(ours["max_error"]) < 1e-4
    assert 0.0 <= float(ours["memory_mib"]) < 200.0
    if not torch.cuda.is_available():
        assert "cannot run here" in rows["cut_cross_entropy"]["note"]


def test_two_versions_are_told_apart(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(compare_versions, "MEMORY_PROCESSES", 1)
    other = tmp_path / "other"
    (other / "spoloss").mkdir(parents=True)
    for name in ("__init__", "torch"):
        text = "linear_spo_loss = None\n" if name == "torch" else ""
        (other / "spoloss" / f"{name}.py").write_text(text)
    with Apart() as process:
        process.call(fused_worker.use_checkout, other)
        with pytest.raises(TypeError, match="NoneType"):
            process.call(fused_worker.set_up, replace(TINY, way="spoloss_spo"), 1)
    row = compare_versions.measure(replace(TINY, way="spoloss_spo"), [ROOT, ROOT], 2, 1)
    assert all(math.isfinite(value) for value in (row.time_ratio, row.memory_mib))
    assert row.time_ratio_low <= row.time_ratio <= row.time_ratio_high


def test_masked_cells_stand_beside_their_floor_and_the_full_problem() -> None:
    options = bench_fused.parse_options(["--quick", "--ways", FLOOR, "spoloss", "trl"])
    groups = bench_fused.make_groups(options)
    assert [cells[0].frozen for cells in groups] == [False, True]
    found = [(cell.way, cell.ignored) for cell in groups[0]]
    assert found == [(FLOOR, 0.0), ("spoloss", 0.0), ("trl", 0.0), (FLOOR, 0.6), ("spoloss", 0.6)]


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(SystemExit, match="expected pairs x tokens such as 4x256, got 4by2"):
        bench_fused.main(["--shapes", "4by2"])
