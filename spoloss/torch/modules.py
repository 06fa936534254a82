"""The losses as modules that return the triple which most preference trainers unpack."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from spoloss._arrays import check_positive, check_reduction, is_number
from spoloss.losses import DPO, SPO, MarginLoss, Squared
from spoloss.pairs import beta_for_gap, implicit_rewards, pair_loss


class PreferenceOutput(NamedTuple):
    """The loss, [B] or 0-d after a reduction, and the detached implicit rewards, [B] each."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class _PairModule(nn.Module):
    """A loss with its beta and reduction; subclasses choose the loss and what forward takes."""

    def __init__(self, loss: MarginLoss, beta: float, reduction: str) -> None:
        super().__init__()
        check_reduction(reduction)
        if not is_number(beta):
            raise TypeError(f"beta must be a number, got {type(beta).__name__}")
        check_positive("beta", beta)
        self.loss = loss
        self.beta = beta
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"{self.loss}, beta={self.beta}, reduction={self.reduction!r}"

    def _output(
        self,
        logps: tuple[Tensor, Tensor, Tensor | float, Tensor | float],
        reward_gap: Tensor | float | None,
        weights: Tensor | None,
    ) -> PreferenceOutput:
        losses = pair_loss(
            self.loss,
            *logps,
            beta=beta_for_gap(self.beta, reward_gap, logps[0]),
            weights=weights,
            reduction=self.reduction,
        )
        return PreferenceOutput(losses, *implicit_rewards(*logps, beta=self.beta))


class SPOLoss(_PairModule):
    """`spoloss.spo_loss` as a module, unreduced by default.

    Args:
      beta: inverse of the target margin, 1 / nats, > 0.
      linear_below: x0 < 1, where the loss goes on along its tangent; None is equation 6.
      reduction: "none", "mean" or "sum".

    Raises:
      TypeError: an argument is not a number.
      ValueError: a number is out of range, or the reduction does not exist.
    """

    def __init__(
        self, beta: float = 0.1, *, linear_below: float | None = None, reduction: str = "none"
    ) -> None:
        super().__init__(SPO(linear_below), beta, reduction)

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | float,
        reference_rejected_logps: Tensor | float,
        *,
        reward_gap: Tensor | float | None = None,
        weights: Tensor | None = None,
    ) -> PreferenceOutput:
        """Arguments, shapes and errors are those of `spoloss.spo_loss`."""
        logps = (
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
        )
        return self._output(logps, reward_gap, weights)


class DPOLoss(_PairModule):
    """`spoloss.dpo_loss` as a module, unreduced by default.

    Args:
      beta: strength of the pull to the reference, 1 / nats, > 0.
      label_smoothing: the share of labels taken to be flipped, in [0, 0.5).
      reduction: "none", "mean" or "sum".

    Raises:
      TypeError: an argument is not a number.
      ValueError: a number is out of range, or the reduction does not exist.
    """

    def __init__(
        self, beta: float = 0.1, *, label_smoothing: float = 0.0, reduction: str = "none"
    ) -> None:
        super().__init__(DPO(label_smoothing), beta, reduction)

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | float,
        reference_rejected_logps: Tensor | float,
        *,
        weights: Tensor | None = None,
    ) -> PreferenceOutput:
        """Arguments, shapes and errors are those of `spoloss.dpo_loss`."""
        logps = (
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
        )
        return self._output(logps, None, weights)


class SquaredLoss(_PairModule):
    """`spoloss.squared_loss` as a module, unreduced by default.

    Args:
      beta: inverse of the target margin, 1 / nats, > 0.
      reduction: "none", "mean" or "sum".

    Raises:
      TypeError: beta is not a number.
      ValueError: beta is out of range, or the reduction does not exist.
    """

    def __init__(self, beta: float = 0.1, *, reduction: str = "none") -> None:
        super().__init__(Squared(), beta, reduction)

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | float,
        reference_rejected_logps: Tensor | float,
        *,
        reward_gap: Tensor | float | None = None,
        weights: Tensor | None = None,
    ) -> PreferenceOutput:
        """Arguments, shapes and errors are those of `spoloss.squared_loss`."""
        logps = (
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
        )
        return self._output(logps, reward_gap, weights)
