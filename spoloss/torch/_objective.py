"""The loss of a batch of pairs as a function of their log-probabilities, with its slopes.

    loss = (l(u_w, u_l) + nll_weight * NLL) * weight,    NLL = -log pi(y_w|x) per token

This file contains no loss formula but the NLL's. Values come from `pair_loss`, and slopes from
`pair_grad`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spoloss._arrays import reduction_scale
from spoloss.gradients import pair_grad
from spoloss.losses import MarginLoss, PairLoss
from spoloss.pairs import pair_loss
from spoloss.torch._labels import divisors


class Constants(NamedTuple):
    """The numbers of each pair. The loss is differentiable with respect to them.

    Attributes:
      reference_chosen: log pi_ref(y_w|x), nats: a number or [P].
      reference_rejected: log pi_ref(y_l|x), nats: a number or [P].
      beta: 1 / nats: a number, 0-d or [P].
      reward_gap: a number, 0-d or [P]; None for 1.
      weights: a number, 0-d or [P]; None for 1.
      lengths: the number of tokens, or the sum of their weights, of each side and pair, [2, P].
    """

    reference_chosen: Any
    reference_rejected: Any
    beta: Any
    reward_gap: Any
    weights: Any
    lengths: Tensor

    def of(self, pairs: slice) -> Constants:
        """Those of some pairs."""
        numbers = [v[pairs] if isinstance(v, Tensor) and v.ndim else v for v in self[:-1]]
        return Constants._make((*numbers, self.lengths[:, pairs]))


class _NegativeLogLikelihood:
    """The loss -log pi(y_w|x), for `pair_loss` without a reference."""

    def value(self, chosen: Tensor, rejected: Tensor, beta: Any) -> Tensor:  # noqa: ARG002
        return -chosen

    def slopes(self, chosen: Tensor, rejected: Tensor, beta: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return torch.full_like(chosen, -1.0), torch.zeros_like(rejected)


@dataclass(frozen=True)
class Objective:
    """The loss of all pairs, reduced.

    Attributes:
      loss: the loss of the margin or of the two log-ratios.
      nll_weight: factor of the chosen sequences' negative log-likelihood per token.
      reduction: "mean", "sum" or "none".
      average: whether log-probabilities are averages over tokens.
    """

    loss: MarginLoss | PairLoss
    nll_weight: float
    reduction: str
    average: bool

    def logps(self, sums: Tensor, constants: Constants) -> Tensor:
        """Sequence log-probabilities from their sums over tokens; both [2, P]."""
        return sums / divisors(constants.lengths).to(sums.dtype) if self.average else sums

    def value(self, sums: Tensor, constants: Constants) -> Tensor:
        """The reduced loss from the sums of all sequences, [2, P]."""
        chosen, rejected = self.logps(sums, constants)
        value: Tensor = pair_loss(
            self.loss,
            chosen,
            rejected,
            constants.reference_chosen,
            constants.reference_rejected,
            beta=constants.beta,
            reward_gap=constants.reward_gap,
            weights=constants.weights,
            reduction=self.reduction,
        )
        if self.nll_weight == 0.0:
            return value
        per_token = sums[0] / divisors(constants.lengths[0]).to(sums.dtype)
        nll: Tensor = pair_loss(
            _NegativeLogLikelihood(),
            per_token,
            per_token,
            0.0,
            0.0,
            beta=1.0,
            weights=constants.weights,
            reduction=self.reduction,
        )
        return value + self.nll_weight * nll

    def slopes(self, sums: Tensor, constants: Constants, pairs: slice) -> Tensor:
        """The derivatives of the loss with respect to the sums of some pairs, [2, p].

        Args:
          sums: sums over tokens for all pairs, [2, P]. Those of `pairs` must be complete.
          constants: the numbers of all pairs.
          pairs: the p pairs.
        """
        scale, constants = reduction_scale(sums[0], self.reduction), constants.of(pairs)
        sums = sums[:, pairs]
        chosen, rejected = self.logps(sums, constants)
        grads = pair_grad(
            self.loss,
            chosen,
            rejected,
            constants.reference_chosen,
            constants.reference_rejected,
            beta=constants.beta,
            reward_gap=constants.reward_gap,
            weights=constants.weights,
            reduction="sum",
        )
        slopes = self.logps(torch.stack(grads), constants)  # a linear map, its own transpose
        if self.nll_weight != 0.0:
            length = divisors(constants.lengths[0]).to(sums.dtype)
            per_token = sums[0] / length
            nll, _ = pair_grad(
                _NegativeLogLikelihood(),
                per_token,
                per_token,
                0.0,
                0.0,
                beta=1.0,
                weights=constants.weights,
                reduction="sum",
            )
            slopes[0] += self.nll_weight * nll / length
        return (slopes * scale).to(sums.dtype)


def zero_weights(weights: Tensor | float | None, like: Tensor) -> Tensor | None:
    """Which pairs have weight 0, as booleans of the shape of `like`, or None if none can."""
    if isinstance(weights, Tensor):
        return weights.to(like.device).expand(like.shape) == 0.0
    return None if weights is None or weights != 0.0 else torch.ones_like(like, dtype=torch.bool)
