"""Log-probabilities of sequences under a language model, from its logits or its hidden states."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from spoloss._checks import check_floating, check_tokens
from spoloss._options import check_flag
from spoloss.jax._arguments import Completions, Head
from spoloss.jax._checks import prepare
from spoloss.jax._labels import Sequences, sequences_of
from spoloss.jax._recompute import token_logps
from spoloss.jax._softmax import wide


def sequence_logps(
    logits: Array,
    labels: Array,
    *,
    token_weights: Array | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    average: bool = False,
    cu_seqlens: Array | None = None,
) -> Array:
    """The log-probability of each sequence: the sum over its tokens of log softmax(logits)[label].

        log pi(y|x) = sum_t w_t * log softmax(logits_t)[label_t]

    Half-precision logits are summed in float32. The backward pass keeps the logits and no other
    array of that size. You can differentiate any number of times, in forward and reverse mode.

    Under `jax.jit`, `ignore_index`, `shift` and `average` are static.

    Args:
      logits: the model's output, shape [B, T, V], real floating.
      labels: token ids, shape [B, T], of any integer dtype. Labels equal to `ignore_index` (prompt,
        padding) do not count, and their logits may be nan. A label outside [0, V) makes its
        sequence nan.
      token_weights: w, the factor of each label's log-probability, shape [B, T], real floating,
        finite and >= 0; None for 1. They align with `labels` and are shifted with them. A label of
        weight 0 does not count, whatever its logits are. A weight that is negative or not finite
        makes its sequence nan.
      ignore_index: the label that does not count.
      shift: True if position t predicts label t + 1, as in the batches of Transformers. False if
        you have shifted already, so position t predicts label t.
      average: divide each sum by the number of labels that count, or by the sum of their weights.
      cu_seqlens: offsets of S sequences that are packed into one row (B = 1) without padding, shape
        [S + 1], of any integer dtype, rising from 0 to T. This is the format of FlashAttention's
        variable-length functions. The last token of a sequence does not predict the next sequence.
        Offsets out of order give nan.

    Returns:
      Log-probabilities in nats, shape [B], or [S] with `cu_seqlens`; float32, or float64 if the
      logits are float64. A sequence without a label that counts has log-probability 0 and gradient
      0.

    Raises:
      TypeError: `logits` or `token_weights` are not real floating, `labels` or `cu_seqlens` are not
        integer, an argument is not a JAX array, or an option has another type.
      ValueError: a shape does not fit.
    """
    check_floating(jnp, "logits", logits)
    if logits.ndim != 3:
        raise ValueError(f"logits must have shape [B, T, V], got {logits.shape}")
    check_flag("average", average)
    tokens = Completions(
        logits,
        labels,
        token_weights=token_weights,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        shift=shift,
    )
    check_tokens(jnp, "", tokens, "logits")
    logps: Array = _sequence_logps(bool(average), tokens)
    return logps


def linear_logps(
    head: Head, completions: Completions, *, average: bool = False, per_token: bool = False
) -> Array:
    """`sequence_logps` from hidden states, without ever holding the logits.

        log pi(y|x) = sum_t w_t * log softmax(logits_t)[label_t]

    With N the tokens that count, a call takes 4NDV FLOPs if the head is not differentiated: the
    forward keeps each token's direction, the derivative of its log-probability with respect to its
    hidden state, an array like the hidden states, and the backward scales it. So any loss of the
    log-probabilities takes two products. With a head that is differentiated, the backward computes
    the logits again: 8NDV. Without differentiation, as for a reference, it takes 2NDV. Tokens whose
    labels do not count cost nothing.

    Under `jax.jit`, `average` and `per_token` are static.

    Args:
      head: how hidden states become logits.
      completions: hidden states, and which of their tokens count.
      average: divide each sum by the number of labels that count, or by the sum of their weights.
      per_token: return the weighted log-probability of every token instead of their sums.

    Returns:
      Log-probabilities in nats, shape [B], or [S] with `completions.cu_seqlens`, at least float32.
      A sequence without a label that counts is 0. With `per_token` the shape is [B, T]. Position t
      has the log-probability of the label that it predicts, or 0 if that label does not count.
      Differentiable once in reverse mode with respect to hidden states, weight and bias, and with
      respect to `token_weights`.

    Raises:
      TypeError: a dtype does not fit, an option has another type, or an argument is not a JAX
        array.
      ValueError: a shape or a number does not fit, `average` and `per_token` are both given, or the
        mesh, its axes and the arrays do not fit together.
    """
    check_flag("average", average)
    check_flag("per_token", per_token)
    if average and per_token:
        raise ValueError("average and per_token exclude each other: average divides a sum")
    prepare(head, {"completions": completions})
    logps: Array = _linear_logps(bool(average), bool(per_token), head, completions)
    return logps


@functools.partial(jax.jit, static_argnums=(0, 1))
def _linear_logps(average: bool, per_token: bool, head: Head, completions: Completions) -> Array:
    side = sequences_of(completions)
    (logps,) = token_logps(head, (completions.hidden,), (side,))
    return side.weighted(logps) if per_token else side.sums(logps, average=average)


@functools.partial(jax.jit, static_argnums=0)
def _sequence_logps(average: bool, tokens: Completions) -> Array:
    side = sequences_of(tokens)
    return side.sums(_token_logps(tokens.hidden, side), average=average)


@jax.checkpoint  # keeps the logits but not their softmax
def _token_logps(logits: Array, side: Sequences) -> Array:
    """Log softmax(logits)[target] of each token [B, T], 0 for tokens that do not count."""
    # A row that does not count may be nan (padding), and 0 * nan in its gradient is nan.
    logits = jnp.where(side.counts[..., None], logits, 0.0).astype(wide(logits))
    inside = (side.targets >= 0) & (side.targets < logits.shape[2])
    column = jnp.where(inside, side.targets, 0)[..., None]
    # Differences first: the log-sum-exp of large logits has no digits left for the sum.
    logits = logits - lax.stop_gradient(logits.max(axis=2, keepdims=True))
    found = jnp.take_along_axis(logits, column, axis=2)[..., 0]
    logps = jnp.where(inside, found, jnp.nan) - jnp.log(jnp.exp(logits).sum(axis=2))
    return jnp.where(side.counts, logps, side.zero(logps.dtype))
