"""A batch as one table of tokens, with one row for each token whose label counts.

The columns are the token's place among the hidden states, its target, its side (chosen 0,
rejected 1), its pair and the factor of its log-probability. The table is built from padded rows or
from packed rows (`cu_seqlens`). Rows are sorted by pair, then by side, so the tokens of consecutive
pairs are one slice of the table. A batch of single sequences is a table with one side.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spoloss.torch._labels import IGNORED, UNWEIGHABLE, Sequences, rises, sequence_of, sum_runs


@dataclass(frozen=True)
class Tokens:
    """Some rows of the table.

    Attributes:
      place: [n] the token's place among the hidden states of all sides, one after another.
      target: [n] the token id that it predicts.
      side: [n] 0 for chosen, 1 for rejected.
      pair: [n] the pair or sequence that it belongs to.
      weight: [n] the factor of its log-probability, or None for 1.
    """

    place: Tensor
    target: Tensor
    side: Tensor
    pair: Tensor
    weight: Tensor | None

    def __getitem__(self, rows: slice) -> Tokens:
        """A slice of the rows."""
        return Tokens(
            self.place[rows],
            self.target[rows],
            self.side[rows],
            self.pair[rows],
            None if self.weight is None else self.weight[rows],
        )

    def weighted(self, values: Tensor) -> Tensor:
        """Values of the tokens, [n], times the tokens' weights."""
        return values if self.weight is None else values * self.weight.to(values.dtype)


@dataclass(frozen=True)
class TokenTable:
    """The table, and the rows of its pairs as Python numbers, which need no device synchronisation.

    Attributes:
      tokens: all rows.
      sizes: the number of hidden states of each side, including tokens that do not count.
      starts: the first row of each pair and side, at index pair * sides + side, then the end of the
        table.
      left_out: [P] which pairs have weight 0, or None if none has a weight.
    """

    tokens: Tokens
    sizes: tuple[int, ...]
    starts: list[int]
    left_out: Tensor | None

    def __len__(self) -> int:
        """The number of rows."""
        return self.starts[-1]

    @property
    def all_rows(self) -> slice:
        """All rows."""
        return slice(0, len(self))

    @property
    def sides(self) -> int:
        """2 for pairs, 1 for single sequences."""
        return len(self.sizes)

    @property
    def lengths(self) -> list[int]:
        """The number of rows of each pair."""
        ends = self.starts[:: self.sides]
        return [end - start for start, end in itertools.pairwise(ends)]

    def rows(self, pairs: slice) -> slice:
        """The rows of some pairs."""
        return slice(self.starts[pairs.start * self.sides], self.starts[pairs.stop * self.sides])

    def rows_of_side(self, pair: int, side: int) -> slice:
        """The rows of one side of one pair."""
        index = pair * self.sides + side
        return slice(self.starts[index], self.starts[index + 1])

    def sums(self, logps: Tensor, pairs: slice) -> Tensor:
        """The weighted sums [sides, p] over the sequences of some pairs, from those of all rows."""
        rows, count = self.rows(pairs), pairs.stop - pairs.start
        tokens = self.tokens[rows]
        run = torch.add(tokens.side, tokens.pair - pairs.start, alpha=self.sides)
        values = tokens.weighted(logps[rows])
        return sum_runs(values, run, count * self.sides).view(count, self.sides).t()


class Tile(NamedTuple):
    """Some tokens of the table with their hidden states.

    Attributes:
      tokens: n tokens.
      states: [n, D] their hidden states.
      unusable: [n] whether 0 replaces numbers that are not finite, in a pair of weight 0; or None.
    """

    tokens: Tokens
    states: Tensor
    unusable: Tensor | None

    def visible(self, logps: Tensor) -> Tensor:
        """Log-probabilities [n] as results: nan where they come from replaced numbers."""
        return logps if self.unusable is None else logps.masked_fill(self.unusable, math.nan)


@dataclass(frozen=True)
class Batch:
    """The table with the hidden states that it refers to.

    Attributes:
      table: the tokens.
      hidden: the hidden states of each side, flattened to [B * T, D].
    """

    table: TokenTable
    hidden: tuple[Tensor, ...]

    @classmethod
    def of(cls, table: TokenTable, *hidden: Tensor) -> Batch:
        """The batch of hidden states [B, T, D] of each side."""
        return cls(table, tuple(states.reshape(-1, states.shape[2]) for states in hidden))

    def tile(self, rows: slice, dtype: torch.dtype) -> Tile:
        """Some rows of the table, with hidden states in `dtype`."""
        tokens = self.table.tokens[rows]
        states = self._states(tokens).to(dtype)
        if self.table.left_out is None:
            return Tile(tokens, states, None)
        # 0 * nan is nan, so nan in a pair of weight 0 must not enter a product.
        unusable = self.table.left_out[tokens.pair, None] & ~states.isfinite()
        return Tile(tokens, torch.where(unusable, 0.0, states), unusable.any(dim=1))

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """Zeros for one row per hidden state of all sides, [rows, D]."""
        return self.hidden[0].new_zeros(
            sum(map(len, self.hidden)), self.hidden[0].shape[1], dtype=dtype
        )

    def _states(self, tokens: Tokens) -> Tensor:
        first, *others = self.hidden
        if not others or len(others[0]) == 0:
            return first[tokens.place]
        if len(first) == 0:
            return others[0][tokens.place]
        # Two gathers and a selection, because the number of tokens per side is on the device.
        in_first = tokens.place.clamp(max=len(first) - 1)
        in_second = (tokens.place - len(first)).clamp(min=0)
        chosen = (tokens.side == 0)[:, None]
        return torch.where(chosen, first[in_first], others[0][in_second])


