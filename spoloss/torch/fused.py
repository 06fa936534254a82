"""Hidden states to the loss in one pass, for any loss of the margin.

The gradient of such a loss is one number per pair times a fixed direction:

    dL/dlogits_t = -dL/dlogp_i * (softmax_t - onehot_t)

so the tile that gives a token's log-probability gives its gradients too, and nothing is computed
twice: three matrix products per token where a head that recomputes needs four. Pairs that fit a
tile know their slope before the gradient products. A longer pair is walked by tiles with slope 1,
its weight gradient gathered in a scratch of its own and scaled once the slope is known.

No formula of a loss is in this file: slopes come from `pair_grad`, the value from `pair_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from spoloss._arrays import check_reduction, per_pair, reduce, reduction_scale
from spoloss.gradients import pair_grad
from spoloss.losses import DPO, SPO, MarginLoss
from spoloss.pairs import beta_for_gap, check_loss, log_ratio_margin, pair_loss
from spoloss.torch._head import HeadOptions, head_options
from spoloss.torch._once import once
from spoloss.torch._rows import Rows, select_rows
from spoloss.torch._tiles import Head, HeadGrad, Tile
from spoloss.torch.logps import linear_token_logps, sum_tokens

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


class LinearOptions(TypedDict, total=False):
    """The keyword arguments that every fused loss shares; `linear_pair_loss` documents them."""

    bias: Tensor | None
    weights: Tensor | None
    nll_weight: float
    reduction: str
    ignore_index: int
    shift: bool
    average: bool
    softcap: float | None
    logit_scale: float
    temperature: float
    chunk_size: int | None
    vocab_parallel_group: ProcessGroup | None


class LinearPairLoss(NamedTuple):
    """The loss, and the policy's log-probabilities [P] in nats, detached, for metrics."""

    loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor


