"""What a call of the fused head is given: `Head` and `Completions`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch.distributed
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Head:
    """The head of a language model: how hidden states become logits.

        logits = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap) / temperature

    The computation runs over tiles of tokens, one block of the vocabulary at a time. On CUDA with
    Triton installed, torch.compile fuses the softmax of a block at the first call, which needs a C
    compiler. TORCH_COMPILE_DISABLE=1 disables compilation (slower).

    Attributes:
      weight: W, [V, D], in the dtype of the hidden states. Under DDP, FSDP and DeepSpeed, read it
        inside the forward of the wrapped module. Outside, its gradient is not synchronised, and no
        error is raised. It does not include a LoRA adapter on the head.
      bias: [V], or None. An entry of -inf has probability 0, also under a soft-cap.
      softcap: the model's final logit soft-capping (Gemma), > 0; None for none.
      logit_scale: factor of the logits, not 0 (Cohere; for Granite 1 / logits_scaling).
      temperature: divisor of the logits, > 0.
      chunk_size: tokens per tile; None for a size that fits the device. Without a gradient of the
        head, a tile has 1,024 tokens (on CUDA 4,096), and a block of its logits takes 16 MiB (on
        CUDA 512 MiB) but has at least 1,024 entries; with `softcap` twice that. With a gradient of
        the head, one pass keeps a tile's exponentials: 64 MiB (on CUDA 2 GiB), but at least 256
        tokens. On a GPU with less than 32 GiB a block is smaller in proportion, and with less
        than 16 GiB the exponentials. Without gradients, a block takes 32 MiB on CUDA.
      vocab_parallel_group: the ranks that share a head split over the vocabulary. `weight` and
        `bias` are then this rank's rows (for a DTensor: `to_local()`), in the order of the ranks,
        in shards of any size. All else and the upstream gradient must be equal on all ranks. The
        results are then equal too, and so is the gradient of the hidden states, which is summed
        over the ranks. Not under torch.compile(fullgraph=True).
    """

    weight: Tensor
    bias: Tensor | None = None
    _: KW_ONLY
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    chunk_size: int | None = None
    vocab_parallel_group: torch.distributed.ProcessGroup | None = None


@dataclass(frozen=True, eq=False)
class Completions:
    """The hidden states of completions, and which of their tokens count.

    Attributes:
      hidden: last hidden states, [B, T, D], real floating.
      labels: token ids, [B, T], integer. Labels equal to `ignore_index` (prompt, padding) do not
        count and cost nothing. Others must lie in [0, V).
      token_weights: the factor of each label's log-probability, [B, T], real floating, finite and
        >= 0; None for 1. They align with `labels` and are shifted with them. A label of weight 0
        does not count, whatever its hidden state holds, and the derivative with respect to its
        weight is 0. Averages and the NLL divide by their sum.
      cu_seqlens: offsets of S sequences that are packed into one row (B = 1) without padding,
        [S + 1], int32 or int64, rising from 0 to T; None if each row is a sequence. This is the
        format of FlashAttention's variable-length functions. The last token of a sequence does not
        predict the next sequence.
      ignore_index: the label that does not count.
      shift: True if position t predicts label t + 1, as in the batches of Transformers. False if
        you have shifted already, so position t predicts label t.
    """

    hidden: Tensor
    labels: Tensor
    _: KW_ONLY
    token_weights: Tensor | None = None
    cu_seqlens: Tensor | None = None
    ignore_index: int = -100
    shift: bool = True
