"""What the loss is of, besides the policy's log-probabilities.

    loss = l(h) + nll_weight * NLL,    NLL = -log pi(y_w|x) / (number of its tokens)

No formula of a loss is in this file: the value comes from `pair_loss`, the slope from `pair_grad`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from spoloss._arrays import reduce
from spoloss.gradients import reduced_grad
from spoloss.losses import MarginLoss
from spoloss.pairs import reduced_loss, weighted


class Constants(NamedTuple):
    """What is given per pair: shape [P], or 0-d for all; differentiable.

    Attributes:
      reference_chosen: nats, [P].
      reference_rejected: nats, [P].
      beta: 1 / nats, [P] or 0-d.
      reward_gap: [P] or 0-d, or None for a loss that takes none.
      weights: [P] or 0-d, or None for 1.
    """

    reference_chosen: Array
    reference_rejected: Array
    beta: Array
    reward_gap: Array | None
    weights: Array | None

    def alive(self, lengths: Array) -> Array:
        """Whether a pair has any gradient, for both of its sides: [P, 2], as `lengths`."""
        alive = jnp.bool_(True) if self.weights is None else (self.weights != 0.0)[..., None]
        return jnp.broadcast_to(alive, lengths.shape)


@dataclass(frozen=True)
class Objective:
    """A loss of the margin and what surrounds it. Static under `jax.jit`."""

    loss: MarginLoss
    nll_weight: float
    average: bool
    reduction: str

    def logps(self, sums: Array, lengths: Array) -> Array:
        """Log-probabilities [P, 2] from sums over tokens; averages if that is what is asked."""
        return sums / _at_least_1(lengths) if self.average else sums

    def value(self, sums: Array, lengths: Array, constants: Constants) -> Array:
        """The loss, reduced."""
        chosen, rejected = self.logps(sums, lengths).T
        value: Array = reduced_loss(
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
        nll: Array = weighted(lambda logp, _: -logp, per_token, 1.0, None, constants.weights)
        total: Array = value + self.nll_weight * reduce(nll, self.reduction)
        return total

    def slopes(self, sums: Array, lengths: Array, constants: Constants, scale: float) -> Array:
        """`scale` times the derivative of each pair's loss by its margin, [P], without the NLL."""
        chosen, rejected = self.logps(sums, lengths).T
        slopes: Array = reduced_grad(
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
        """D margin / d log-probability of a token, [P, 2]: +-1, or +-1 / length of an average."""
        signs = jnp.array([1.0, -1.0], lengths.dtype)
        return (
            signs / _at_least_1(lengths) if self.average else jnp.broadcast_to(signs, lengths.shape)
        )

    def nll_slopes(self, lengths: Array, constants: Constants, scale: float) -> Array:
        """`scale` times the derivative of each pair's NLL term by a chosen token, [P]."""
        weights = jnp.ones((), lengths.dtype) if constants.weights is None else constants.weights
        slope = -scale * self.nll_weight * weights.astype(lengths.dtype)
        return slope / _at_least_1(lengths[:, 0])

    def token_slopes(
        self, sums: Array, lengths: Array, constants: Constants, scale: float
    ) -> Array:
        """`scale` times d loss / d log-probability of a token, by pair and side, [P, 2]."""
        slopes = self.slopes(sums, lengths, constants, scale)[:, None] * self.shares(lengths)
        if self.nll_weight == 0.0:
            return slopes
        return slopes.at[:, 0].add(self.nll_slopes(lengths, constants, scale))


def _at_least_1(lengths: Array) -> Array:
    return jnp.maximum(lengths, 1)
