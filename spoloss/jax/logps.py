"""Log-probabilities of sequences under a language model, in JAX."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

from spoloss._options import check_head_options
from spoloss.jax._checks import check_floating, check_head, check_labels, make_split, sequences
from spoloss.jax._labels import Labels, Reading
from spoloss.jax._mesh import Axis
from spoloss.jax._recompute import TokenCall, token_logps
from spoloss.jax._softmax import HeadOptions, wide


def sequence_logps(
    logits: Array,
    labels: Array,
    *,
    ignore_index: int = -100,
    shift: bool = True,
    average: bool = False,
    cu_seqlens: Array | None = None,
) -> Array:
    """The log-probability of each sequence: the sum over its tokens of log softmax(logits)[label].

    Half-precision logits are summed in float32. The backward pass keeps the logits and no other
    array of that size. You can differentiate any number of times, in forward and reverse mode.

    Args:
      logits: the model's output, shape [B, T, V], real floating.
      labels: token ids, shape [B, T], integer. Labels equal to `ignore_index` (prompt, padding) do
        not count, and their logits may be nan. A label outside [0, V) makes its sequence nan.
      ignore_index: the label to leave out. Static under `jax.jit`.
      shift: True if position t predicts label t + 1, as in the batches of Transformers. False if
        you have shifted already, so position t predicts label t. Static under `jax.jit`.
      average: divide each sum by the number of labels that count. Static under `jax.jit`.
      cu_seqlens: offsets of S sequences that are packed into one row (B = 1) without padding, shape
        [S + 1], integer, rising from 0 to T, as in FlashAttention. The last token of a sequence
        does not predict the next sequence. Offsets out of order give nan.

    Returns:
      Log-probabilities in nats, shape [B], or [S] with `cu_seqlens`; float32, or float64 if the
      logits are float64. A sequence without a label that counts is 0, and so is its gradient.

    Raises:
      TypeError: logits are not real floating, or labels or `cu_seqlens` are not integer.
      ValueError: a shape does not fit.
    """
    check_floating("logits", logits)
    if logits.ndim != 3:
        raise ValueError(f"logits must have shape [B, T, V], got {logits.shape}")
    side = sequences("", labels, cu_seqlens, logits)
    reading = Reading(int(ignore_index), bool(shift))
    return _sum_tokens(_token_logps(reading, logits, side), side, reading, average=average)


def linear_logps(
    hidden: Array,
    weight: Array,
    labels: Array,
    *,
    bias: Array | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    average: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    per_token: bool = False,
    cu_seqlens: Array | None = None,
    mesh: Mesh | None = None,
    batch_axis: Axis = None,
    vocab_axis: Axis = None,
) -> Array:
    """Log-probabilities of sequences from hidden states, without ever holding all logits.

        logits = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap) / temperature

    The computation runs over tiles of tokens. Tokens with ignored labels cost nothing. For the
    gradient by the head, the backward pass computes each tile again. With a frozen head, the
    forward pass computes the gradient by the hidden states, and the backward pass only scales it.
    For a loss of the margin, `linear_pair_loss` computes each tile only once in both cases.

    Args:
      hidden: last hidden states, shape [B, T, D], real floating.
      weight: the head's weight, shape [V, D], in the dtype of `hidden`. For a Flax kernel [D, V],
        pass `kernel.T`. If some rows are padding, pass a bias that is -inf there.
      labels: token ids, shape [B, T], integer. Labels equal to `ignore_index` (prompt, padding) do
        not count, and their hidden states may be nan. A label outside [0, V) makes its sequence
        nan.
      bias: the head's bias, shape [V].
      ignore_index: the label to leave out. Static under `jax.jit`.
      shift: True if position t predicts label t + 1, as in the batches of Transformers. False if
        you have shifted already, so position t predicts label t. Static under `jax.jit`.
      average: divide each sum by the number of labels that count. Static under `jax.jit`.
      softcap: the model's final logit soft-capping (Gemma), a number > 0; None for none.
      logit_scale: factor of the logits (Cohere; for Granite 1 / logits_scaling), a number, not 0.
      temperature: divisor of the logits, a number > 0.
      chunk_size: the largest number of tokens per tile. None for 64 MiB of float32 logits on a CPU
        and 1 GiB on other devices, but at least 256 tokens.
      per_token: return the log-probability of every token instead of their sums.
      cu_seqlens: offsets of S sequences that are packed into one row (B = 1) without padding, shape
        [S + 1], integer, rising from 0 to T, as in FlashAttention. The last token of a sequence
        does not predict the next sequence. Offsets out of order give nan.
      mesh: the devices that share the work, or None for one device. With a mesh, the computation
        runs under `jax.shard_map`, which gathers neither the hidden states nor the weight.
      batch_axis: the mesh axis, or axes, over which the sequences are split. B must be a multiple
        of their size.
      vocab_axis: the mesh axis, or axes, over which the rows of `weight` and `bias` are split. V
        must be a multiple of their size.

    Returns:
      Log-probabilities in nats, shape [B], or [S] with `cu_seqlens`, at least float32. A sequence
      without a label that counts is 0. With `per_token` the shape is [B, T]. Position t has the
      log-probability of the label that it predicts, or 0 if that label is ignored. Differentiable
      once by reverse mode.

    Raises:
      TypeError: an argument is not a JAX array, a dtype does not fit, or an option is not a number.
      ValueError: a shape or a number does not fit, `average` and `per_token` are both given, or
        `mesh` and the axes do not fit together.
    """
    if average and per_token:
        raise ValueError("average and per_token exclude each other: average divides a sum")
    check_head_options(softcap, logit_scale, temperature, chunk_size)
    check_head(weight, bias)
    side = check_labels("", hidden, labels, cu_seqlens, weight)
    split = make_split(mesh, batch_axis, vocab_axis, weight, side)
    head = HeadOptions(softcap, logit_scale, temperature, chunk_size, split.words_axis)
    reading = Reading(int(ignore_index), bool(shift))
    logps = token_logps(TokenCall(head, reading, split), hidden, weight, bias, side)
    return logps if per_token else _sum_tokens(logps, side, reading, average=average)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.checkpoint, static_argnums=0)  # keeps the logits but not their softmax
def _token_logps(reading: Reading, logits: Array, labels: Labels) -> Array:
    """Log softmax(logits)[target] of each token [B, T], 0 for tokens that do not count."""
    targets, counts = labels.targets(reading)
    # A row that does not count may be nan (padding), and 0 * nan in its gradient is nan.
    logits = jnp.where(counts[..., None], logits, 0.0).astype(wide(logits))
    inside = (targets >= 0) & (targets < logits.shape[2])
    column = jnp.where(inside, targets, 0)[..., None]
    # Differences first: the log-sum-exp of large logits has no digits left for the sum.
    logits = logits - lax.stop_gradient(logits.max(axis=2, keepdims=True))
    found = jnp.take_along_axis(logits, column, axis=2)[..., 0]
    logps = jnp.where(inside, found, jnp.nan) - jnp.log(jnp.exp(logits).sum(axis=2))
    return jnp.where(counts, logps, labels.zero(logps.dtype))


def _sum_tokens(logps: Array, labels: Labels, reading: Reading, *, average: bool) -> Array:
    """Sums over sequences, or averages. A sequence without tokens is 0."""
    # If the offsets are out of order, an empty sequence must be nan too.
    total = labels.sum(logps) + labels.zero(logps.dtype)
    if not average:
        return total
    lengths = labels.sum(labels.targets(reading)[1]).astype(total.dtype)
    return total / jnp.maximum(lengths, 1)
