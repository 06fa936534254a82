"""Trainers on DDP, FSDP and ZeRO, on two processes: a step is that of one process, on that engine.

On CPUs a trainer may replace an engine by another without an error, so each test also asserts the
class that wraps the model, and the part of the parameters that a rank holds. Both processes are
started once and run all ways; tests read what they left.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import engines_worker, processes
from helpers.engines_worker import Result

PAGE = (Path(__file__).parents[3] / "docs" / "distributed.md").read_text()

DDP, FSDP1, ZERO = "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"
FSDP2 = "FSDP"  # prefixed to the class of the module that is sharded
WHOLE, HALF, NOTHING = 1.0, 0.5, 0.0

# The engine and the part of the parameters that a rank holds between two steps.
RIGHT = {
    "TRL, logits: DDP": (DDP, WHOLE),
    "TRL, fused: DDP": (DDP, WHOLE),
    "Lightning: DDP": (DDP, WHOLE),
    "FSDP1: fused": (FSDP1, HALF),
    "Lightning: FSDP2 (ModelParallelStrategy)": ("ShardedModule", HALF),
    "Accelerate, fused: FSDP2 (stand-in)": (FSDP2, HALF),
    "Accelerate, logits: FSDP2 (stand-in)": (FSDP2, HALF),
    "Trainer: FSDP2 (stand-in)": (FSDP2, HALF),
    "TRL, logits: FSDP2 (stand-in)": (FSDP2, HALF),
    "TRL, fused: FSDP2 (stand-in)": (FSDP2, HALF),
    "Accelerate, fused: ZeRO-2": (ZERO, WHOLE),
    "Accelerate, fused: ZeRO-3": (ZERO, NOTHING),
    "Accelerate, loop: ZeRO-3": (ZERO, NOTHING),
    "Trainer: ZeRO-2": (ZERO, WHOLE),
    "Trainer: ZeRO-3": (ZERO, NOTHING),
    "TRL, logits: ZeRO-2": (ZERO, WHOLE),
    "TRL, logits: ZeRO-3": (ZERO, NOTHING),
    "TRL, fused: ZeRO-2": (ZERO, WHOLE),
    "TRL, fused: ZeRO-3": (ZERO, NOTHING),
}
# Asked for FSDP, these run DDP on CPUs: right, but not what was asked for.
REPLACED = (
    "Accelerate: FSDP2 plugin on CPUs",
    "Trainer: fsdp= on CPUs",
    "TRL, fused: fsdp= on CPUs",
)
# |moved - exact| / |exact|, as docs/distributed.md states it.
WRONG = {
    "TRL, logits: DDP, uneven": 0.32,
    "TRL, fused: DDP, uneven": 0.32,
    "Lightning: DDP, pairs of a full micro-batch": 0.17,
    "Trainer: ZeRO-2, without use_configured_state": 0.98,
}
REFUSED = {
    "Accelerate, loop: ZeRO-2, accumulated": "ValueError: micro_batches must be 1 under DeepSpeed",
    "TRL, fused: ZeRO-2, without use_configured_state": "RuntimeError: ProcessGroupGloo::allgather",
    "Lightning: FSDPStrategy on CPUs": "ValueError: The strategy `fsdp` requires a GPU",
    "Lightning: DeepSpeedStrategy on CPUs": "RuntimeError: The DeepSpeed strategy is only",
}
EXACT = 1e-5  # ZeRO-3 has no float64


Ranks = list[dict[str, Result | str]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in processes.CPUS.items():
            patch.setenv(name, value)
        return processes.run(engines_worker.run_all, 2, folder, folder / "trainer")


def test_every_way_is_judged() -> None:
    judged = [*RIGHT, *REPLACED, *WRONG, *REFUSED]
    assert sorted(judged) == sorted(engines_worker.WAYS)


def named(engine: str, found: str) -> bool:
    return found.startswith(FSDP2) if engine == FSDP2 else found == engine


@pytest.mark.parametrize("name", RIGHT)
def test_a_step_is_that_of_one_process(ranks: Ranks, name: str) -> None:
    engine, share = RIGHT[name]
    for rank in ranks:
        found = rank[name]
        assert isinstance(found, Result), found
        assert named(engine, found.engine), found.engine
        assert found.share == pytest.approx(share, abs=0.02)
        assert found.ranks == 2
        assert found.error < EXACT


@pytest.mark.parametrize("name", REPLACED)
def test_fsdp_is_replaced_by_ddp_on_cpus(ranks: Ranks, name: str) -> None:
    for rank in ranks:
        found = rank[name]
        assert isinstance(found, Result), found
        assert (found.engine, found.share) == (DDP, WHOLE)
        assert found.error < EXACT


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_step_is_as_wrong_as_the_page_says(ranks: Ranks, name: str) -> None:
    for rank in ranks:
        found = rank[name]
        assert isinstance(found, Result), found
        assert found.error == pytest.approx(WRONG[name], rel=0.1)
    assert f"| {name} | {WRONG[name]:.2g} |" in PAGE


def test_without_its_state_each_rank_is_alone(ranks: Ranks) -> None:
    for rank in ranks:
        found = rank["Trainer: ZeRO-2, without use_configured_state"]
        assert isinstance(found, Result)
        assert found.ranks == 1


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(ranks: Ranks, name: str) -> None:
    for rank in ranks:
        assert str(rank[name]).startswith(REFUSED[name])
