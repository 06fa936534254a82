"""SPO without padding: all sequences of a batch packed into one row, with offsets.

Tested with PyTorch 2.13 and Transformers 5.23. Its models separate the sequences by position ids
that restart at 0 (with any attention implementation, if you pass neither an attention mask nor a
cache). To change an existing padded loop: the collator, `position_ids`, and `cu_seqlens`. Pitfall:
without the offsets, each sequence's last token would be scored on the next sequence's first token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spoloss import spo_loss
from spoloss.torch import Completions, Head, head_of, linear_logps, sequence_logps

IGNORED = -100


class Row(NamedTuple):
    """All chosen, then all rejected sequences: three tensors [1, T], and offsets [S + 1]."""

    ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor


def pack(pairs: Sequence[tuple[list[int], list[int], list[int]]]) -> Row:
    """Pack (prompt, chosen, rejected) token ids into one row."""
    texts = [(prompt, chosen) for prompt, chosen, _ in pairs]
    texts += [(prompt, rejected) for prompt, _, rejected in pairs]
    lengths = torch.tensor([len(prompt) + len(completion) for prompt, completion in texts])
    labels = [[IGNORED] * len(prompt) + completion for prompt, completion in texts]
    return Row(
        torch.tensor([[token for prompt, completion in texts for token in prompt + completion]]),
        torch.tensor([[label for sequence in labels for label in sequence]]),
        torch.cat([torch.arange(length) for length in lengths])[None],
        torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
    )


def by_logits(model: Any, row: Row) -> Tensor:
    """The log-probabilities of a row's sequences, [S]."""
    logits = model(row.ids, position_ids=row.position_ids, use_cache=False).logits
    return sequence_logps(logits, row.labels, cu_seqlens=row.cu_seqlens)


def by_tiles(model: Any, head: Head, row: Row) -> Tensor:
    """The same from hidden states, without the logits. `head` is `head_of(model)`."""
    hidden = model.model(row.ids, position_ids=row.position_ids, use_cache=False).last_hidden_state
    return linear_logps(head, Completions(hidden, row.labels, cu_seqlens=row.cu_seqlens))


def mean_loss(
    policy: Callable[[Row], Tensor], reference: Callable[[Row], Tensor], row: Row, beta: float
) -> Tensor:
    """The mean loss of the pairs of a row. The models return its log-probabilities."""
    with torch.no_grad():
        ref_logps = reference(row)
    return spo_loss(*policy(row).chunk(2), *ref_logps.chunk(2), beta=beta)


if __name__ == "__main__":
    import toy

    models = toy.models()
    row = pack(toy.pairs(6))
    sides = [partial(by_tiles, model, head_of(model)) for model in models]
    toy.train(models[0], lambda: mean_loss(*sides, row, beta=0.025))
