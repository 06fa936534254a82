"""What a user writes; mypy --strict and pyright have to accept it (see .ci/run)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import assert_type

from spoloss import (
    DPO,
    SPO,
    MarginLoss,
    dpo_loss,
    pair_loss,
    preference_metrics,
    spo_grad,
    spo_loss,
)
from spoloss.torch import (
    Completions,
    Head,
    PreferenceOutput,
    SPOLoss,
    linear_logps,
    linear_spo_loss,
    sequence_logps,
)


def on_tensors(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """PyTorch: a tensor in, a tensor out."""
    chosen, rejected = sequence_logps(logits, labels).chunk(2)
    loss = spo_loss(chosen, rejected, 0.0, 0.0, beta=0.1, weights=torch.ones_like(chosen))
    assert_type(loss, torch.Tensor)
    smooth = dpo_loss(
        chosen, rejected, chosen.detach(), rejected.detach(), beta=0.1, label_smoothing=0.1
    )
    output: PreferenceOutput = SPOLoss(beta=0.1)(chosen, rejected, chosen, rejected)
    losses, chosen_rewards, _ = output
    return loss + smooth + losses.mean() + chosen_rewards.mean()


def fused(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The fused head returns a named tuple."""
    head, completions = Head(weight, softcap=30.0), Completions(hidden, labels)
    reference = linear_logps(head, completions)
    assert_type(reference, torch.Tensor)
    result = linear_spo_loss(head, completions, completions, reference, reference, beta=0.1)
    assert_type(result.loss, torch.Tensor)
    return result.loss + result.chosen_logps.sum()


def on_arrays(logps: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """NumPy: an array in, an array out."""
    loss = spo_loss(logps, logps, logps, logps, beta=0.1, reduction="none")
    assert_type(loss, npt.NDArray[np.float64])
    spo_grad(logps, logps, logps, logps, beta=0.1)
    metrics = preference_metrics(logps, logps, logps, logps, beta=0.1)
    print(metrics["rewards/margins"])
    return loss


class Hinge:
    """A loss of the user's own."""

    def value(self, margin: Any, beta: Any) -> Any:
        """max(0, 1 - x)."""
        return (1.0 - beta * margin).clip(min=0.0)

    def slope(self, margin: Any, beta: Any) -> Any:
        """Its derivative."""
        return -beta * (beta * margin < 1.0)


def with_any_loss(logps: torch.Tensor, loss: MarginLoss) -> torch.Tensor:
    """A loss object is an argument like any other."""
    return pair_loss(loss, logps, logps, logps, logps, beta=0.1)


for each in (SPO(linear_below=-1.0), DPO(), Hinge()):
    with_any_loss(torch.zeros(2), each)
