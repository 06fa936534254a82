"""Layer 2: the loss of a batch of pairs as a function of sums over their tokens, with its slopes.

    loss = (l(u_w, u_l) + nll_weight * NLL) * weight,    NLL = -log pi(y_w|x) per token

Both wings use it. It contains no loss formula but the NLL's: values come from `pair_loss`, and
slopes from `pair_grad`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from spoloss._arrays import averages, cast, conform, filled, namespace, per_pair
from spoloss._inputs import LOGPS, beta_for_gap
from spoloss.gradients import pair_grad
from spoloss.losses import MarginLoss, PairLoss
from spoloss.pairs import pair_loss


class Constants(NamedTuple):
    """The numbers of each pair, as numbers, 0-d or [P]. The loss is differentiable in them.

    Attributes:
      reference_chosen: log pi_ref(y_w|x), nats.
      reference_rejected: log pi_ref(y_l|x), nats.
      beta: 1 / nats.
      reward_gap: None for 1.
      weights: None for 1.
    """

    reference_chosen: Any
    reference_rejected: Any
    beta: Any
    reward_gap: Any
    weights: Any

    def check(self, like: Any) -> Any:
        """Check the numbers before any computation. `pair_loss` would check them after.

        Args:
          like: an array of the shape, dtype and device of the policy's log-probabilities.

        Returns:
          `like` in the dtype of the margins, which that of a reference may widen.
        """
        names = "the policy's log-probabilities", *LOGPS[2:]
        like, *_ = conform(
            names, (like, self.reference_chosen, self.reference_rejected), numbers_from=1
        )
        beta_for_gap(self.beta, self.reward_gap, like)  # also the range of their ratio
        if self.weights is not None:
            per_pair("weights", self.weights, like, positive=False)
        return like

    def of(self, pairs: slice) -> Constants:
        """Those of some pairs."""
        return Constants(*(v[pairs] if getattr(v, "ndim", 0) else v for v in self))


@dataclass(frozen=True)
class Objective:
    """The loss of all pairs, reduced.

    Its methods take the sums of the chosen and of the rejected completions' token
    log-probabilities, [P] each, and what averages divide them by: the number of their tokens, or
    the sum of the tokens' weights.

    Attributes:
      loss: the loss of the margin or of the two log-ratios.
      nll_weight: factor of the chosen completions' negative log-likelihood per token.
      reduction: "mean", "sum" or "none".
      average: whether log-probabilities are averages over tokens.
    """

    loss: MarginLoss | PairLoss
    nll_weight: float
    reduction: str
    average: bool

    def logps(self, sums: Any, lengths: Any) -> tuple[Any, Any]:
        """The log-probabilities of the chosen and of the rejected completions, [P] each."""
        chosen, rejected = sums
        if not self.average:
            return chosen, rejected
        return averages(chosen, lengths[0]), averages(rejected, lengths[1])

    def value(self, sums: Any, lengths: Any, constants: Constants) -> Any:
        """The reduced loss."""
        value = self._of_loss(pair_loss, sums, lengths, constants, self.reduction)
        if self.nll_weight == 0.0:
            return value
        nll = _of_nll(pair_loss, sums[0], lengths[0], constants.weights, self.reduction)
        return value + self.nll_weight * cast(namespace(value), nll, value.dtype)

    def slopes(self, sums: Any, lengths: Any, constants: Constants) -> tuple[Any, Any]:
        """The derivatives of each pair's loss, not reduced, with respect to its two sums."""
        xp, dtype = namespace(sums[0]), sums[0].dtype
        grads = self._of_loss(pair_grad, sums, lengths, constants, "none")
        # Averages are a linear map, which is its own transpose.
        chosen, rejected = self.logps([cast(xp, grad, dtype) for grad in grads], lengths)
        if self.nll_weight != 0.0:
            nll, _ = _of_nll(pair_grad, sums[0], lengths[0], constants.weights, "none")
            chosen = chosen + self.nll_weight * averages(nll, lengths[0])
        return chosen, rejected

    def _of_loss(
        self,
        function: Callable[..., Any],
        sums: Any,
        lengths: Any,
        constants: Constants,
        reduction: str,
    ) -> Any:
        """`pair_loss` or `pair_grad` of the loss."""
        return function(
            self.loss,
            *self.logps(sums, lengths),
            constants.reference_chosen,
            constants.reference_rejected,
            beta=constants.beta,
            reward_gap=constants.reward_gap,
            weights=constants.weights,
            reduction=reduction,
        )


class _NegativeLogLikelihood:
    """The loss -log pi(y_w|x), for `pair_loss` without a reference."""

    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:  # noqa: ARG002
        return -chosen

    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> tuple[Any, Any]:  # noqa: ARG002
        return filled(chosen, -1.0), filled(rejected, 0.0)


def _of_nll(
    function: Callable[..., Any], sums: Any, lengths: Any, weights: Any, reduction: str
) -> Any:
    """`pair_loss` or `pair_grad` of the chosen completions' NLL, weighted like the loss."""
    loss, logps = _NegativeLogLikelihood(), averages(sums, lengths)
    return function(loss, logps, logps, 0.0, 0.0, beta=1.0, weights=weights, reduction=reduction)
