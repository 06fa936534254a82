"""The modules return the triple that trainers unpack, equal to the functions."""

from __future__ import annotations

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
    assert module().reduction == "none"
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


def test_repr_shows_the_hyperparameters() -> None:
    assert repr(SPOLoss(0.1, linear_below=-1.0)) == (
        "SPOLoss(SPO(linear_below=-1.0), beta=0.1, reduction='none')"
    )


@pytest.mark.parametrize("module", [SPOLoss, DPOLoss, SquaredLoss])
def test_bad_hyperparameters(module) -> None:
    with pytest.raises(ValueError, match="beta must be positive and finite, got 0"):
        module(0.0)
    with pytest.raises(TypeError, match="beta must be a number, got Tensor"):
        module(torch.tensor(0.1))
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got 'avg'"):
        module(reduction="avg")