def make_table(sides: list[Sequences], *, vocabulary: int) -> TokenTable:
    """The table of all tokens whose label counts, of the same number of sequences on each side.

    The host needs their number, so a call synchronises with the device here, and nowhere else.

    Raises:
      ValueError: a label that counts is outside [0, vocabulary), its weight is negative, infinite
        or nan, or offsets do not rise to T.
    """
    targets = [side.targets.flatten() for side in sides]
    on_host = _to_host(sides, targets, vocabulary)
    places, keys, offset = [], [], 0
    for index, (side, host) in enumerate(zip(sides, on_host, strict=True)):
        _check(side, host, vocabulary)
        place = host.counts.nonzero().squeeze(1)
        if host.offsets is None:
            sequence = place // side.targets.shape[1]
        else:
            sequence = sequence_of(host.offsets, place)
        places.append(place + offset)
        keys.append(sequence * len(sides) + index)
        offset += len(host.counts)
    key, order = torch.cat(keys).sort(stable=True)
    lengths = torch.bincount(key, minlength=sides[0].count * len(sides))
    device = targets[0].device
    place, key = torch.stack([torch.cat(places)[order], key]).to(device)
    tokens = Tokens(
        place,
        torch.cat(targets)[place],
        key % len(sides),
        key // len(sides),
        _weights(sides, place),
    )
    return TokenTable(
        tokens,
        tuple(len(part) for part in targets),
        # int() where tolist() fails: under functorch before PyTorch 2.9.
        [0, *map(int, lengths.cumsum(0))],
        sides[0].left_out,
    )


def _weights(sides: list[Sequences], place: Tensor) -> Tensor | None:
    """The weight of each row's token, or None if no side has weights."""
    if all(side.weights is None for side in sides):
        return None
    columns = [
        (side.targets != IGNORED).float() if side.weights is None else side.weights
        for side in sides
    ]
    return torch.cat([column.flatten() for column in columns])[place]


@dataclass(frozen=True)
class _OnHost:
    """The data of one side that the host needs."""

    counts: Tensor
    outside: bool
    unweighable: bool
    offsets: Tensor | None


def _check(side: Sequences, host: _OnHost, vocabulary: int) -> None:
    if host.unweighable:
        raise ValueError(
            f"{side.name}.token_weights must be finite and not negative, got another number"
        )
    if host.outside:
        raise ValueError(
            f"{side.name}.labels must be in [0, V = {vocabulary}) or equal to ignore_index = "
            f"{side.ignore_index}, got another label"
        )
    if host.offsets is not None and not rises(host.offsets, len(host.counts)):
        raise ValueError(
            f"{side.name}.cu_seqlens must rise from 0 to T = {len(host.counts)}, "
            f"got {host.offsets.tolist()}"
        )


def _to_host(sides: list[Sequences], targets: list[Tensor], vocabulary: int) -> list[_OnHost]:
    """Transfer which labels count, which fit, whose weight does not, and the offsets, at once."""
    parts = []
    for side, target in zip(sides, targets, strict=True):
        fits = (target >= 0) & (target < vocabulary)
        offsets = target.new_empty(0) if side.cu_seqlens is None else side.cu_seqlens
        parts += [target != IGNORED, fits, target == UNWEIGHABLE, offsets]
    # Booleans, unless some side has offsets.
    dtype = torch.bool if all(side.cu_seqlens is None for side in sides) else torch.int64
    pieces = torch.split(torch.cat([part.to(dtype) for part in parts]).cpu(), [*map(len, parts)])
    return [
        _OnHost(
            counts.bool(),
            outside=bool((counts > fits).any()),
            unweighable=bool(unweighable.any()),
            offsets=None if side.cu_seqlens is None else offsets,
        )
        for side, counts, fits, unweighable, offsets in zip(
            sides, pieces[::4], pieces[1::4], pieces[2::4], pieces[3::4], strict=True
        )
    ]
