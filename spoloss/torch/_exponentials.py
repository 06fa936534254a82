"""One block of an online softmax: from products [n, C] to exponentials, and running sums of them.

There are two equivalent forms. One works in place, for PyTorch's eager kernels on a CPU. The other
has no side effects, so that torch.compile can fuse all of it into a single kernel on a GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spoloss.torch._vocab_parallel import VocabShard

_VECTOR = 16
"""If the width is a known multiple of 16, the compiled kernel loads and stores 16 bytes at once."""

FLOAT16_SCALE = 2.0**14
"""The factor of exponentials in float16, whose smallest number is 6e-8."""


class Transform(NamedTuple):
    """How the products p = h W^T of a block become logits.

        logits = softcap * tanh(logit_scale * (p + bias) / softcap) / temperature

    A bias of -inf forbids a vocabulary entry, so the soft-capping leaves its logit at -inf.

    Attributes:
      bias: [C], or None.
      softcap: None for no soft-capping.
      logit_scale: factor before the soft-capping.
      temperature: divisor after the soft-capping.
    """

    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    temperature: float

    def __call__(self, products: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits, and the soft-capping's derivative 1 - tanh^2."""
        biased = products if self.bias is None else products + self.bias
        if self.softcap is None:
            return biased * (self.logit_scale / self.temperature), None
        capped = (biased * (self.logit_scale / self.softcap)).tanh()
        logits = capped * (self.softcap / self.temperature)
        if self.bias is not None:
            logits = torch.where(self.bias == -math.inf, -math.inf, logits)
        return logits, 1.0 - capped * capped

    def in_place(self, products: Tensor) -> Tensor | None:
        """Overwrite the products with the logits. Returns the soft-capping's derivative."""
        if self.bias is not None:
            products.add_(self.bias)
        if self.softcap is None:
            if self.logit_scale != self.temperature:
                products.mul_(self.logit_scale / self.temperature)
            return None
        products.mul_(self.logit_scale / self.softcap).tanh_()
        bend = 1.0 - products * products
        products.mul_(self.softcap / self.temperature)
        if self.bias is not None:
            products.masked_fill_(self.bias == -math.inf, -math.inf)
        return bend


class Products(NamedTuple):
    """A block of products of n tokens, and what turns them into exponentials.

    Attributes:
      values: [n, C] of hidden states and weight. The eager form overwrites them.
      transform: from products to logits.
      target: [n] the target's entry of the vocabulary, which may be in another block.
      stop: one past the block's last entry. Its first may be 0, a number that torch.compile makes a
        graph of its own for.
    """

    values: Tensor
    transform: Transform
    target: Tensor
    stop: int

    def column(self) -> Tensor:
        """[n] the target's column, outside of [0, C) if it is not in this block."""
        return self.target - (self.stop - self.values.shape[1])


class Sums(NamedTuple):
    """The running sums of an online softmax for n tokens, after some blocks.

    Attributes:
      peak: [n] the largest logit, a float that no operation has rounded.
      others: [n] the sum of exp(logit - peak), without the target.
      target: [n] the target's logit, -inf if no block so far contains it.
    """

    peak: Tensor
    others: Tensor
    target: Tensor

    @classmethod
    def start(cls, states: Tensor, dtype: torch.dtype) -> Sums:
        """Before the first block of a tile [n, D]."""
        return cls.known(states.new_full((len(states),), torch.finfo(dtype).min, dtype=dtype))

    @classmethod
    def known(cls, peak: Tensor) -> Sums:
        """Before the first block of tokens whose largest logit is known."""
        return cls(peak, torch.zeros_like(peak), torch.full_like(peak, -math.inf))

    def joined(self, shard: VocabShard) -> Sums:
        """The sums over all shards of the vocabulary."""
        return Sums(*shard.join_sums(self.peak, self.others, self.target))

    def total(self) -> Tensor:
        """[n] the sum of exp(logit - peak), with the target."""
        return self.others + (self.target - self.peak).exp()

    def logps(self) -> Tensor:
        """[n] log-probabilities of the targets."""
        gap = self.peak - self.target
        return -(gap + torch.log1p(self.others + torch.expm1(-gap)))


class Exponentials(NamedTuple):
    """The exponentials of a block of n tokens, and the running sums with this block included.

    Attributes:
      exps: [n, C] exp(logit - shift) times the soft-capping's derivative, 0 at the targets.
      shift: [n] at least the largest logit so far, unless the dtype is float16.
      earlier: [n] what sums of the earlier blocks' exponentials are multiplied by.
      sums: the running sums.
    """

    exps: Tensor
    shift: Tensor
    earlier: Tensor
    sums: Sums


