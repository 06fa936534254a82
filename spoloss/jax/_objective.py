"""The loss of a batch of pairs as a function of their log-probabilities, with its slopes.

    loss = (l(u_w, u_l) + nll_weight * NLL) * weight,    NLL = -log pi(y_w|x) per token

This file contains no loss formula but the NLL's. Values come from `pair_loss`, and slopes from
`pair_grad`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from spoloss.gradients import pair_grad
from spoloss.jax._labels import divisors
from spoloss.losses import MarginLoss, PairLoss
from spoloss.pairs import pair_loss


class Constants(NamedTuple):
    """The numbers of each pair: shape [P], or 0-d for all pairs. They are differentiable.

    Attributes:
      reference_chosen: log pi_ref(y_w|x), nats, [P].
      reference_rejected: log pi_ref(y_l|x), nats, [P].
      beta: 1 / nats, [P] or 0-d.
      reward_gap: [P] or 0-d; None for 1.
      weights: [P] or 0-d; None for 1.
    """

    reference_chosen: Array
    reference_rejected: Array
    beta: Array
    reward_gap: Array | None
    weights: Array | None

    def alive(self, sides: int) -> Array:
        """Whether the weight of each pair is not 0, for each of its sides, [P, sides]."""
        shape = (len(self.reference_chosen), sides)
        if self.weights is None:
            return jnp.ones(shape, bool)
        return jnp.broadcast_to((self.weights != 0.0)[..., None], shape)


class _NegativeLogLikelihood:
    """The loss -log pi(y_w|x), for `pair_loss` without a reference."""

    def value(self, chosen: Array, rejected: Array, beta: Any) -> Array:  # noqa: ARG002
        return -chosen

    def slopes(self, chosen: Array, rejected: Array, beta: Any) -> tuple[Array, Array]:  # noqa: ARG002
        return jnp.full_like(chosen, -1.0), jnp.zeros_like(rejected)


@dataclass(frozen=True)
class Objective:
    """The loss of all pairs, reduced. Static under `jax.jit`.

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

    def logps(self, sums: Array, lengths: Array) -> Array:
        """Sequence log-probabilities from their sums over tokens; all [P, 2]."""
        return sums / divisors(lengths) if self.average else sums

    def value(self, sums: Array, lengths: Array, constants: Constants) -> Array:
        """The reduced loss from the sums and lengths of all sequences, [P, 2]."""
        chosen, rejected = self.logps(sums, lengths).T
        value: Array = pair_loss(
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
        per_token = sums[:, 0] / divisors(lengths[:, 0])
        nll: Array = pair_loss(
            _NegativeLogLikelihood(),
            per_token,
            per_token,
            0.0,
            0.0,
            beta=1.0,
            weights=constants.weights,
            reduction=self.reduction,
        )
        return value + self.nll_weight * nll.astype(value.dtype)

    def slopes(self, sums: Array, lengths: Array, constants: Constants) -> Array:
        """The derivatives of the sum of all pairs' losses with respect to `sums`, [P, 2]."""
        chosen, rejected = self.logps(sums, lengths).T
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
        slopes = jnp.stack(grads, axis=1).astype(sums.dtype)
        lengths = divisors(lengths)
        if self.average:
            slopes = slopes / lengths
        if self.nll_weight == 0.0:
            return slopes
        per_token = sums[:, 0] / lengths[:, 0]
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
        return slopes.at[:, 0].add(self.nll_weight * nll / lengths[:, 0])
