"""Layer 2: the named losses from hidden states, written once for both wings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from spoloss.losses import DPO, SPO, Squared
from spoloss.pairs import IPO_GAP

# Each stands for the type of that name in the wing, as help() shows it.
Head = TypeVar("Head")
Completions = TypeVar("Completions")
Array = TypeVar("Array")
LinearPairLoss = TypeVar("LinearPairLoss")


class LinearLosses(Generic[Head, Completions, Array, LinearPairLoss]):
    """The losses of a wing that are its `linear_pair_loss` of a named loss.

    The wing makes one object and exports its methods as functions.
    """

    def __init__(self, linear_pair_loss: Callable[..., LinearPairLoss]) -> None:
        self.linear_pair_loss = linear_pair_loss

    def linear_spo_loss(
        self,
        head: Head,
        chosen: Completions,
        rejected: Completions,
        reference_chosen_logps: Array | float,
        reference_rejected_logps: Array | float,
        *,
        beta: Array | float,
        linear_below: float | None = None,
        reward_gap: Array | float | None = None,
        weights: Array | float | None = None,
        nll_weight: float = 0.0,
        average: bool = False,
        reduction: str = "mean",
    ) -> LinearPairLoss:
        """Stable Preference Optimization (SPO) from hidden states: see `linear_pair_loss`.

            l = -x * e^(-x),   x = beta * h / reward_gap   (paper eq. 6)

        h = (log pi(y_w|x) - log pi_ref(y_w|x)) - (log pi(y_l|x) - log pi_ref(y_l|x)) is the margin,
        in nats (paper eq. 4). Source: Y. Tan, "A Stable and Principled Loss Function for Direct
        Language Model Alignment", arXiv:2508.07137v1 ("the paper").

        Args:
          head: how hidden states become logits.
          chosen: the chosen completions, P of them.
          rejected: the rejected completions, P of them.
          reference_chosen_logps: log pi_ref(y_w|x), nats, [P]; 0.0 for no reference.
          reference_rejected_logps: log pi_ref(y_l|x), nats, [P]; 0.0 for no reference.
          beta: inverse of the target margin, 1 / nats, > 0: a number or [P].
          linear_below: x0 in (-700, 1). For x < x0 the loss continues along its tangent at x0. None
            is equation 6 as published.
          reward_gap: known r_w - r_l, > 0: a number or [P]. The target is reward_gap / beta. None
            means 1.
          weights: factor of each pair: a number or [P]. None means 1.
          nll_weight: factor of the chosen completions' negative log-likelihood per token, >= 0.
          average: use log-probabilities per token instead of sums, also for the reference.
          reduction: "mean", "sum" or "none" (the loss of each pair).

        Returns:
          LinearPairLoss(loss, chosen_logps, rejected_logps), as `linear_pair_loss`.

        Raises:
          TypeError: as `linear_pair_loss`, or `linear_below` is not a number.
          ValueError: as `linear_pair_loss`, or `linear_below` is out of range.
        """
        references = reference_chosen_logps, reference_rejected_logps
        options = {"nll_weight": nll_weight, "average": average, "reduction": reduction}
        arguments = SPO(linear_below), head, chosen, rejected, *references
        return self.linear_pair_loss(
            *arguments, beta=beta, reward_gap=reward_gap, weights=weights, **options
        )

    def linear_dpo_loss(
        self,
        head: Head,
        chosen: Completions,
        rejected: Completions,
        reference_chosen_logps: Array | float,
        reference_rejected_logps: Array | float,
        *,
        beta: Array | float,
        label_smoothing: float = 0.0,
        weights: Array | float | None = None,
        nll_weight: float = 0.0,
        average: bool = False,
        reduction: str = "mean",
    ) -> LinearPairLoss:
        """Direct Preference Optimization (DPO) from hidden states: see `linear_pair_loss`.

            l = -(1 - e) * log s(x) - e * log s(-x),   x = beta * h,   s(x) = 1 / (1 + e^(-x))

        arXiv:2305.18290, eq. 7, with the margin h in nats, and label smoothing e.

        Args:
          head: how hidden states become logits.
          chosen: the chosen completions, P of them.
          rejected: the rejected completions, P of them.
          reference_chosen_logps: log pi_ref(y_w|x), nats, [P]; 0.0 for no reference.
          reference_rejected_logps: log pi_ref(y_l|x), nats, [P]; 0.0 for no reference.
          beta: strength of the pull to the reference, 1 / nats, > 0: a number or [P].
          label_smoothing: e in [0, 0.5), the assumed fraction of pairs with swapped labels.
          weights: factor of each pair: a number or [P]. None means 1.
          nll_weight: factor of the chosen completions' negative log-likelihood per token, >= 0.
          average: use log-probabilities per token instead of sums, also for the reference.
          reduction: "mean", "sum" or "none" (the loss of each pair).

        Returns:
          LinearPairLoss(loss, chosen_logps, rejected_logps), as `linear_pair_loss`.

        Raises:
          TypeError: as `linear_pair_loss`, or `label_smoothing` is not a number.
          ValueError: as `linear_pair_loss`, or `label_smoothing` is out of range.
        """
        references = reference_chosen_logps, reference_rejected_logps
        options = {"nll_weight": nll_weight, "average": average, "reduction": reduction}
        arguments = DPO(label_smoothing), head, chosen, rejected, *references
        return self.linear_pair_loss(*arguments, beta=beta, weights=weights, **options)

    def linear_squared_loss(
        self,
        head: Head,
        chosen: Completions,
        rejected: Completions,
        reference_chosen_logps: Array | float,
        reference_rejected_logps: Array | float,
        *,
        beta: Array | float,
        reward_gap: Array | float | None = None,
        weights: Array | float | None = None,
        nll_weight: float = 0.0,
        average: bool = False,
        reduction: str = "mean",
    ) -> LinearPairLoss:
        """The squared error of the margin to its target from hidden states: see `linear_pair_loss`.

            l = (h - reward_gap / beta)^2, in nats^2

        Section 2.2 of Y. Tan, "A Stable and Principled Loss Function for Direct Language Model
        Alignment", arXiv:2508.07137v1, with the margin h in nats (eq. 4).

        Args:
          head: how hidden states become logits.
          chosen: the chosen completions, P of them.
          rejected: the rejected completions, P of them.
          reference_chosen_logps: log pi_ref(y_w|x), nats, [P]; 0.0 for no reference.
          reference_rejected_logps: log pi_ref(y_l|x), nats, [P]; 0.0 for no reference.
          beta: inverse of the target margin, 1 / nats, > 0: a number or [P].
          reward_gap: known r_w - r_l, > 0: a number or [P]. The target is reward_gap / beta. None
            means 1.
          weights: factor of each pair: a number or [P]. None means 1.
          nll_weight: factor of the chosen completions' negative log-likelihood per token, >= 0.
          average: use log-probabilities per token instead of sums, also for the reference.
          reduction: "mean", "sum" or "none" (the loss of each pair).

        Returns:
          LinearPairLoss(loss, chosen_logps, rejected_logps), as `linear_pair_loss`.

        Raises:
          TypeError: as `linear_pair_loss`.
          ValueError: as `linear_pair_loss`.
        """
        references = reference_chosen_logps, reference_rejected_logps
        options = {"nll_weight": nll_weight, "average": average, "reduction": reduction}
        arguments = Squared(), head, chosen, rejected, *references
        return self.linear_pair_loss(
            *arguments, beta=beta, reward_gap=reward_gap, weights=weights, **options
        )

    def linear_ipo_loss(
        self,
        head: Head,
        chosen: Completions,
        rejected: Completions,
        reference_chosen_logps: Array | float,
        reference_rejected_logps: Array | float,
        *,
        beta: Array | float,
        weights: Array | float | None = None,
        nll_weight: float = 0.0,
        average: bool = False,
        reduction: str = "mean",
    ) -> LinearPairLoss:
        """Identity Preference Optimization (IPO) from hidden states: see `linear_pair_loss`.

            l = (h - 1 / (2 * beta))^2, in nats^2

        Equation 17 of Azar et al., arXiv:2310.12036, on summed log-probabilities, with the margin h
        in nats; `average=True` gives the averages over tokens that some trainers use.

        Args:
          head: how hidden states become logits.
          chosen: the chosen completions, P of them.
          rejected: the rejected completions, P of them.
          reference_chosen_logps: log pi_ref(y_w|x), nats, [P]; 0.0 for no reference.
          reference_rejected_logps: log pi_ref(y_l|x), nats, [P]; 0.0 for no reference.
          beta: half of the inverse of the target margin, 1 / nats, > 0: a number or [P].
          weights: factor of each pair: a number or [P]. None means 1.
          nll_weight: factor of the chosen completions' negative log-likelihood per token, >= 0.
          average: use log-probabilities per token instead of sums, also for the reference.
          reduction: "mean", "sum" or "none" (the loss of each pair).

        Returns:
          LinearPairLoss(loss, chosen_logps, rejected_logps), as `linear_pair_loss`.

        Raises:
          TypeError: as `linear_pair_loss`.
          ValueError: as `linear_pair_loss`.
        """
        references = reference_chosen_logps, reference_rejected_logps
        options = {"nll_weight": nll_weight, "average": average, "reduction": reduction}
        arguments = Squared(), head, chosen, rejected, *references
        return self.linear_pair_loss(
            *arguments, beta=beta, reward_gap=IPO_GAP, weights=weights, **options
        )
