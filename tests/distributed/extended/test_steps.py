"""Engines on several processes: a step is that of one process, and wrong ways are known as such.

The processes of a group are started once and run all cases of a file in helpers.
"""

from __future__ import annotations

import pytest

from helpers import processes, steps

GROUPS = {
    "deepspeed_worker": 2,
    "distributed_worker": 2,
    "mesh_worker": 4,
    "megatron_worker": 2,
    "trainers_worker": 2,
}


@pytest.mark.parametrize("worker", GROUPS)
def test_steps(worker, tmp_path, monkeypatch) -> None:
    for name, value in processes.CPUS.items():
        monkeypatch.setenv(name, value)
    ranks = processes.run(steps.work, GROUPS[worker], tmp_path, f"helpers.{worker}")
    assert not steps.unmet(ranks)
