"""The modules return the triple that trainers unpack, equal to the functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import spoloss
from helpers.pairs import four
from spoloss.torch import DPOLoss, SPOLoss, SquaredLoss


def tensors() -> list[torch.Tensor]:
    return [torch.tensor(array, requires_grad=True) for array in four()]


CASES = [
    (SPOLoss, spoloss.spo_loss, {"linear_below": -1.0}, {"reward_gap": 2.0}),
    (DPOLoss, spoloss.dpo_loss, {"label_smoothing": 0.1}, {}),
    (SquaredLoss, spoloss.squared_loss, {}, {"reward_gap": 0.5}),
]


@pytest.mark.parametrize(("module", "function", "options", "arguments"), CASES)
def test_modules_are_the_functions(module, function, options, arguments) -> None:
    logps = tensors()
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    for reduction in ("none", "mean", "sum"):
        loss = module(0.2, reduction=reduction, **options)
        out = loss(*logps, weights=weights, **arguments)
        want = function(
            *logps, beta=0.2, reduction=reduction, weights=weights, **options, **arguments
        )
        torch.testing.assert_close(out.losses, want)
        assert out.losses.requires_grad
        assert out.losses.shape == (() if reduction != "none" else (5,))
    assert module(0.2).reduction == "none"
    losses, chosen_rewards, rejected_rewards = module(0.2)(*logps)
    rewards = spoloss.implicit_rewards(*logps, beta=0.2)
    torch.testing.assert_close((chosen_rewards, rejected_rewards), tuple(rewards))
    assert losses.shape == chosen_rewards.shape == rejected_rewards.shape == (5,)
    assert not chosen_rewards.requires_grad
    assert not rejected_rewards.requires_grad


@pytest.mark.parametrize(("module", "function", "options", "arguments"), CASES)
def test_modules_compile(module, function, options, arguments) -> None:
    loss = module(0.2, reduction="mean", **options)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors(), **arguments), loss(*tensors(), **arguments))
    assert function.__name__.split("_")[0] in repr(loss).lower()


@pytest.mark.parametrize("module", [SPOLoss, DPOLoss, SquaredLoss])
def test_bad_hyperparameters(module) -> None:
    with pytest.raises(ValueError, match="beta must be positive and finite, got 0"):
        module(0.0)
    with pytest.raises(TypeError, match="beta must be a number, got Tensor"):
        module(torch.tensor(0.1))
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got 'avg'"):
        module(0.1, reduction="avg")


@pytest.mark.parametrize("module", [SPOLoss, DPOLoss, SquaredLoss])
def test_beta_has_no_default(module) -> None:
    with pytest.raises(TypeError, match="beta"):
        module()


@pytest.mark.parametrize("module", [SPOLoss, DPOLoss, SquaredLoss])
def test_numbers_of_numpy_are_numbers_and_booleans_are_not(module) -> None:
    for one in (1, np.int64(1), np.float32(1.0)):
        assert type(module(one).beta) is float
    with pytest.raises(TypeError, match="beta must be a number, got bool"):
        module(True)


@pytest.mark.parametrize("module", [SPOLoss, SquaredLoss])
def test_modules_round_no_gap_to_half_precision(module) -> None:
    half = [array.detach().to(torch.bfloat16) for array in tensors()]
    gap = torch.tensor([0.7773, 1.3101, 0.9099, 2.017, 0.5037])
    got = module(0.1)(*half, reward_gap=gap).losses
    want = module(0.1)(*(array.double() for array in half), reward_gap=gap.double()).losses
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("module", [SPOLoss, SquaredLoss])
def test_modules_leave_out_a_tied_pair_of_weight_0(module) -> None:
    gap = torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    logps = tensors()
    losses = module(0.1, reduction="mean")(*logps, reward_gap=gap, weights=gap.detach() ** 2).losses
    losses.backward()
    for leaf in (*logps, gap):
        assert leaf.grad.isfinite().all()
        assert leaf.grad[0] == 0.0
