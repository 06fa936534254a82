"""What is logged: TRL's names, 0-d values, nothing that waits for a device."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

import spoloss
from helpers.backends import Backend
from helpers.pairs import four


def test_metrics_by_hand(backend: Backend) -> None:
    pc = np.array([-10.0, -20.0, -30.0, -40.0])
    pr = np.array([-11.0, -20.0, -25.0, -90.0])
    rc, rr = np.full(4, -20.0), np.full(4, -20.0)
    metrics = spoloss.preference_metrics(*backend.arrays(pc, pr, rc, rr), beta=0.1)
    want = {  # x = 0.1, 0, -0.5, 5
        "rewards/chosen": -0.5,
        "rewards/rejected": -1.65,
        "rewards/margins": 1.15,
        "rewards/accuracies": 0.5,
        "rewards/margins_below_0": 0.25,
        "rewards/margins_above_1": 0.25,
        "logps/chosen": -25.0,
        "logps/rejected": -36.5,
    }
    assert metrics.keys() == want.keys()
    for name, value in metrics.items():
        assert value.shape == (), name
        assert float(value) == pytest.approx(want[name], rel=1e-12), name


def test_metrics_are_constants_to_autograd() -> None:
    logps = [torch.tensor(array, requires_grad=True) for array in four()]
    assert not any(v.requires_grad for v in spoloss.preference_metrics(*logps, beta=0.1).values())
    rewards = spoloss.implicit_rewards(*logps, beta=0.1)
    assert not rewards.chosen.requires_grad
    assert not rewards.rejected.requires_grad
    total = lambda pc: sum(spoloss.preference_metrics(pc, *four_jax[1:], beta=0.1).values())  # noqa: E731
    four_jax = [jax.numpy.asarray(array) for array in four()]
    np.testing.assert_array_equal(jax.grad(total)(four_jax[0]), 0.0)


def test_metrics_trace_and_never_ask_for_a_value() -> None:
    logps = [torch.tensor(array, device="meta") for array in four()]
    # Meta tensors hold no data: reading one, as .item() or an if does, raises.
    assert all(v.shape == () for v in spoloss.preference_metrics(*logps, beta=0.1).values())
    compiled = torch.compile(
        lambda *x: spoloss.preference_metrics(*x, beta=0.1), fullgraph=True, backend="aot_eager"
    )
    real = [torch.tensor(array) for array in four()]
    want = spoloss.preference_metrics(*real, beta=0.1)
    torch.testing.assert_close(compiled(*real), want)
    traced = jax.jit(lambda *x: spoloss.preference_metrics(*x, beta=0.1))
    for name, value in traced(*four()).items():
        np.testing.assert_allclose(value, want[name])


def test_half_precision_is_averaged_in_float32() -> None:
    logps = [
        torch.full((1000,), value, dtype=torch.bfloat16) for value in (-300.0, -302.0, 0.0, 0.0)
    ]
    metrics = spoloss.preference_metrics(*logps, beta=0.1)
    assert all(value.dtype == torch.float32 for value in metrics.values())
    assert metrics["logps/chosen"].item() == -300.0