def linear_pair_loss(
    loss: MarginLoss,
    chosen_hidden: Tensor,
    rejected_hidden: Tensor,
    weight: Tensor,
    chosen_labels: Tensor,
    rejected_labels: Tensor,
    reference_chosen_logps: Tensor | float,
    reference_rejected_logps: Tensor | float,
    *,
    beta: Tensor | float,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    nll_weight: float = 0.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    shift: bool = True,
    average: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    vocab_parallel_group: ProcessGroup | None = None,
) -> LinearPairLoss:
    """`pair_loss` of `linear_logps` in one pass: loss and gradients, never the logits.

        loss = l(h) + nll_weight * NLL,    NLL = -log pi(y_w|x) / (number of its tokens)

    With a head that is frozen, memory beyond the gradients is one block of a tile, as in
    `linear_logps`. The weight's gradient needs tiles that are kept whole: pairs share one of up to
    32 MiB of float32 (1 GiB on CUDA), but at least 128 tokens; a longer pair takes one of up to
    64 MiB (2 GiB; 256 tokens) or the weight's size in float32, whichever is more; a pair that is
    longer still is walked in tiles of 64 MiB and, if it is not the first or has an NLL, needs a
    float32 array of the weight's size. Tokens with ignored labels are never worked on.
    Gradients are made in the forward, so nothing is left to do in the backward; without a tensor
    that requires one this is `linear_logps`. `reduction="none"` with a head that is trained needs
    each pair's upstream gradient first, and so works twice, as `linear_logps` does.

    Args:
      loss: `SPO(...)`, `DPO(...)`, `Squared()` or an object of your own with `value` and `slope`.
      chosen_hidden: last hidden states of the chosen sequences, shape [P, T, D].
      rejected_hidden: of the rejected, shape [P, T', D]; T' may differ from T.
      weight: the head's weight, as for `linear_logps`.
      chosen_labels: token ids, shape [P, T], as for `linear_logps`.
      rejected_labels: token ids, shape [P, T'].
      reference_chosen_logps: log pi_ref(y_w|x), nats, shape [P]; 0.0 for no reference.
      reference_rejected_logps: log pi_ref(y_l|x), likewise.
      beta: handed to the loss, 1 / nats, > 0: a number or shape [P].
      bias: as for `linear_logps`.
      weights: factor of each pair (of its NLL too), shape [P]. "mean" still divides by P.
      nll_weight: factor of the chosen answers' negative log-likelihood per token, >= 0.
      reduction: "mean", "sum" or "none".
      ignore_index: as for `linear_logps`.
      shift: as for `linear_logps`.
      average: log-probabilities per token in place of sums, for policy and loss alike; the
        reference's must then be averages too.
      softcap: as for `linear_logps`.
      logit_scale: as for `linear_logps`.
      temperature: as for `linear_logps`.
      chunk_size: tokens of a tile, kept or not; None for the defaults above.
      vocab_parallel_group: as for `linear_logps`. The loss is the same on all ranks.

    Returns:
      LinearPairLoss(loss, chosen_logps, rejected_logps). The loss is differentiable once, by the
      hidden states, weight and bias.

    Raises:
      TypeError: a dtype does not fit, `loss` is no loss object, or the weight is a sharded DTensor.
      ValueError: a shape, device or number does not fit, an argument that is a constant here
        (references, beta, weights) requires a gradient, or the ranks of `vocab_parallel_group` do
        not agree on their tokens or lack rows for the labels.
      RuntimeError: `vocab_parallel_group` is given under torch.compile(fullgraph=True).
    """
    check_loss(loss)
    check_reduction(reduction)
    hidden = {"chosen_hidden": chosen_hidden, "rejected_hidden": rejected_hidden}
    labels = {"chosen_labels": chosen_labels, "rejected_labels": rejected_labels}
    options = head_options(
        hidden,
        labels,
        weight,
        bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        chunk_size=chunk_size,
        ignore_index=ignore_index,
        vocab_parallel_group=vocab_parallel_group,
    )
    constants = {
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
        "beta": beta,
        "weights": weights,
    }
    _check_constants(chosen_hidden, rejected_hidden, constants, nll_weight)
    terms = _Terms(
        loss,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
        weights,
        nll_weight,
        reduction,
        average,
    )
    sides = select_rows(
        labels, vocabulary=options.vocabulary, ignore_index=ignore_index, shift=shift
    )
    inputs = (chosen_hidden, rejected_hidden, weight, bias)
    needed = tuple(t is not None and t.requires_grad and torch.is_grad_enabled() for t in inputs)
    if not any(needed) or (reduction == "none" and (needed[2] or needed[3])):
        return _two_passes(inputs, sides, terms, options)
    value, chosen, rejected, *_ = _OnePass.apply(*inputs, sides, terms, options, needed)  # type: ignore[no-untyped-call]
    return LinearPairLoss(value, chosen, rejected)


def linear_spo_loss(
    chosen_hidden: Tensor,
    rejected_hidden: Tensor,
    weight: Tensor,
    chosen_labels: Tensor,
    rejected_labels: Tensor,
    reference_chosen_logps: Tensor | float,
    reference_rejected_logps: Tensor | float,
    *,
    beta: Tensor | float = 0.1,
    reward_gap: Tensor | float | None = None,
    linear_below: float | None = None,
    **options: Unpack[LinearOptions],
) -> LinearPairLoss:
    """`spoloss.spo_loss` (paper eq. 6) from hidden states, in one pass.

    Args:
      chosen_hidden: as for `linear_pair_loss`.
      rejected_hidden: as for `linear_pair_loss`.
      weight: as for `linear_pair_loss`.
      chosen_labels: as for `linear_pair_loss`.
      rejected_labels: as for `linear_pair_loss`.
      reference_chosen_logps: as for `linear_pair_loss`.
      reference_rejected_logps: as for `linear_pair_loss`.
      beta: as for `spoloss.spo_loss`.
      reward_gap: as for `spoloss.spo_loss`.
      linear_below: as for `spoloss.spo_loss`.
      **options: the other keyword arguments of `linear_pair_loss`.

    Returns:
      As `linear_pair_loss`.

    Raises:
      TypeError: as `linear_pair_loss`.
      ValueError: as `linear_pair_loss`.
    """
    return linear_pair_loss(
        SPO(linear_below),
        chosen_hidden,
        rejected_hidden,
        weight,
        chosen_labels,
        rejected_labels,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta_for_gap(beta, reward_gap, _no_logps(chosen_hidden)),
        **options,
    )


