"""Megatron-core's GPTModel in two halves: loss and gradient are those of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers import processes

PAGE = (Path(__file__).parents[3] / "docs" / "distributed.md").read_text()

RIGHT = ("untied", "tied", "sequence parallel", "sequence parallel, tied")
# |g - g of the whole model| / |g of the whole model|, as docs/distributed.md states it.
WRONG = {
    "loss * ranks": 1.00,
    "gathered with the default gradient": 0.89,
}


def work(rank: int) -> dict[str, Any]:
    from helpers import megatron_worker  # not above: Megatron's import warns of what is not there

    return megatron_worker.run_all(rank)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return processes.run(work, 2, tmp_path_factory.mktemp("megatron"))


@pytest.mark.parametrize("name", RIGHT)
def test_halves_are_the_whole(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        loss, gradient = rank[name]
        assert loss < 1e-10
        assert gradient < 1e-10


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_gradient_is_as_wrong_as_the_page_says(
    ranks: list[dict[str, Any]], name: str
) -> None:
    for rank in ranks:
        _, gradient = rank[name]
        assert gradient == pytest.approx(WRONG[name], rel=0.1)
    assert f"| Megatron-core: {name} | {WRONG[name]:.2g} |" in PAGE


def test_swapped_shards_are_seen(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert min(rank["shards swapped"]) > 0.5


def test_a_shard_taken_for_the_whole_head_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["without the group"].startswith("ValueError: labels must be in [0, V = 32)")


def test_the_recipe_runs_as_a_script(ranks: list[dict[str, Any]]) -> None:
    first, second = (
        [float(line.split()[-1]) for line in rank["script"].splitlines()] for rank in ranks
    )
    assert first == second
    assert len(first) == 3
    assert first[2] < first[1] < first[0] < 0.1
