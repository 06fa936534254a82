"""SPO without padding: all sequences of a batch packed into one row, with offsets.

Tested with PyTorch 2.13 and Transformers 5.23. Its models separate the sequences by position ids
that restart at 0 (with any attention implementation, if you pass neither an attention mask nor a
cache). To change an existing padded loop: the collator, `position_ids`, and `cu_seqlens`. Pitfall:
without the offsets, each sequence's last token would be scored on the next sequence's first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spoloss import spo_loss
from spoloss.torch import linear_logps, sequence_logps

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
    lengths = torch.tensor([len(prompt) + len(answer) for prompt, answer in texts])
    return Row(
        torch.tensor([[token for prompt, answer in texts for token in prompt + answer]]),
        torch.tensor([[x for prompt, answer in texts for x in [IGNORED] * len(prompt) + answer]]),
        torch.cat([torch.arange(length) for length in lengths])[None],
        torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
    )


def loss_by_logits(policy: Any, reference: Any, row: Row, beta: float = 0.1) -> Tensor:
    """The mean loss of the pairs of a row."""
    ids, labels, position_ids, cu_seqlens = row

    def logps(model: Any) -> Tensor:
        logits = model(ids, position_ids=position_ids, use_cache=False).logits
        return sequence_logps(logits, labels, cu_seqlens=cu_seqlens)

    with torch.no_grad():
        ref_logps = logps(reference)
    return spo_loss(*logps(policy).chunk(2), *ref_logps.chunk(2), beta=beta)


def loss_by_tiles(policy: Any, reference: Any, row: Row, beta: float = 0.1) -> Tensor:
    """The same from hidden states, without the logits."""
    ids, labels, position_ids, cu_seqlens = row

    def logps(model: Any) -> Tensor:
        hidden = model.model(ids, position_ids=position_ids, use_cache=False).last_hidden_state
        return linear_logps(hidden, model.lm_head.weight, labels, cu_seqlens=cu_seqlens)

    with torch.no_grad():
        ref_logps = logps(reference)
    return spo_loss(*logps(policy).chunk(2), *ref_logps.chunk(2), beta=beta)


if __name__ == "__main__":
    import toy

    policy, reference = toy.models()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    row = pack(toy.pairs(6))
    for loss_of in (loss_by_logits, loss_by_tiles):
        for _ in range(3):
            loss = loss_of(policy, reference, row)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(loss_of.__name__, loss.item())
