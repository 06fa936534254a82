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

            h = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l))   (paper eq. 4)

        h is the margin, in nats: y_w is the chosen completion of a pair and y_l the rejected one,
        pi is the policy and pi_ref the reference. The module's loss is evaluated at h.

        Args:
          policy_chosen_logps: log pi(y_w), the policy's log-probability of each chosen completion,
            summed over its tokens, in nats. Shape [B], real floating point.
          policy_rejected_logps: log pi(y_l), the same for the rejected completions. Shape [B].
          reference_chosen_logps: log pi_ref(y_w), the same under the reference model. Shape [B], or
            the number 0.0 to train without a reference.
          reference_rejected_logps: log pi_ref(y_l), the same for the rejected completions. Shape
            [B], or 0.0.
          reward_gap: Known difference of the two rewards, r_w - r_l > 0: a number, or a tensor that
            is 0-d or of shape [B]. It divides beta, so that the target of SPO and of the squared
            loss is reward_gap / beta. None means 1, the paper's choice for an unknown gap. With
            small gaps, pass `weights=reward_gap**2`, because the curvature at SPO's target grows
            like 1 / reward_gap^2.
          weights: Factor of each pair: a number, or a tensor that is 0-d or of shape [B]. It may be
            negative. A pair of weight 0 adds nothing to the loss or to any gradient, even if its
            log-probabilities or reward gap are nan or inf, or the gap is 0. The gradient with
            respect to a weight is the loss of its pair, even at weight 0 (0 if that loss is not
            finite). None means 1.

        Returns:
          PreferenceOutput(losses, chosen_rewards, rejected_rewards) with the losses, of shape [B]
          or 0-d, depending on the module's reduction, and beta * log(pi / pi_ref) of both sides,
          shape [B] each, detached. float64 if any of the four log-probabilities is float64, else
          float32.

        Raises:
          TypeError: A tensor is not real floating point, or an argument is not a tensor.
          ValueError: The shapes or devices differ, or a number is out of range (tensors are not
            inspected).
        """
        logps = (
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
        )
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
    """Stable Preference Optimization (SPO) as a module, paper eq. 6.

        l = -x * e^(-x),   x = beta * h / reward_gap

    h is the margin of a pair (paper eq. 4), in nats. The loss has its minimum, -1/e, at h =
    reward_gap / beta. Near the reference, SPO(beta) acts like DPO(4 * beta).

    Calling it returns PreferenceOutput(losses, chosen_rewards, rejected_rewards), the triple that
    most preference trainers unpack.

    Source: Y. Tan, "A Stable and Principled Loss Function for Direct Language Model Alignment",
    arXiv:2508.07137v1 ("the paper").

    Args:
      beta: Inverse of the target margin, in 1 / nats: a number > 0.
      linear_below: x0 in (-700, 1). For x < x0 the loss continues along its tangent at x0, where
        dl/dx = -(1 - x0) * e^(-x0). None is equation 6 as published.
      reduction: "none" (the default, because trainers that unpack the triple reduce the losses
        themselves), "mean", which divides by B, or "sum".

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

    h is the margin of a pair, in nats.

    Calling it returns PreferenceOutput(losses, chosen_rewards, rejected_rewards), the triple that
    most preference trainers unpack.

    Args:
      beta: Strength of the pull to the reference, in 1 / nats: a number > 0.
      label_smoothing: e in [0, 0.5), the assumed fraction of pairs with swapped labels
        (conservative DPO).
      reduction: "none" (the default, because trainers that unpack the triple reduce the losses
        themselves), "mean", which divides by B, or "sum".

    Raises:
      TypeError: `beta` or `label_smoothing` is not a number.
      ValueError: A number is out of range, or `reduction` is unknown.
    """

    def __init__(
        self, beta: float, *, label_smoothing: float = 0.0, reduction: str = "none"
    ) -> None:
        super().__init__(DPO(label_smoothing), beta, reduction)


class SquaredLoss(_PairModule):
    """The squared error of the margin to its target as a module, paper section 2.2.

        l = (h - reward_gap / beta)^2, in nats^2

    h is the margin of a pair (paper eq. 4), in nats. With twice the beta, the loss is Identity
    Preference Optimization (IPO).

    Calling it returns PreferenceOutput(losses, chosen_rewards, rejected_rewards), the triple that
    most preference trainers unpack.

    Source: Y. Tan, "A Stable and Principled Loss Function for Direct Language Model Alignment",
    arXiv:2508.07137v1 ("the paper").

    Args:
      beta: Inverse of the target margin, in 1 / nats: a number > 0.
      reduction: "none" (the default, because trainers that unpack the triple reduce the losses
        themselves), "mean", which divides by B, or "sum".

    Raises:
      TypeError: `beta` is not a number.
      ValueError: A number is out of range, or `reduction` is unknown.
    """

    def __init__(self, beta: float, *, reduction: str = "none") -> None:
        super().__init__(Squared(), beta, reduction)
