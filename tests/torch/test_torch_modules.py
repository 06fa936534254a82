"""The modules return the triple that trainers unpack, equal to the functions."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import spoloss
from helpers.pairs import four
from spoloss.torch import DPOLoss, SPOLoss, SquaredLoss

GAP = torch.tensor([0.7773, 1.3101, 0.0, 2.017, 0.5037])
WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0])  # the gap of 0 is left out
CASES = [
    (SPOLoss, spoloss.spo_loss, {"linear_below": -1.0}, {"reward_gap": GAP}),
    (DPOLoss, spoloss.dpo_loss, {"label_smoothing": 0.1}, {}),
    (SquaredLoss, spoloss.squared_loss, {}, {"reward_gap": GAP}),
]


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.tensor(array).to(dtype).requires_grad_() for array in four()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("module", "function", "options", "arguments"), CASES)
def test_modules_are_the_functions(
    module: Any, function: Any, options: Any, arguments: Any, dtype: torch.dtype
) -> None:
    """To the last bit, so that no parameter is rounded to half precision either."""
    logps = leaves(dtype)
    for reduction in ("none", "mean", "sum"):
        losses, *rewards = module(0.2, reduction=reduction, **options)(
            *logps, weights=WEIGHTS, **arguments
        )
        common = {"beta": 0.2, "reduction": reduction, "weights": WEIGHTS}
        want = function(*logps, **common, **options, **arguments)
        assert torch.equal(losses, want)
        assert losses.shape == (() if reduction != "none" else (5,))
        grads = (torch.autograd.grad(each.sum(), logps) for each in (losses, want))
        assert all(map(torch.equal, *grads))
        assert all(map(torch.equal, rewards, spoloss.implicit_rewards(*logps, beta=0.2)))
        assert not any(each.requires_grad for each in rewards)
    assert module(0.2).reduction == "none"


@pytest.mark.parametrize(("module", "function", "options", "arguments"), CASES)
def test_copies_compute_the_same_and_there_is_nothing_to_save(
    module: Any, function: Any, options: Any, arguments: Any
) -> None:
    loss, logps = module(0.2, reduction="sum", **options), leaves()
    for twin in (copy.copy(loss), copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(twin) == repr(loss)
        assert all(map(torch.equal, twin(*logps, **arguments), loss(*logps, **arguments)))
    assert function.__name__.split("_")[0] in repr(loss).lower()
    assert loss.state_dict() == {}


def test_a_module_shows_its_parameters() -> None:
    shown = repr(SPOLoss(0.3, linear_below=-1.0, reduction="mean"))
    assert shown == "SPOLoss(SPO(linear_below=-1.0), beta=0.3, reduction='mean')"


@pytest.mark.parametrize("module", [SPOLoss, DPOLoss, SquaredLoss])
def test_hyperparameters(module: Any) -> None:
    for one in (1, np.int64(1), np.float32(1.0)):
        assert type(module(one).beta) is float
    for wrong, name in ((torch.tensor(0.1), "Tensor"), (True, "bool")):
        with pytest.raises(TypeError, match=f"beta must be a number, got {name}"):
            module(wrong)
    with pytest.raises(ValueError, match="beta must be positive and finite, got 0"):
        module(0.0)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got 'avg'"):
        module(0.1, reduction="avg")
    with pytest.raises(TypeError, match="beta"):
        module()
