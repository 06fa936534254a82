"""The losses as modules that return the triple that most preference trainers unpack."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from spoloss._arrays import check_positive, check_reduction, is_number
from spoloss.losses import DPO, SPO, MarginLoss, Squared
from spoloss.pairs import implicit_rewards, pair_loss


class PreferenceOutput(NamedTuple):
    """The losses, shape [B] or 0-d when reduced, and the implicit rewards, [B] each, detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class _PairModule(nn.Module):
    """A loss with its beta and reduction. Subclasses choose the loss."""

    def __init__(self, loss: MarginLoss, beta: float, reduction: str) -> None:
        super().__init__()
        check_reduction(reduction)
        if not is_number(beta):
            raise TypeError(f"beta must be a number, got {type(beta).__name__}")
        check_positive("beta", beta)
        self.loss = loss
        self.beta = float(beta)
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"{self.loss}, beta={self.beta}, reduction={self.reduction!r}"

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | float,
        reference_rejected_logps: Tensor | float,
        *,
        reward_gap: Tensor | float | None = None,
        weights: Tensor | float | None = None,
    ) -> PreferenceOutput:
        """The losses of a batch of pairs, and their implicit rewards.

            h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l))

        h is the margin, in nats (arXiv:2508.07137v1, eq. 4), at which the module's loss is
        evaluated: y_w is the chosen completion, y_l the rejected one, pi the policy and pi_ref the
        reference.

        Args:
          policy_chosen_logps: log pi(y_w), summed over the tokens, in nats, [B].
          policy_rejected_logps: log pi(y_l), nats, [B].
          reference_chosen_logps: log pi_ref(y_w), nats, [B]; 0.0 for no reference.
          reference_rejected_logps: log pi_ref(y_l), nats, [B]; 0.0 for no reference.
          reward_gap: known difference of the rewards, r_w - r_l > 0, which divides beta: a number
            or [B]. None means 1.
          weights: factor of each pair: a number or [B]. 0 leaves a pair out. None means 1.

        Returns:
          PreferenceOutput(losses, chosen_rewards, rejected_rewards): the losses, [B] or 0-d as the
          module's reduction says, and beta * log(pi / pi_ref) of both sides, [B] each, detached.
          float64 if any of the four is, else float32.

        Raises:
          TypeError: as `spoloss.pair_loss`.
          ValueError: as `spoloss.pair_loss`.
        """
        policies = policy_chosen_logps, policy_rejected_logps
        logps = *policies, reference_chosen_logps, reference_rejected_logps
        losses = pair_loss(
            self.loss,
            *logps,
            beta=self.beta,
            reward_gap=reward_gap,
            weights=weights,
            reduction=self.reduction,
        )
        return PreferenceOutput(losses, *implicit_rewards(*logps, beta=self.beta))


class SPOLoss(_PairModule):
    """Stable Preference Optimization (SPO) as a module, arXiv:2508.07137v1, eq. 6.

        l = -x * e^(-x),   x = beta * h / reward_gap

    h is the margin of a pair, in nats (eq. 4). The minimum, -1/e, is at h = reward_gap / beta. Near
    the reference, SPO(beta) acts like DPO(4 * beta). A call returns a `PreferenceOutput`.

    Args:
      beta: Inverse of the target margin, in 1 / nats: a number > 0.
      linear_below: x0 in (-700, 1), or None. For x < x0 the loss continues along its tangent.
      reduction: "none" (trainers reduce the losses themselves), "mean" or "sum".

    Raises:
      TypeError: `beta` or `linear_below` is not a number.
      ValueError: A number is out of range, or `reduction` is unknown.
    """

    def __init__(
        self, beta: float, *, linear_below: float | None = None, reduction: str = "none"
    ) -> None:
        super().__init__(SPO(linear_below), beta, reduction)


class DPOLoss(_PairModule):
    """Direct Preference Optimization (DPO) as a module, arXiv:2305.18290, eq. 7.

        l = -(1 - e) * log s(x) - e * log s(-x),   x = beta * h / reward_gap,
        s(x) = 1 / (1 + e^(-x))

    h is the margin of a pair, in nats. A call returns a `PreferenceOutput`.

    Args:
      beta: Strength of the pull to the reference, in 1 / nats: a number > 0.
      label_smoothing: e in [0, 0.5), the assumed fraction of pairs with swapped labels.
      reduction: "none" (trainers reduce the losses themselves), "mean" or "sum".

    Raises:
      TypeError: `beta` or `label_smoothing` is not a number.
      ValueError: A number is out of range, or `reduction` is unknown.
    """

    def __init__(
        self, beta: float, *, label_smoothing: float = 0.0, reduction: str = "none"
    ) -> None:
        super().__init__(DPO(label_smoothing), beta, reduction)


class SquaredLoss(_PairModule):
    """The squared error of the margin as a module, arXiv:2508.07137v1, section 2.2.

        l = (h - reward_gap / beta)^2, in nats^2

    h is the margin of a pair, in nats (eq. 4). With twice the beta, the loss is Identity Preference
    Optimization (IPO). A call returns a `PreferenceOutput`.

    Args:
      beta: Inverse of the target margin, in 1 / nats: a number > 0.
      reduction: "none" (trainers reduce the losses themselves), "mean" or "sum".

    Raises:
      TypeError: `beta` is not a number.
      ValueError: A number is out of range, or `reduction` is unknown.
    """

    def __init__(self, beta: float, *, reduction: str = "none") -> None:
        super().__init__(Squared(), beta, reduction)
