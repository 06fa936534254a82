"""Hidden states to loss and gradients in one pass, for any loss of the margin.

The gradient of such a loss is one number per pair times a fixed direction: with h the margin and
p_t the softmax of token t,

    dL/dlogits_t = dL/dh * (+1 for chosen, -1 for rejected) * (onehot_t - p_t)

So one tile gives both a token's log-probability and its gradients, and nothing is computed twice.
This takes three matrix products per token. A head that recomputes its logits needs four.

    hidden states, labels
          |  TokenTable: one row per token whose label counts
          v
       a tile of tokens ----------------.
          |  logits = states W^T        |            product 1
          v                             |
       Softmax: log p, exponentials     |
          |                             |
          v                             |
       sums per sequence -> margin      |
          |  pair_grad                  |
          v                             |
       a slope per token ---------------+
          |                             |
          v                             v
       hidden gradient               weight gradient
       = slope * (onehot - p) W      += slope * (onehot - p)^T states     products 2 and 3

For pairs that fit in a tile, the slopes are known before the gradient products. A longer pair is
processed tile by tile. Its gradients are accumulated for dh instead of dL, and scaled at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spoloss.torch._gradients import Gradients, Wanted, held_dtype
from spoloss.torch._head import Head
from spoloss.torch._objective import Objective
from spoloss.torch._plan import plan, tallest, tiles
from spoloss.torch._softmax import Softmax, Workspace, softmax_of
from spoloss.torch._tokens import CHOSEN, REJECTED, Batch, Tile


@dataclass(frozen=True)
class Pass:
    """The results of one pass.

    Attributes:
      sums: each sequence's sum of log-probabilities over its tokens, [2, P], nats.
      gradients: the gradients of the loss.
    """

    sums: Tensor
    gradients: Gradients


def one_pass(head: Head, batch: Batch, objective: Objective, wanted: Wanted) -> Pass:
    """Log-probabilities and gradients of a batch of pairs, without holding all logits."""
    table, budget = batch.table, head.budget(keep=wanted.head)
    groups = plan(table.lengths, budget)
    hidden = batch.zeros(held_dtype(batch.hidden[0].dtype)) if wanted.hidden else None
    gradients = Gradients(head, wanted, hidden)
    sums = torch.zeros_like(objective.lengths, dtype=head.dtype)
    logps = sums.new_empty(len(table))
    workspace = Workspace(head, tallest(table.lengths, groups, budget), keep=wanted.head)

    def softmax(tile: Tile) -> Softmax:
        return softmax_of(head, tile, workspace, keep=wanted.head, product=wanted.hidden)

    for group in groups:
        pairs = slice(group.first, group.last)
        if group.fits:  # the slopes are known before the gradient products
            tile = batch.tile(table.rows(pairs), head.weight.dtype)
            found = softmax(tile)
            logps[table.rows(pairs)] = found.logps
            sums[:, pairs] = table.sums(logps, pairs)
            gradients.add(tile, found, objective.token_slopes(sums, pairs, tile.tokens))
            del tile, found  # before the next tile needs as much memory
            continue
        # One long pair: accumulate its unit direction, then scale it by its slope. If no other
        # contribution was added yet, the gradients themselves can hold the direction.
        alone = gradients.head.empty and objective.nll_weight == 0.0
        direction = gradients if alone else gradients.beside()
        for side in (CHOSEN, REJECTED):
            for rows in tiles(table.rows_of_side(group.first, side), budget.part):
                tile = batch.tile(rows, head.weight.dtype)
                found = softmax(tile)
                logps[rows] = found.logps
                direction.add(tile, found, objective.unit_token_slopes(tile.tokens, head.dtype))
                del tile, found
            if side == CHOSEN and objective.nll_weight != 0.0:
                # The NLL belongs to the chosen side only, and its slope does not need the margin.
                gradients.head.add_scaled(direction.head, objective.nll_slopes(head.dtype)[pairs])
        sums[:, pairs] = table.sums(logps, pairs)
        slopes = objective.slopes(sums, pairs)
        gradients.head.add_scaled(direction.head, slopes[REJECTED])
        for rows in tiles(table.rows(pairs), head.rows):
            tokens = table.tokens[rows]
            gradients.scale_hidden(tokens, slopes[tokens.side, 0])
    return Pass(sums, gradients)