def linear_dpo_loss(
    chosen_hidden: Tensor,
    rejected_hidden: Tensor,
    weight: Tensor,
    chosen_labels: Tensor,
    rejected_labels: Tensor,
    reference_chosen_logps: Tensor | float,
    reference_rejected_logps: Tensor | float,
    *,
    beta: Tensor | float = 0.1,
    label_smoothing: float = 0.0,
    **options: Unpack[LinearOptions],
) -> LinearPairLoss:
    """`spoloss.dpo_loss` (DPO eq. 7) from hidden states, in one pass.

    Args:
      chosen_hidden: as for `linear_pair_loss`.
      rejected_hidden: as for `linear_pair_loss`.
      weight: as for `linear_pair_loss`.
      chosen_labels: as for `linear_pair_loss`.
      rejected_labels: as for `linear_pair_loss`.
      reference_chosen_logps: as for `linear_pair_loss`.
      reference_rejected_logps: as for `linear_pair_loss`.
      beta: as for `spoloss.dpo_loss`.
      label_smoothing: as for `spoloss.dpo_loss`.
      **options: the other keyword arguments of `linear_pair_loss`.

    Returns:
      As `linear_pair_loss`.

    Raises:
      TypeError: as `linear_pair_loss`.
      ValueError: as `linear_pair_loss`.
    """
    return linear_pair_loss(
        DPO(label_smoothing),
        chosen_hidden,
        rejected_hidden,
        weight,
        chosen_labels,
        rejected_labels,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
        **options,
    )


@dataclass(frozen=True)
class _Terms:
    """What the loss is of, beside the policy's log-probabilities."""

    loss: MarginLoss
    reference_chosen: Any
    reference_rejected: Any
    beta: Any
    weights: Any
    nll_weight: float
    reduction: str
    average: bool

    def value(self, chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor) -> Tensor:
        """The reduced loss of all pairs."""
        value: Tensor = pair_loss(
            self.loss,
            chosen,
            rejected,
            self.reference_chosen,
            self.reference_rejected,
            beta=self.beta,
            weights=self.weights,
            reduction=self.reduction,
        )
        if self.nll_weight == 0.0:
            return value
        nll = -chosen if self.average else -chosen / chosen_lengths.clamp(min=1)
        nll = nll if self.weights is None else nll * self.weights
        total: Tensor = value + self.nll_weight * reduce(nll, self.reduction)
        return total

    def slopes(self, chosen: Tensor, rejected: Tensor, pairs: slice) -> Tensor:
        """Derivatives of the loss by the margins of some pairs."""
        grad = pair_grad(
            self.loss,
            chosen[pairs],
            rejected[pairs],
            _of_pairs(self.reference_chosen, pairs),
            _of_pairs(self.reference_rejected, pairs),
            beta=_of_pairs(self.beta, pairs),
            weights=_of_pairs(self.weights, pairs),
            reduction="sum",
        )
        slopes: Tensor = grad.policy_chosen * reduction_scale(chosen, self.reduction)
        return slopes.to(chosen.dtype)

    def nll_slopes(self, chosen_lengths: Tensor, pairs: slice) -> Tensor:
        """Derivatives by a chosen token's log-probability through the NLL term alone."""
        weights = 1.0 if self.weights is None else self.weights[pairs]
        scale = -self.nll_weight * reduction_scale(chosen_lengths, self.reduction)
        return scale * weights / chosen_lengths[pairs].clamp(min=1)

    def token_share(self, lengths: Tensor, pairs: slice, dtype: torch.dtype) -> Tensor:
        """What a token counts for in its sequence: 1, or 1 / length in an average."""
        shares = lengths[pairs].clamp(min=1).to(dtype)
        return shares.reciprocal() if self.average else torch.ones_like(shares)


