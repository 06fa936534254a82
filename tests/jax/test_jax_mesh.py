"""The JAX wing on meshes of four virtual devices: equal to one device, and nothing is gathered."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.interpreter import run_python
from helpers.jax_mesh_worker import COLLECTIVE, D, V


@pytest.fixture(scope="module")
def cases() -> dict[str, dict[str, Any]]:
    """What the worker found; a process of its own, because devices are counted at the start."""
    done = run_python("-m", "helpers.jax_mesh_worker")
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.extended
def test_on_a_mesh(cases: dict[str, dict[str, Any]]) -> None:
    assert len(cases) == 6
    for name, case in cases.items():
        kinds = {kind for kind, _ in case["collectives"]}
        assert case["error"] < 1e-10, name
        assert case["same layout"], name
        assert kinds == {"all-reduce"}, name
        parts = {"pairs": 1, "words": 4, "both": 2}[name.split(", ")[1]]
        of_head = [s for _, s in case["collectives"] if f"[{V // parts},{D}]" in s]
        trained, split_pairs = "frozen" not in name, "words" not in name
        assert len(of_head) == (trained and split_pairs), name


def test_the_count_sees_a_gather() -> None:
    program = "%all-gather.1 = f64[8,6,4]{2,1,0} all-gather(%p), channel_id=1"
    assert COLLECTIVE.findall(program) == [("f64[8,6,4]{2,1,0}", "all-gather")]
