"""DeepSpeed's ZeRO stages on two processes: an optimiser step moves what that of one process moves.

Both processes are started once and run all cases; tests read what they left.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from helpers import deepspeed_worker, processes

PAGE = (Path(__file__).parents[3] / "docs" / "distributed.md").read_text()

# |moved - exact| / |exact| of the first step, as docs/distributed.md states it.
WRONG = {
    "ZeRO-2: sum * ranks / pairs": 0.50,
    "ZeRO-3: sum * ranks / pairs": 0.50,
    "ZeRO-2: sum * micro-batches / pairs": 0.50,
    "ZeRO-3: sum * micro-batches / pairs": 0.50,
    "ZeRO-2: mean of the micro-batches' means": 0.37,
    "ZeRO-3: mean of the micro-batches' means": 0.37,
    "ZeRO-2: DeepSpeed's default clipping": 0.04,
    "ZeRO-3: bypassing the engine": 0.84,
    "ZeRO-3: .data of the gathered head": 0.61,
    "ZeRO-3: .data of the gathered head, tied": 0.64,
}
PARTITIONED = "ValueError: weight has shape (0,) because DeepSpeed ZeRO-3 has partitioned it"
REFUSED = {
    "ZeRO-3: the Parameter kept elsewhere": PARTITIONED,
    "ZeRO-3: outside the forward": PARTITIONED,
    "ZeRO-3: gather closed before the backward pass": "RuntimeError: The size of",
}
RIGHT = deepspeed_worker.CASES.keys() - WRONG.keys() - REFUSED.keys()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("deepspeed")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in processes.CPUS.items():
            patch.setenv(name, value)
        return processes.run(deepspeed_worker.run_all, 2, folder)


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_a_step_is_that_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert len(rank[name]) == 2
        assert max(rank[name]) < 1e-5


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_step_is_as_wrong_as_the_page_says(ranks: list[dict[str, Any]], name: str) -> None:
    assert max(rank[name][0] for rank in ranks) == pytest.approx(WRONG[name], rel=0.1)
    assert f"| {name} | {WRONG[name]:.2g} |" in PAGE


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert rank[name].startswith(REFUSED[name])


def test_the_recipe_runs_as_a_script(ranks: list[dict[str, Any]]) -> None:
    for stage in (2, 3):
        pattern = rf"ZeRO-{stage}, rank \d: \d pairs, \|gradient\| ([\d.]+)\n"
        norms = [float(re.search(pattern, rank["script"])[1]) for rank in ranks]
        assert norms[0] == pytest.approx(1.1715, abs=0.001)
        assert norms[0] == norms[1]
