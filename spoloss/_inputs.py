"""Layer 2: from the four log-probabilities of a batch of pairs to what a loss is evaluated at.

The four come in the order of DPO's reference code, which most trainers follow: policy chosen,
policy rejected, reference chosen, reference rejected.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from spoloss._arrays import check_positive, conform, detach, filled, is_number, namespace, per_pair
from spoloss.losses import MarginLoss, PairLoss, pairwise

LOGPS = (
    "policy_chosen_logps",
    "policy_rejected_logps",
    "reference_chosen_logps",
    "reference_rejected_logps",
)


def log_ratios(*logps: Any) -> tuple[Any, Any]:
    """log(pi / pi_ref) of the chosen and of the rejected completions, after all checks."""
    pc, pr, rc, rr = conform(LOGPS, logps, numbers_from=2)
    return pc - rc, pr - rr


def beta_for_gap(beta: Any, reward_gap: Any, logps: Any) -> Any:
    """The beta of each pair. A known gap moves the target to reward_gap / beta: beta is divided."""
    beta = per_pair("beta", beta, logps)
    if reward_gap is None:
        return beta
    beta = beta / per_pair("reward_gap", reward_gap, logps)
    if is_number(beta):
        check_positive("beta / reward_gap", beta)
    return beta


def value_of(loss: PairLoss, chosen: Any, rejected: Any, beta: Any) -> Any:
    """The value of each pair, from a loss that may be a user's own."""
    return _of_each_pair("value", loss, loss.value(chosen, rejected, beta), chosen)


def slopes_of(loss: PairLoss, chosen: Any, rejected: Any, beta: Any) -> tuple[Any, Any]:
    """The two slopes of each pair, from a loss that may be a user's own."""
    slopes = loss.slopes(chosen, rejected, beta)
    if not isinstance(slopes, tuple) or len(slopes) != 2:
        kind = type(slopes).__name__
        raise TypeError(f"slopes of {loss} must return a tuple of two arrays, got {kind}")
    of_chosen, of_rejected = (_of_each_pair("slopes", loss, slope, chosen) for slope in slopes)
    return of_chosen, of_rejected


def _of_each_pair(method: str, loss: PairLoss, found: Any, like: Any) -> Any:
    shape = getattr(found, "shape", None)
    if shape != like.shape:
        raise TypeError(
            f"{method} of {loss} must return arrays of shape {tuple(like.shape)}, "
            f"got {type(found).__name__} of shape {shape and tuple(shape)}"
        )
    return found


class Inputs(NamedTuple):
    """A loss, what it is evaluated at, and how the results are weighted."""

    loss: PairLoss
    chosen: Any
    rejected: Any
    beta: Any
    weights: Any
    """An array, or None for 1."""
    left_out: Any
    """Which pairs have weight 0 and a value or a derivative that is not finite."""

    def values(self) -> Any:
        """The loss of each pair, times the pair's weight."""
        return self._weigh(value_of(self.loss, self.chosen, self.rejected, self.beta))

    def slopes(self) -> Iterator[Any]:
        """The two slopes of each pair, times the pair's weight."""
        return map(self._weigh, slopes_of(self.loss, self.chosen, self.rejected, self.beta))

    def _weigh(self, numbers: Any) -> Any:
        if self.weights is None:
            return numbers
        return self.weights * namespace(numbers).where(self.left_out, 0.0, numbers)


def inputs(
    given: MarginLoss | PairLoss, logps: tuple[Any, ...], beta: Any, reward_gap: Any, weights: Any
) -> Inputs:
    """The log-ratios, beta and weight of each pair, with usual numbers for those left out.

    0 * inf and 0 * nan are nan, also in derivatives. A pair of weight 0 that is finite keeps its
    log-ratios, because the derivative with respect to its weight is its loss.
    """
    loss, ratios = pairwise(given), log_ratios(*logps)
    like = ratios[0]
    if weights is None:
        return Inputs(loss, *ratios, beta_for_gap(beta, reward_gap, like), None, None)
    xp = namespace(like)
    weights = per_pair("weights", weights, like, positive=False)
    if is_number(weights):
        weights = filled(like, weights)
    usable = _usable(loss, ratios, beta, reward_gap)
    left_out = xp.logical_and(weights == 0.0, xp.logical_not(usable))
    chosen, rejected, beta, reward_gap = (
        value if value is None or is_number(value) else xp.where(left_out, stand_in, value)
        for value, stand_in in zip((*ratios, beta, reward_gap), (-1.0, -1.0, 1.0, 1.0), strict=True)
    )
    return Inputs(loss, chosen, rejected, beta_for_gap(beta, reward_gap, like), weights, left_out)


def _usable(loss: PairLoss, ratios: tuple[Any, Any], beta: Any, reward_gap: Any) -> Any:
    """Which pairs have a finite value and finite derivatives."""
    like = ratios[0]
    beta = beta_for_gap(beta, reward_gap, like)
    steepness = beta if reward_gap is None else beta / per_pair("reward_gap", reward_gap, like)
    # Constants, because MLX differentiates isfinite, which multiplies 0 by inf.
    chosen, rejected, beta, steepness = (
        value if is_number(value) else detach(value) for value in (*ratios, beta, steepness)
    )
    slopes = slopes_of(loss, chosen, rejected, beta)
    terms = [chosen, rejected, value_of(loss, chosen, rejected, beta), *slopes]
    # The derivative with respect to beta, and the size of the second derivative of a loss of
    # x = beta * h.
    for slope in slopes:
        terms += [slope * ((chosen - rejected) / beta), slope * beta]
    terms += [number for number in (beta, steepness) if not is_number(number)]
    return functools.reduce(namespace(like).logical_and, map(namespace(like).isfinite, terms))
