"""The loss of a batch of pairs as a function of their log-probabilities, with its slopes.

This file contains no loss formula. Values come from `pair_loss`, and slopes from `pair_grad`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spoloss._arrays import is_number, reduce, reduction_scale
from spoloss.gradients import pair_grad
from spoloss.losses import MarginLoss
from spoloss.pairs import pair_loss
from spoloss.torch._tokens import Tokens


@dataclass(frozen=True)
class Objective:
    """loss(h) * weight + nll_weight * NLL * weight, reduced over the pairs.

    Attributes:
      loss: the loss of the margin.
      reference_chosen: log pi_ref(y_w|x): a number or [P], nats.
      reference_rejected: log pi_ref(y_l|x): a number or [P], nats.
      beta: a number, 0-d or [P].
      weights: None, a number, 0-d or [P].
      nll_weight: factor of the chosen sequences' negative log-likelihood per token.
      reduction: "mean", "sum" or "none".
      average: whether log-probabilities are averages over tokens.
      lengths: the number of tokens of each side and pair, [2, P].
    """

    loss: MarginLoss
    reference_chosen: Any
    reference_rejected: Any
    beta: Any
    weights: Any
    nll_weight: float
    reduction: str
    average: bool
    lengths: Tensor

    def logps(self, sums: Tensor) -> Tensor:
        """Sequence log-probabilities from their sums over tokens; both [2, P]."""
        return sums / self.lengths.clamp(min=1) if self.average else sums

    def value(self, logps: Tensor) -> Tensor:
        """The reduced loss from the log-probabilities of all sequences, [2, P]."""
        chosen, rejected = logps
        value: Tensor = pair_loss(
            self.loss,
            chosen,
            rejected,
            self.reference_chosen,
            self.reference_rejected,
            beta=self.beta,
            weights=self.weights,
            reduction=self.reduction,
        )
        if self.nll_weight == 0.0:
            return value
        nll = self._nll_per_logp(chosen.dtype) * chosen
        left_out = zero_weights(self.weights, chosen)
        if left_out is not None:
            # 0 times a log-probability of -inf is nan.
            nll = torch.where(left_out, 0.0, nll)
        total: Tensor = value + reduce(nll, self.reduction)
        return total

    def slopes(self, sums: Tensor, pairs: slice) -> Tensor:
        """The factor of each side's unit direction in the gradient of the loss, [2, p].

        The unit direction of a side is the derivative of the margin by its tokens. Both sides get
        the slope of the loss. The chosen side also gets the NLL term.

        Args:
          sums: sums over tokens for all pairs, [2, P]. Those of `pairs` must be complete.
          pairs: the p pairs.
        """
        logps = self.logps(sums)
        grad = pair_grad(
            self.loss,
            logps[0, pairs],
            logps[1, pairs],
            _of_pairs(self.reference_chosen, pairs),
            _of_pairs(self.reference_rejected, pairs),
            beta=_of_pairs(self.beta, pairs),
            weights=_of_pairs(self.weights, pairs),
            reduction="sum",
        )
        slope = grad.policy_chosen * reduction_scale(sums[0], self.reduction)
        slope = slope.to(sums.dtype)
        return torch.stack([slope + self.nll_slopes(sums.dtype)[pairs], slope])

    def token_slopes(self, sums: Tensor, pairs: slice, tokens: Tokens) -> Tensor:
        """The derivative of the loss by the log-probability of each token of some pairs, [n]."""
        slopes = self.slopes(sums, pairs) * self._unit_slopes(sums.dtype)[:, pairs]
        return slopes[tokens.side, tokens.pair - pairs.start]

    def unit_token_slopes(self, tokens: Tokens, dtype: torch.dtype) -> Tensor:
        """The derivative of the margin by the log-probability of each token, [n]."""
        return self._unit_slopes(dtype)[tokens.side, tokens.pair]

    def nll_slopes(self, dtype: torch.dtype) -> Tensor:
        """The factor of each pair's chosen unit direction in the NLL term alone, [P]."""
        per_logp = self._nll_per_logp(dtype)
        return per_logp * reduction_scale(per_logp, self.reduction)

    def _nll_per_logp(self, dtype: torch.dtype) -> Tensor:
        """The derivative of each pair's weighted NLL by its chosen log-probability, [P]."""
        lengths = self.lengths[0].clamp(min=1).to(dtype)
        per_logp = -self.nll_weight / (torch.ones_like(lengths) if self.average else lengths)
        return per_logp if self.weights is None else (per_logp * self.weights).to(dtype)

    def _unit_slopes(self, dtype: torch.dtype) -> Tensor:
        """The derivative of the margin by the log-probability of one token, [2, P]."""
        lengths = self.lengths.clamp(min=1).to(dtype)
        chosen, rejected = lengths.reciprocal() if self.average else torch.ones_like(lengths)
        return torch.stack([chosen, -rejected])


def zero_weights(weights: Tensor | float | None, like: Tensor) -> Tensor | None:
    """Which pairs have weight 0, as booleans of the shape of `like`, or None if none can."""
    if weights is None or (is_number(weights) and weights != 0.0):
        return None
    return torch.as_tensor(weights, device=like.device).expand(like.shape) == 0.0


def _of_pairs(value: Any, pairs: slice) -> Any:
    """The part of a parameter for some pairs. It is a number, 0-d, or one value per pair."""
    return value[pairs] if isinstance(value, Tensor) and value.ndim else value
