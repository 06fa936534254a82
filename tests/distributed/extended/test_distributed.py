"""DDP, FSDP2 and sequence parallelism on two processes: the gradient is that of one process.

Both processes are started once and run all cases; tests read what they left.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from helpers import distributed_worker, processes

PAGE = (Path(__file__).parents[3] / "docs" / "distributed.md").read_text()

# |g - g of one process| / |g of one process|, as docs/distributed.md states it.
WRONG = {
    "DDP: mean of the ranks' means": 0.26,
    "DDP: mean of the micro-batches' means": 0.28,
    "DDP: sum / pairs of all ranks": 0.50,
    "DDP: bypassing the wrapper": 0.99,
    "FSDP2: mean of the ranks' means": 0.26,
    "FSDP2: sum / pairs of all ranks": 0.50,
    "FSDP2: full_tensor of the head": 0.62,
    "FSDP2: bfloat16, inputs cast as well": 0.016,
    "sequence parallel: labels shifted after the split": 0.64,
    "sequence parallel: one margin per slice": 1.02,
    "sequence parallel: backward returns the gradient unchanged": 0.50,
    "sequence parallel: dist.all_reduce": 0.50,
    "sequence parallel: an engine that sums": 1.00,
}
REFUSED = {
    "DDP: weight outside, find_unused_parameters": "RuntimeError: Expected to mark a variable",
    "FSDP2: shard of the head": "TypeError: weight is a sharded DTensor",
    "FSDP2: the model is the root, its owner not": "RuntimeError: aten.embedding.default got",
    "FSDP2: tied head in a group of its own": "ValueError: Parameter 'model.lm_head.weight' is",
}
HALF = {"FSDP2: bfloat16": 0.01}
EXACT = distributed_worker.CASES.keys() - WRONG.keys() - REFUSED.keys() - HALF.keys()
SCRIPTS = ("ddp", "fsdp2", "sequence_parallel")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("distributed")
    return processes.run(distributed_worker.run_all, distributed_worker.WORLD, folder, SCRIPTS)


@pytest.mark.parametrize("name", sorted(EXACT))
def test_the_gradient_is_that_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert max(rank[name]) < 1e-9


@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_near(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert max(rank[name]) < HALF[name]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_gradient_is_as_wrong_as_the_page_says(
    ranks: list[dict[str, Any]], name: str
) -> None:
    assert max(rank[name][0] for rank in ranks) == pytest.approx(WRONG[name], rel=0.1)
    assert f"| {name} | {WRONG[name]:.2g} |" in PAGE


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert rank[name].startswith(REFUSED[name])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_recipe_runs_as_a_script(ranks: list[dict[str, Any]], name: str) -> None:
    norms = {re.search(r"\|gradient\| ([\d.]+)$", rank[name])[1] for rank in ranks}
    assert len(norms) == 1
    assert float(norms.pop()) > 0.1
