"""A slice of the campaign of generated calls, and faults of the package that it must find."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import spoloss
from benchmarks.fuzz import calls, checks, heads, libraries
from spoloss import DPO, SPO, Squared, _arrays, losses


@pytest.fixture(autouse=True)
def loaded() -> Iterator[None]:
    threads = torch.get_num_threads()
    libraries.load(libraries.LOADERS)
    yield
    torch.set_num_threads(threads)


def findings(library: str, seeds: range) -> list[str]:
    found = []
    for seed in seeds:
        rng = random.Random(seed)
        call = calls.draw(rng, library)
        try:
            checks.check_refusal(rng, call)
            checks.check_result(call)
        except checks.Finding as finding:
            found.append(f"seed {seed}: {call.function}: {finding}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "count"), [("numpy", 400), ("torch", 300), ("mlx", 150), ("jax", 40)]
)
def test_generated_calls(library: str, count: int) -> None:
    assert findings(library, range(count)) == []


def test_generated_heads() -> None:
    compared = sum(heads.check(heads.draw(random.Random(seed))) for seed in range(40))
    assert compared > 1000


def test_arrays_without_a_dimension_may_have_weights() -> None:
    """NumPy makes scalars of its own out of them."""
    logps = [np.array(value) for value in (-1.0, -2.0, -3.0, -3.5)]
    got = spoloss.spo_loss(*logps, weights=np.array(2.0))
    np.testing.assert_allclose(got, 2.0 * spoloss.spo_loss(*logps))
    nan = spoloss.spo_loss(np.array(np.nan), *logps[1:], weights=np.array(0.0))
    assert nan == 0.0


Fault = tuple[Any, str, Callable[..., Any]]
_value, _slope, _smooth = SPO.value, SPO.slope, DPO.slope
FAULTS: dict[str, Fault] = {
    "the sign of SPO": (SPO, "value", lambda self, h, b: -_value(self, h, b)),
    "1e-4 of SPO's slope": (SPO, "slope", lambda self, h, b: 1.0001 * _slope(self, h, b)),
    "beta of DPO's slope": (DPO, "slope", lambda self, h, b: _smooth(self, h, b) / b),
    "the factor 2": (Squared, "slope", lambda _self, h, b: h - 1.0 / b),
    "a lost check": (_arrays, "check_positive", lambda *_: None),
    "a name that is no argument": (_arrays, "_check_real", lambda *_: _refuse()),
    "a warning": (losses.SPO, "value", lambda _self, h, _b: np.log(np.zeros(1)) * h),
}


def _refuse() -> None:
    raise TypeError("something is wrong")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_campaign_finds_a_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    assert findings("numpy", range(300)) != []
