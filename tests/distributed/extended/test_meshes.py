"""Two engines at once, on a mesh of 2 x 2 processes: the gradient is that of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import mesh_worker, processes

PAGE = (Path(__file__).parents[3] / "docs" / "distributed.md").read_text()

RIGHT = (
    "hybrid sharding: sum * ranks / pairs",
    "sequence x data parallel: sum * groups / pairs",
    "vocabulary parallel x FSDP2: sum * groups / pairs",
)
# |g - g of one process| / |g of one process|, as docs/distributed.md states it.
WRONG = {
    "hybrid sharding: sum * shards / pairs": 0.50,
    "sequence x data parallel: sum * ranks / pairs": 1.00,
    "vocabulary parallel x FSDP2: sum * ranks / pairs": 1.00,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return processes.run(mesh_worker.run_all, mesh_worker.WORLD, tmp_path_factory.mktemp("mesh"))


@pytest.mark.parametrize("name", RIGHT)
def test_the_gradient_is_that_of_one_process(ranks: list[dict[str, float]], name: str) -> None:
    for rank in ranks:
        assert rank[name] < 1e-9


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_gradient_is_as_wrong_as_the_page_says(
    ranks: list[dict[str, float]], name: str
) -> None:
    for rank in ranks:
        assert rank[name] == pytest.approx(WRONG[name], rel=0.1)
    assert f"| {name} | {WRONG[name]:.2g} |" in PAGE