def _two_passes(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    sides: list[Rows],
    terms: _Terms,
    options: HeadOptions,
) -> LinearPairLoss:
    """The same by `linear_logps`: for no gradient at all, or one per pair."""
    chosen, rejected, weight, bias = inputs
    chosen_logps, rejected_logps = (
        sum_tokens(
            linear_token_logps(hidden, weight, bias, rows, options),
            rows.lengths,
            average=terms.average,
        )
        for hidden, rows in zip((chosen, rejected), sides, strict=True)
    )
    value = terms.value(chosen_logps, rejected_logps, sides[0].lengths)
    return LinearPairLoss(value, chosen_logps.detach(), rejected_logps.detach())


class _OnePass(torch.autograd.Function):
    """Loss, log-probabilities and gradients at once; backward has only to scale."""

    @staticmethod
    def forward(
        chosen: Tensor,
        rejected: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sides: list[Rows],
        terms: _Terms,
        options: HeadOptions,
        needed: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        with torch.autocast(chosen.device.type, enabled=False):
            head = Head(weight, bias, options)
            sweep = _Sweep(head, [chosen, rejected], sides, terms, needed)
            sweep.run()
            head.complete(*sweep.grad_hidden)
            chosen_logps, rejected_logps = sweep.logps
            return (
                terms.value(chosen_logps, rejected_logps, sides[0].lengths),
                chosen_logps,
                rejected_logps,
                *(
                    None if grad is None else grad.view(states.shape)
                    for grad, states in zip(sweep.grad_hidden, (chosen, rejected), strict=True)
                ),
                *sweep.grad_head.to(_held(weight), None if bias is None else _held(bias)),
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        gradients = output[3:]
        ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*gradients, *inputs[:4])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients, inputs = saved[:4], saved[4:]
        if upstream is None:
            return (None,) * 8
        with torch.no_grad():
            scaled = tuple(
                None if grad is None else _scale(grad, upstream).to(tensor.dtype)
                for grad, tensor in zip(gradients, inputs, strict=True)
            )
        return *once(scaled, *inputs), None, None, None, None


class _Sweep:
    """One pass over all pairs, gathering log-probabilities and gradients."""

    def __init__(
        self,
        head: Head,
        hidden: list[Tensor],
        sides: list[Rows],
        terms: _Terms,
        needed: tuple[bool, ...],
    ) -> None:
        self.head, self.sides, self.terms = head, sides, terms
        self.hidden = [states.reshape(-1, states.shape[2]) for states in hidden]
        self.pairs = len(hidden[0])
        self.needed = {"weight": needed[2], "bias": needed[3]}
        if any(needed[2:]):
            head.reserve(self._count(0, self.pairs))
        self.logps = [states.new_zeros(self.pairs, dtype=head.dtype) for states in hidden]
        self.token_logps = [
            states.new_zeros(states.shape[:2], dtype=head.dtype) for states in hidden
        ]
        self.grad_hidden = [
            torch.zeros_like(states, dtype=_held(states)) if need else None
            for states, need in zip(self.hidden, needed[:2], strict=True)
        ]
        self.grad_head = HeadGrad(head, **self.needed)

    def run(self) -> None:
        """Walk all pairs, by the way that suits each."""
        if not any(self.needed.values()):
            # A frozen head needs no slope before its products: tiles fill up across pairs.
            self._walk(0, self.pairs, None)
            return
        scratch = None
        for first, last in self._groups():
            if self._count(first, last) <= self.head.most_kept_rows:
                if self._count(first, last) > 0:
                    self._short(first, last)
            elif self.grad_head.empty and self.terms.nll_weight == 0.0:
                # The first pair needs no scratch: there is nothing yet to keep its sum apart from.
                self._walk(first, last, self.grad_head)
            else:
                scratch = scratch or HeadGrad(self.head, **self.needed)
                self._walk(first, last, scratch)

    def _groups(self) -> Iterator[tuple[int, int]]:
        first = 0
        while first < self.pairs:
            last = first + 1
            while last < self.pairs and self._count(first, last + 1) <= self.head.grouped_rows:
                last += 1
            yield first, last
            first = last

    def _count(self, first: int, last: int) -> int:
        return sum(rows.ends[last] - rows.ends[first] for rows in self.sides)

    def _short(self, first: int, last: int) -> None:
        """Pairs that share a tile: their slopes first, then the gradient products."""
        pairs = slice(first, last)
        parts = [
            (side, slice(rows.ends[first], rows.ends[last])) for side, rows in enumerate(self.sides)
        ]
        tile = self._tile(parts)
        blocks = tile.sweep(keep=True)
        self._note(tile, parts)
        self._sum(pairs)
        factors = self._factors(self._slopes(pairs), pairs)
        factor = torch.cat(
            [self._of_rows(factors[side], side, part, first) for side, part in parts]
        )
        self._write_hidden(tile, factor, parts)
        self.grad_head.add(tile, blocks, factor)

    def _walk(self, first: int, last: int, scratch: HeadGrad | None) -> None:
        """Products with slope 1, scaled once the slopes are known.

        Hidden gradients are scaled row by row, so any pairs may go together; the scratch takes the
        head's gradient of one pair that is longer than a tile.
        """
        pairs = slice(first, last)
        height = self.head.rows if scratch is None else self.head.kept_rows
        for side, sign in ((0, -1.0), (1, 1.0)):
            rows = self.sides[side]
            share = sign * self.terms.token_share(rows.lengths, pairs, self.head.dtype)
            for part in rows.slices(first, last, height):
                tile = self._tile([(side, part)])
                blocks = tile.sweep(keep=scratch is not None)
                self._note(tile, [(side, part)])
                unit = rows.mask(torch.full_like(tile.logps, self.head.gain), part)
                self._write_hidden(tile, unit, [(side, part)])
                if scratch is not None:
                    scratch.add(tile, blocks, unit * share)
            if side == 0 and scratch is not None and self.terms.nll_weight != 0.0:
                # At this moment the scratch holds the chosen side alone, all that the NLL is of.
                nll = self.terms.nll_slopes(rows.lengths, pairs) / -share
                self.grad_head.add_scaled(scratch, nll[0].to(self.head.dtype))
        self._sum(pairs)
        slopes = self._slopes(pairs)
        if scratch is self.grad_head:
            scratch.scale(slopes[0])
        elif scratch is not None:
            self.grad_head.add_scaled(scratch, slopes[0])
            scratch.empty = True
        for side, factor in enumerate(self._factors(slopes, pairs)):
            self._scale_hidden(side, first, last, factor / self.head.gain)

    def _factors(self, slopes: Tensor, pairs: slice) -> list[Tensor]:
        """By side, what a token's direction counts for: minus the loss's derivative by it."""
        terms, dtype = self.terms, self.head.dtype
        chosen, rejected = (terms.token_share(rows.lengths, pairs, dtype) for rows in self.sides)
        by_chosen, by_rejected = slopes * chosen, -slopes * rejected
        if terms.nll_weight != 0.0:
            by_chosen = by_chosen + terms.nll_slopes(self.sides[0].lengths, pairs)
        return [(-self.head.gain * by).to(dtype) for by in (by_chosen, by_rejected)]

    def _slopes(self, pairs: slice) -> Tensor:
        chosen, rejected = self.logps
        return self.terms.slopes(chosen, rejected, pairs)

    def _tile(self, parts: list[tuple[int, slice]]) -> Tile:
        """A tile whose rows are those of the parts (side, slice of its rows) in turn."""
        states, targets, wanted, n = [], [], [], 0
        for side, part in parts:
            rows, start = self.sides[side], n
            states.append(rows.take(self.hidden[side], part, self.head.weight.dtype))
            targets.append(rows.targets[part])
            n += part.stop - part.start
            if self.grad_hidden[side] is not None:
                wanted += [start, n]
        return Tile(
            self.head,
            torch.cat(states),
            torch.cat(targets),
            slice(wanted[0], wanted[-1]) if wanted else None,
        )

    def _note(self, tile: Tile, parts: list[tuple[int, slice]]) -> None:
        sizes = [part.stop - part.start for _, part in parts]
        for (side, part), logps in zip(parts, torch.split(tile.logps, sizes), strict=True):
            rows = self.sides[side]
            self.token_logps[side].view(-1)[rows.index[part]] = rows.mask(logps, part)

    def _of_rows(self, of_pair: Tensor, side: int, part: slice, first: int) -> Tensor:
        """What pairs from the first on have each, for rows; 0 for those that do not count."""
        rows = self.sides[side]
        return rows.mask(of_pair[rows.sequence[part] - first], part)

    def _sum(self, pairs: slice) -> None:
        for side, rows in enumerate(self.sides):
            share = self.terms.token_share(rows.lengths, pairs, self.head.dtype)
            self.logps[side][pairs] = self.token_logps[side][pairs].sum(dim=1) * share

    def _write_hidden(self, tile: Tile, factor: Tensor, parts: list[tuple[int, slice]]) -> None:
        """The hidden gradients of a tile, whose rows are those of the parts in turn."""
        start, found = 0, None
        for side, part in parts:
            total = self.grad_hidden[side]
            if total is not None:
                found = tile.hidden_grad(factor) if found is None else found
                here = slice(start, start + part.stop - part.start)
                total[self.sides[side].index[part]] = found[here].to(total.dtype)
                start = here.stop

    def _scale_hidden(self, side: int, first: int, last: int, factor: Tensor) -> None:
        grad, rows = self.grad_hidden[side], self.sides[side]
        if grad is None:
            return
        for part in rows.slices(first, last, self.head.rows):
            index, of_row = rows.index[part], self._of_rows(factor, side, part, first)
            grad[index] = (grad[index] * of_row[:, None]).to(grad.dtype)


def _held(tensor: Tensor) -> torch.dtype:
    """The dtype in which a gradient waits for the upstream one.

    With float16 that is a loss scale, which is there to keep small gradients from vanishing.
    """
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def _scale(gradient: Tensor, upstream: Tensor) -> Tensor:
    """A gradient made in the forward, times the upstream gradient: 0-d, or one per pair."""
    factor = upstream.reshape(-1, *(1,) * (gradient.ndim - 1)) if upstream.ndim else upstream
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    if torch.compiler.is_compiling() or keep_graph is None or keep_graph():
        return (gradient * factor).to(gradient.dtype)
    # A graph that is about to be freed needs its gradient no more: no second V x D. The 1 of
    # loss.backward() spares the pass too, where a look at it waits for nothing.
    if upstream.ndim == 0 and upstream.device.type == "cpu" and upstream == 1.0:
        return gradient
    return gradient.mul_(factor)


def _check_constants(
    chosen_hidden: Tensor, rejected_hidden: Tensor, constants: dict[str, Any], nll_weight: float
) -> None:
    """Check what is constant here, before any work, as `pair_loss` would after it."""
    if len(chosen_hidden) != len(rejected_hidden):
        raise ValueError(
            f"chosen_hidden and rejected_hidden must hold the same number of pairs, "
            f"got {len(chosen_hidden)} and {len(rejected_hidden)}"
        )
    if not 0.0 <= nll_weight < math.inf:
        raise ValueError(f"nll_weight must be finite and not negative, got {nll_weight}")
    for name, value in constants.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name} must not require a gradient, for one pass makes none of it: "
                "detach it, or use linear_logps and pair_loss"
            )
    logps = _no_logps(chosen_hidden)
    log_ratio_margin(
        logps,
        logps,
        constants["reference_chosen_logps"],
        constants["reference_rejected_logps"],
    )
    per_pair("beta", constants["beta"], logps)
    if constants["weights"] is not None:
        per_pair("weights", constants["weights"], logps, positive=False)


def _no_logps(hidden: Tensor) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_zeros(len(hidden), dtype=dtype)


def _of_pairs(value: Any, pairs: slice) -> Any:
    """Some pairs' share of what is one number for all, 0-d, or one per pair."""
    return value[pairs] if isinstance(value, Tensor) and value.ndim else value
