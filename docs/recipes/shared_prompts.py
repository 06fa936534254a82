"""SPO where both completions of a pair share their prompt, which the model reads once.

    [prompt | chosen | rejected]   in one row, for each pair

Tested with PyTorch 2.13 and Transformers 5.23. A token attends to its own completion and to the
prompt (an attention mask of four dimensions; FlashAttention does not accept one), and the positions
of both completions continue the prompt's. The last token of the prompt predicts the first token of
both, so its hidden state belongs to both: the hidden states are gathered first, and
`shift=False` says that position t already predicts label t. With prompts much longer than
completions this halves the work of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spoloss import SPO
from spoloss.torch import Completions, Head, head_of, linear_logps, linear_pair_loss


class Side(NamedTuple):
    """One completion of every pair: where its predictions are in the row, and what they predict."""

    rows: Tensor
    labels: Tensor
    cu_seqlens: Tensor


class Row(NamedTuple):
    """All pairs in one row of T tokens, with a mask [1, 1, T, T]."""

    ids: Tensor
    position_ids: Tensor
    mask: Tensor
    chosen: Side
    rejected: Side


def pack(pairs: Sequence[tuple[list[int], list[int], list[int]]]) -> Row:
    """Pack (prompt, chosen, rejected) token ids into one row."""
    ids: list[int] = []
    positions: list[int] = []
    kinds: list[tuple[int, int]] = []  # of a token: its pair, and 0 in the prompt, 1 or 2 after it
    rows: tuple[list[int], list[int]] = ([], [])
    for number, (prompt, *completions) in enumerate(pairs):
        last = len(ids) + len(prompt) - 1
        for kind, part in enumerate((prompt, *completions)):
            if kind > 0:
                # The last token of the prompt predicts the first one; each predicts the next.
                rows[kind - 1].extend([last, *range(len(ids), len(ids) + len(part) - 1)])
            start = 0 if kind == 0 else len(prompt)
            positions += range(start, start + len(part))
            kinds += [(number, kind)] * len(part)
            ids += part
    chosen, rejected = (_side(rows[k], [pair[k + 1] for pair in pairs]) for k in range(2))
    return Row(torch.tensor([ids]), torch.tensor([positions]), _mask(kinds), chosen, rejected)


def _side(rows: list[int], completions: list[list[int]]) -> Side:
    lengths = torch.tensor([len(tokens) for tokens in completions])
    labels = torch.tensor([[token for tokens in completions for token in tokens]])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return Side(torch.tensor(rows), labels, offsets)


def _mask(kinds: list[tuple[int, int]]) -> Tensor:
    """0 where a token attends, and the lowest number elsewhere: not later, and not across."""
    number, kind = torch.tensor(kinds).T
    same_pair = number[:, None] == number
    in_reach = (kind[:, None] == kind) | (kind == 0)
    attends = (same_pair & in_reach).tril()
    return torch.where(attends, 0.0, torch.finfo(torch.float32).min)[None, None]


def completions(model: Any, row: Row) -> tuple[Completions, Completions]:
    """The hidden states that predict the chosen and the rejected completions."""
    hidden = model.model(
        row.ids,
        attention_mask=row.mask.to(model.dtype),
        position_ids=row.position_ids,
        use_cache=False,
    ).last_hidden_state
    chosen, rejected = (
        Completions(hidden[:, side.rows], side.labels, cu_seqlens=side.cu_seqlens, shift=False)
        for side in (row.chosen, row.rejected)
    )
    return chosen, rejected


def mean_loss(
    policy: Any, reference: Any, heads: tuple[Head, Head], row: Row, beta: float
) -> Tensor:
    """The mean loss of the pairs of a row."""
    with torch.no_grad():
        references = [linear_logps(heads[1], side) for side in completions(reference, row)]
    return linear_pair_loss(SPO(), heads[0], *completions(policy, row), *references, beta=beta).loss


if __name__ == "__main__":
    import toy

    models = toy.models()
    row, heads = pack(toy.pairs(6)), (head_of(models[0]), head_of(models[1]))
    toy.train(models[0], lambda: mean_loss(*models, heads, row, beta=0.025))
