"""The loss of a batch of pairs as a function of their log-probabilities, with its slopes.

    loss = l(h) + nll_weight * NLL,    NLL = -log pi(y_w|x) / (number of its tokens)

This file contains no loss formula. Values come from `pair_loss`, and slopes from `pair_grad`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from spoloss._arrays import reduce
from spoloss.gradients import pair_grad
from spoloss.losses import MarginLoss
from spoloss.pairs import inputs, pair_loss


class Constants(NamedTuple):
    """The per-pair arguments: shape [P], or 0-d for all pairs. They are differentiable.

    Attributes:
      reference_chosen: nats, [P].
      reference_rejected: nats, [P].
      beta: 1 / nats, [P] or 0-d.
      reward_gap: [P] or 0-d, or None for a loss without one.
      weights: [P] or 0-d, or None for 1.
    """

    reference_chosen: Array
    reference_rejected: Array
    beta: Array
    reward_gap: Array | None
    weights: Array | None

    def alive(self, lengths: Array) -> Array:
        """Whether a pair has a nonzero weight, for both of its sides: [P, 2], like `lengths`."""
        alive = jnp.bool_(True) if self.weights is None else (self.weights != 0.0)[..., None]
        return jnp.broadcast_to(alive, lengths.shape)


class _NLL:
    """The negative log-likelihood as a function of the log-probability."""

    def value(self, logp: Array, beta: float) -> Array:
        del beta
        return -logp

    def slope(self, logp: Array, beta: float) -> Array:
        del beta
        return -jnp.ones_like(logp)


@dataclass(frozen=True)
class Objective:
    """A loss of the margin with its options. Static under `jax.jit`."""

    loss: MarginLoss
    nll_weight: float
    average: bool
    reduction: str

    def logps(self, sums: Array, lengths: Array) -> Array:
        """Log-probabilities [P, 2] from sums over tokens, or averages with `average`."""
        return sums / _at_least_1(lengths) if self.average else sums

    def value(self, sums: Array, lengths: Array, constants: Constants) -> Array:
        """The reduced loss."""
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
        per_token = sums[:, 0] / _at_least_1(lengths[:, 0])
        pairs = inputs(_NLL(), per_token, 1.0, None, constants.weights)
        nll: Array = pairs.weigh(-pairs.margin)
        total: Array = value + self.nll_weight * reduce(nll, self.reduction).astype(value.dtype)
        return total

    def slopes(self, sums: Array, lengths: Array, constants: Constants, scale: float) -> Array:
        """`scale` times the derivative of each pair's loss by its margin, [P], without the NLL."""
        chosen, rejected = self.logps(sums, lengths).T
        slopes: Array = pair_grad(
            self.loss,
            chosen,
            rejected,
            constants.reference_chosen,
            constants.reference_rejected,
            beta=constants.beta,
            reward_gap=constants.reward_gap,
            weights=constants.weights,
            reduction="sum",
        ).policy_chosen
        return scale * slopes.astype(sums.dtype)

    def shares(self, lengths: Array) -> Array:
        """The derivative of the margin by a token's log-probability, [P, 2]: +-1 (/ length)."""
        signs = jnp.broadcast_to(jnp.array([1.0, -1.0], lengths.dtype), lengths.shape)
        return signs / _at_least_1(lengths) if self.average else signs

    def nll_slopes(self, lengths: Array, constants: Constants, scale: float) -> Array:
        """`scale` times the derivative of each pair's NLL term by a chosen token, [P]."""
        weights = jnp.ones((), lengths.dtype) if constants.weights is None else constants.weights
        slope = -scale * self.nll_weight * weights.astype(lengths.dtype)
        return slope / _at_least_1(lengths[:, 0])

    def token_slopes(
        self, sums: Array, lengths: Array, constants: Constants, scale: float
    ) -> Array:
        """`scale` times the derivative of the loss by a token's log-probability, [P, 2]."""
        slopes = self.slopes(sums, lengths, constants, scale)[:, None] * self.shares(lengths)
        if self.nll_weight == 0.0:
            return slopes
        of_nll = self.nll_slopes(lengths, constants, scale)
        return jnp.stack([slopes[:, 0] + of_nll, slopes[:, 1]], axis=1)


def _at_least_1(lengths: Array) -> Array:
    return jnp.maximum(lengths, 1)
