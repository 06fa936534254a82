"""Hidden states to log-probabilities and gradients in one pass, for any loss of the log-ratios.

Let S_i = sum_t w_t * log p_t be the log-probability of sequence i, with token weights w, and p_t
the softmax of its token t. The gradient of a loss is one number per sequence times a fixed
direction:

    dL/dlogits_t = dL/dS_i * w_t * (onehot_t - p_t)

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
       sums per sequence                |
          |  pair_grad                  |
          v                             |
       a slope per token ---------------+
          |                             |
          v                             v
       hidden gradient               weight gradient
       = slope * (onehot - p) W      += slope * (onehot - p)^T states     products 2 and 3

For pairs that fit in a tile, the slopes are known before the gradient products. A longer pair is
processed tile by tile. The direction of each of its sides, the gradient of the side's sum, is
accumulated in an array of its own and multiplied by the side's slope at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spoloss._arrays import reduction_scale
from spoloss._objective import Constants, Objective
from spoloss.torch._gradients import Gradients, Wanted, held_dtype
from spoloss.torch._head import Projection
from spoloss.torch._softmax import Softmax, Workspace, softmax_of
from spoloss.torch._tiles import plan, tallest, tiles
from spoloss.torch._tokens import Batch, Tile


class OnePass:
    """One pass over a batch of pairs, tile by tile, without holding all logits.

    Attributes:
      logps: the log-probability of each row of the table, nats.
      gradients: the gradients of the loss.
    """

    def __init__(
        self,
        head: Projection,
        batch: Batch,
        objective: Objective,
        lengths: Tensor,
        constants: Constants,
        wanted: Wanted,
    ) -> None:
        """Visit all pairs."""
        table, self.heights = batch.table, head.tiles.heights
        self.head, self.batch, self.table = head, batch, table
        self.objective, self.lengths, self.constants = objective, lengths, constants
        self.wanted = wanted
        groups = plan(table.lengths, self.heights)
        tokens = tallest(table.lengths, groups, self.heights)
        self.workspace = Workspace(head, tokens, keep=wanted.head)
        hidden = batch.zeros(held_dtype(batch.hidden[0].dtype)) if wanted.hidden else None
        self.gradients = Gradients(head, wanted, hidden)
        self.logps = head.weight.new_empty(len(table), dtype=head.dtype)
        # Long pairs first, because the gradient can hold a direction while it is empty.
        for group in sorted(groups, key=lambda group: group.fits):
            (self._add_group if group.fits else self._add_long_pair)(group.pairs)

    def _add_group(self, pairs: slice) -> None:
        """Add pairs that share a tile: their slopes are known before the gradient products."""
        rows = self.table.rows(pairs)
        tile, softmax = self._softmax(rows)
        slopes = self._slopes(pairs)
        of_token = tile.tokens.weighted(slopes[tile.tokens.side, tile.tokens.pair - pairs.start])
        self.gradients.add(tile, softmax, self.head.gain * of_token, self.gradients.head)

    def _add_long_pair(self, pair: slice) -> None:
        """Add a pair that needs several tiles: the direction of each side, then its slope."""
        directions = self.gradients.directions(self.table.sides)
        for side, direction in enumerate(directions):
            for rows in tiles(self.table.rows_of_side(pair.start, side), self.heights.part):
                tile, softmax = self._softmax(rows)
                unit = tile.tokens.weighted(torch.full_like(softmax.logps, self.head.gain))
                self.gradients.add(tile, softmax, unit, direction)
                del tile, softmax  # before the next tile needs as much memory
        slopes = self._slopes(pair)[:, 0]
        self.gradients.add_scaled(directions, slopes)
        for rows in tiles(self.table.rows(pair), self.heights.rows):
            tokens = self.table.tokens[rows]
            self.gradients.scale_hidden(tokens, slopes[tokens.side])

    def _softmax(self, rows: slice) -> tuple[Tile, Softmax]:
        """The softmax of a tile, whose log-probabilities are noted."""
        tile = self.batch.tile(rows, self.head.weight.dtype)
        softmax = softmax_of(
            self.head, tile, self.workspace, keep=self.wanted.head, product=self.wanted.hidden
        )
        self.logps[rows] = tile.visible(softmax.logps)
        return tile, softmax

    def _slopes(self, pairs: slice) -> Tensor:
        """The derivatives of the loss with respect to the sums of some pairs, [2, p]."""
        sums = self.table.sums(self.logps, pairs)
        slopes = self.objective.slopes(sums, self.lengths[:, pairs], self.constants.of(pairs))
        return reduction_scale(self.lengths[0], self.objective.reduction) * torch.stack(slopes)