def exponentials_of(
    products: Products, sums: Sums, dtype: torch.dtype, *, compiles: bool
) -> Exponentials:
    """The exponentials of a block in `dtype`, and the sums with this block included.

    `compiles` says whether torch.compile fuses the block.
    """
    form = _fused(exponentials, products) if compiles else exponentials_
    found: Exponentials = form(products, sums, dtype)
    return found


def sums_of(products: Products, sums: Sums, *, compiles: bool) -> Sums:
    """The sums of `exponentials_of` alone. A compiled kernel then writes nothing of size [n, C]."""
    if not compiles:
        return exponentials_(products, sums, products.values.dtype).sums
    found: Sums = _fused(sums_alone, products)(products, sums)
    return found


def exponentials(products: Products, sums: Sums, dtype: torch.dtype) -> Exponentials:
    """`exponentials_of` without side effects.

    The products are read twice: for the sums, and for the exponentials.
    """
    logits, bend = products.transform(products.values)
    found = sums_alone(products, sums)
    shift = _shift(found.peak, dtype)
    is_target = _is_target(logits, products.column())
    exps = torch.where(is_target, 0.0, (logits - shift[:, None]).exp())
    exps = (exps if bend is None else exps * bend).to(dtype)
    return Exponentials(exps, shift, (_shift(sums.peak, dtype) - shift).exp(), found)


def sums_alone(products: Products, sums: Sums) -> Sums:
    """`sums_of` without side effects.

    Inductor finds a maximum and the sum of the exponentials below it in one reading of the
    products, if they have exactly the form of `largest` and `total`.
    """
    logits, _ = products.transform(products.values)
    column = products.column()
    is_target = _is_target(logits, column)
    # Finite, because -inf - -inf is nan. The next larger logit makes such a sum 0.
    others = torch.where(is_target, -math.inf, logits).clamp(min=torch.finfo(logits.dtype).min)
    largest = others.amax(dim=1, keepdim=True)
    total = (others - largest).exp().sum(dim=1, keepdim=True)
    # A sum beside the other one, because a gather would be a kernel of its own.
    at_target = torch.where(is_target, logits, 0.0).sum(dim=1)
    logit = torch.where(_in_block(column, logits.shape[1]), at_target, sums.target)
    peak = torch.maximum(torch.maximum(sums.peak, largest[:, 0]), logit)
    earlier, here = (sums.peak - peak).exp(), (largest[:, 0] - peak).exp()
    return Sums(peak, sums.others * earlier + total[:, 0] * here, logit)


def exponentials_(products: Products, sums: Sums, dtype: torch.dtype) -> Exponentials:
    """`exponentials_of` in place."""
    values, column = products.values, products.column()
    bend, width = products.transform.in_place(values), values.shape[1]
    here, index = _in_block(column, width), column.clamp(0, width - 1)[:, None]
    logit = torch.where(here, values.gather(1, index).squeeze(1), sums.target)
    peak = torch.maximum(sums.peak, values.amax(dim=1))
    exps = values.sub_(peak[:, None]).exp_()
    exps.scatter_(1, index, torch.where(here[:, None], 0.0, exps.gather(1, index)))
    others = sums.others * (sums.peak - peak).exp() + exps.sum(dim=1)
    if bend is not None:
        exps.mul_(bend)
    shift = _shift(peak, dtype)
    if shift is not peak:
        exps.mul_((peak - shift).exp()[:, None])
    earlier = (_shift(sums.peak, dtype) - shift).exp()
    return Exponentials(exps.to(dtype), shift, earlier, Sums(peak, others, logit))


def _shift(peak: Tensor, dtype: torch.dtype) -> Tensor:
    """The new peak, so that the exponentials are at most 1 and fit in half precision."""
    return peak - math.log(FLOAT16_SCALE) if dtype == torch.float16 else peak


def _in_block(column: Tensor, width: int) -> Tensor:
    """[n] whether the target is among the columns of a block."""
    return (column >= 0) & (column < width)


def _is_target(logits: Tensor, column: Tensor) -> Tensor:
    """Which of the logits [n, C] are those of the targets."""
    return torch.arange(logits.shape[1], device=logits.device) == column[:, None]


def _fused(function: Callable[..., Any], products: Products) -> Callable[..., Any]:
    """The function as one kernel, or as it is if the width is no multiple of `_VECTOR`."""
    return compiled(function) if products.values.shape[1] % _VECTOR == 0 else function


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled for blocks of any height and of widths that are a multiple of 16."""

    def aligned(products: Products, *others: Any) -> Any:
        # Inductor uses these facts, and derives the first from no larger multiple than 16.
        width = products.values.shape[1]
        torch._check(width % _VECTOR == 0)  # type: ignore[no-untyped-call]
        torch._check(width >= _VECTOR)  # type: ignore[no-untyped-call]
        return function(products, *others)

    # Else Inductor writes the logits of a head with bias and soft-cap to memory.
    return torch.compile(aligned, dynamic=True, options={"realize_reads_threshold": 8})
