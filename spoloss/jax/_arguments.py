"""What a call of the fused head is given: `Head` and `Completions`."""

from __future__ import annotations

from dataclasses import KW_ONLY, MISSING, dataclass, field
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh

Axis = str | tuple[str, ...] | None
"""The name of a mesh axis, or the names of several, or none."""


def static(default: Any = MISSING) -> Any:
    """A dataclass field that is static under `jax.jit`, and no child of the pytree."""
    return field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Head:
    """The head of a language model: how hidden states become logits.

        logits = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap) / temperature

    A pytree of `weight` and `bias`: you can pass it to `jax.jit` and `jax.vmap`, and differentiate
    with respect to it. All other fields are static. The computation runs over tiles of tokens.

    Attributes:
      weight: W, [V, D], in the dtype of the hidden states. For a Flax kernel [D, V], pass
        `kernel.T`.
      bias: [V], in the dtype of `weight`, or None. An entry of -inf has probability 0, also under a
        soft-cap: pass it for rows of `weight` that are padding.
      softcap: the model's final logit soft-capping (Gemma), > 0; None for none.
      logit_scale: factor of the logits, not 0 (Cohere; for Granite 1 / logits_scaling).
      temperature: divisor of the logits, > 0.
      chunk_size: the largest number of tokens per tile. None for 64 MiB of float32 logits on a CPU
        and 1 GiB on other devices, but at least 256 tokens.
      mesh: the devices that share the work; None for one device. With a mesh, the computation runs
        under `jax.shard_map`, which gathers neither the hidden states nor the weight.
      batch_axis: the mesh axis, or axes, over which the completions are split. It must divide their
        number.
      vocab_axis: the mesh axis, or axes, over which the rows of `weight` and `bias` are split. It
        must divide V.
    """

    weight: Array
    bias: Array | None = None
    _: KW_ONLY
    softcap: float | None = static(None)
    logit_scale: float = static(1.0)
    temperature: float = static(1.0)
    chunk_size: int | None = static(None)
    mesh: Mesh | None = static(None)
    batch_axis: Axis = static(None)
    vocab_axis: Axis = static(None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Completions:
    """The hidden states of completions, and which of their tokens count.

    A pytree of its arrays: you can pass it to `jax.jit` and `jax.vmap`. `ignore_index` and `shift`
    are static.

    Attributes:
      hidden: last hidden states, [B, T, D], real floating.
      labels: token ids, [B, T], of any integer dtype. Labels equal to `ignore_index` (prompt,
        padding) do not count and cost nothing, and their hidden states may be nan. A label outside
        [0, V) makes the log-probability of its sequence nan.
      token_weights: the factor of each label's log-probability, [B, T], real floating, finite and
        >= 0; None for 1. They align with `labels` and are shifted with them. A label of weight 0
        does not count, whatever its hidden state holds, and the derivative with respect to its
        weight is 0. Averages and the NLL divide by their sum. A weight that is negative or not
        finite makes its sequence nan.
      cu_seqlens: offsets of S sequences that are packed into one row (B = 1) without padding,
        [S + 1], of any integer dtype, rising from 0 to T; None if each row is a sequence. This is
        the format of FlashAttention's variable-length functions. The last token of a sequence does
        not predict the next sequence. Offsets out of order give nan.
      ignore_index: the label that does not count.
      shift: True if position t predicts label t + 1, as in the batches of Transformers. False if
        you have shifted already, so position t predicts label t.
    """

    hidden: Array
    labels: Array
    _: KW_ONLY
    token_weights: Array | None = None
    cu_seqlens: Array | None = None
    ignore_index: int = static(-100)
    shift: bool = static(True)
