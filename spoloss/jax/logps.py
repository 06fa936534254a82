"""Log-probabilities of sequences under a language model, in JAX."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
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
    """The log-probability of each labelled sequence: sum over tokens of log softmax(logits)[label].

    Half-precision logits are summed in float32. Nothing of the size of the logits is kept for the
    backward pass but the logits. Differentiable any number of times, forwards and backwards.

    Args:
      logits: the model's output, shape [B, T, V], real floating.
      labels: token ids, shape [B, T], integer. Those equal to `ignore_index` (prompt, padding) do
        not count, and their logits may hold nan. A label outside [0, V) makes its sequence nan.
      ignore_index: the label to leave out. Static under `jax.jit`.
      shift: position t predicts label t + 1, as Transformers lays them out. False: the caller has
        shifted already, and position t predicts label t. Static under `jax.jit`.
      average: divide each sum by the number of labels that count. Static under `jax.jit`.
      cu_seqlens: offsets of S sequences that lie one after another, without padding, in one row
        (B = 1), shape [S + 1], integer, rising from 0 to T, as FlashAttention takes them. No token
        predicts the first one of the next sequence. Offsets out of order give nan.

    Returns:
      Log-probabilities in nats, shape [B], or [S] with `cu_seqlens`; float32, or float64 if the
      logits are. A sequence without a label that counts is 0, and so is its gradient.

    Raises:
      TypeError: logits are not real floating, or labels or `cu_seqlens` not integer.
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

    The head works on tiles of tokens, and tokens whose label is ignored are never worked on. With a
    gradient by the head each tile is computed again in the backward pass; with a frozen head the
    forward pass makes the gradient by the hidden states and the backward pass only scales it. For a
    loss of the margin `linear_pair_loss` needs no second computation in either case.

    Args:
      hidden: last hidden states, shape [B, T, D], real floating.
      weight: the head's weight, shape [V, D], in the dtype of `hidden`. Flax keeps a kernel [D, V]:
        pass `kernel.T`. For padding rows of the vocabulary pass a bias that is -inf there.
      labels: token ids, shape [B, T], integer. Those equal to `ignore_index` (prompt, padding) do
        not count, and their hidden states may hold nan. A label outside [0, V) makes its sequence
        nan.
      bias: the head's bias, shape [V].
      ignore_index: the label to leave out. Static under `jax.jit`.
      shift: position t predicts label t + 1, as Transformers lays them out. False: the caller has
        shifted already, and position t predicts label t. Static under `jax.jit`.
      average: divide each sum by the number of labels that count. Static under `jax.jit`.
      softcap: the model's final logit soft-capping (Gemma), > 0; None is no capping. A number.
      logit_scale: factor of the logits (Cohere; for Granite 1 / logits_scaling), not 0. A number.
      temperature: divisor of the logits, > 0. A number.
      chunk_size: the most tokens of a tile. None for 64 MiB of float32 logits on a CPU and 1 GiB on
        other devices, but at least 256 tokens.
      per_token: return the log-probability of every token instead of their sums.
      cu_seqlens: offsets of S sequences that lie one after another, without padding, in one row
        (B = 1), shape [S + 1], integer, rising from 0 to T, as FlashAttention takes them. No token
        predicts the first one of the next sequence. Offsets out of order give nan.
      mesh: the devices over which the arrays are split; None for one device. With a mesh the
        computation runs under `jax.shard_map` and gathers neither hidden states nor weight.
      batch_axis: the mesh axis or axes over which the sequences are split: B must be a multiple of
        their size.
      vocab_axis: the mesh axis or axes over which the rows of `weight` and `bias` are split: V must
        be a multiple of their size.

    Returns:
      Log-probabilities in nats, shape [B], or [S] with `cu_seqlens`, at least float32; a sequence
      without a label that counts is 0. With `per_token` shape [B, T], where position t is that of
      the label which it predicts, and 0 where that is ignored. Differentiable once by reverse mode.

    Raises:
      TypeError: an array is not a JAX array or has a dtype that does not fit, or an option is not a
        number.
      ValueError: a shape or a number does not fit, `average` comes with `per_token`, or mesh and
        axes do not go together.
    """
    if average and per_token:
        raise ValueError("average divides a sequence's sum: it does not go with per_token")
    check_head_options(softcap, logit_scale, temperature, chunk_size)
    check_head(weight, bias)
    side = check_labels("", hidden, labels, cu_seqlens, weight)
    split = make_split(mesh, batch_axis, vocab_axis, weight, side)
    head = HeadOptions(softcap, logit_scale, temperature, chunk_size, split.words_axis)
    reading = Reading(int(ignore_index), bool(shift))
    logps = token_logps(TokenCall(head, reading, split), hidden, weight, bias, side)
    return logps if per_token else _sum_tokens(logps, side, reading, average=average)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.checkpoint, static_argnums=0)  # keeps the logits and no softmax of them
def _token_logps(reading: Reading, logits: Array, labels: Labels) -> Array:
    """Log softmax(logits)[target] of each token [B, T], 0 where it does not count."""
    targets, counts = labels.targets(reading)
    # A row that does not count may hold nan (padding), and 0 * nan in its gradient is not 0.
    logits = jnp.where(counts[..., None], logits, 0.0).astype(wide(logits))
    inside = (targets >= 0) & (targets < logits.shape[2])
    column = jnp.where(inside, targets, 0)[..., None]
    found = jnp.take_along_axis(logits, column, axis=2)[..., 0]
    logps = jnp.where(inside, found, jnp.nan) - jax.nn.logsumexp(logits, axis=2)
    return jnp.where(counts, logps, labels.zero(logps.dtype))


def _sum_tokens(logps: Array, labels: Labels, reading: Reading, *, average: bool) -> Array:
    """Sums over sequences, or averages in which a sequence without a token is 0."""
    # An empty sequence must be nan too if the offsets are out of order.
    total = labels.sum(logps) + labels.zero(logps.dtype)
    if not average:
        return total
    return total / jnp.maximum(labels.sum(labels.targets(reading)[1]), 1)
