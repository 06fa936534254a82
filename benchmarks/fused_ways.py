"""The ways from hidden states to the gradients of a preference loss, for `benchmarks.fused`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fused_problem import (
    BETA,
    IGNORED,
    Formula,
    Problem,
    apo_down,
    dpo,
    kto,
    mean_loss,
    spo,
)
from benchmarks.turns import FLOOR

FLOOR_ROWS = (None, 256, 512, 1024)
"""Heights of the floor's row tiles that are tried; None is all rows in one piece."""

Step = Callable[[Problem], Tensor]
"""Forward and backward of the loss on a problem; returns the loss, leaves gradients in `.grad`."""


class UnavailableError(Exception):
    """A way cannot run here; the message says why."""


def floor(rows: int | None) -> Step:
    """The matrix products of a head that recomputes nothing, and nothing else."""

    def step(problem: Problem) -> Tensor:
        hidden, weight = problem.hidden.detach().flatten(0, 1), problem.weight.detach()
        counts = problem.labels.flatten() != IGNORED
        if not counts.all():
            hidden = hidden[counts]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.empty_like(weight) if problem.weight.requires_grad else None
        buffer = hidden.new_empty(min(rows or len(hidden), len(hidden)), len(weight))
        for start in range(0, len(hidden), len(buffer)):
            tile = hidden[start : start + len(buffer)]
            logits = buffer[: len(tile)]
            torch.mm(tile, weight.T, out=logits)
            torch.mm(logits, weight, out=grad_hidden[start : start + len(buffer)])
            if grad_weight is not None:
                # With beta = 0 the first product overwrites what the memory held.
                grad_weight.addmm_(logits.T, tile, beta=float(start > 0))
        return torch.tensor(math.nan)

    return step


def _backwards(loss: Callable[[Problem], Tensor]) -> Step:
    def step(problem: Problem) -> Tensor:
        value = loss(problem)
        value.backward()
        return value.detach()

    return step


def _dpo_of(token_logps: Callable[[Problem], Tensor]) -> Step:
    """DPO by hand after a way to the log-probabilities [2P, T], 0 where the label is ignored.

    Any other loss of log-probabilities would take the same time: it has 2P numbers to work on.
    """
    return _backwards(
        lambda problem: mean_loss(
            dpo, token_logps(problem).view(problem.labels.shape).sum(1), problem.reference
        )
    )


# ------------------------------------------------------------------------------------------- ours


class _APODown:
    """`apo_down` as a pair loss of the package."""

    value = staticmethod(apo_down)

    @staticmethod
    def slopes(chosen: Tensor, rejected: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        alone, both = torch.sigmoid(beta * chosen), torch.sigmoid(beta * (chosen - rejected))
        apart = beta * both * (1.0 - both)
        return beta * alone * (1.0 - alone) - apart, apart


def spoloss(formula: Formula, softcap: float | None = None) -> Step:
    """This package: one pass for a loss of pairs, `linear_logps` for any other loss."""
    import spoloss
    import spoloss.torch as wing

    pair_losses = {dpo: spoloss.DPO(), spo: spoloss.SPO(), apo_down: _APODown()}

    def by_pair(problem: Problem) -> Tensor:
        head = wing.Head(problem.weight, softcap=softcap)
        sides = (problem.chosen, problem.rejected), problem.labels.chunk(2)
        given = head, *map(partial(wing.Completions, shift=False), *sides)
        references = problem.reference.chunk(2)
        return wing.linear_pair_loss(pair_losses[formula], *given, *references, beta=BETA).loss

    def by_logps(problem: Problem) -> Tensor:
        completions = wing.Completions(problem.hidden, problem.labels, shift=False)
        logps = wing.linear_logps(wing.Head(problem.weight, softcap=softcap), completions)
        return mean_loss(formula, logps, problem.reference)

    return _backwards(by_pair if formula in pair_losses else by_logps)


# ------------------------------------------------------------------------------------- the others


def full_logits(softcap: float | None = None) -> Step:
    """All logits at once, cross-entropy in float32, autograd: the best that is typed by hand."""

    def token_logps(problem: Problem) -> Tensor:
        logits = F.linear(problem.hidden, problem.weight).flatten(0, 1).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        labels = problem.labels.flatten()
        return -F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)

    return _dpo_of(token_logps)


def trl(softcap: float | None = None) -> Step:
    """TRL's chunked log-probabilities, called as its fused language-model head calls them."""
    # Its backward imports this: seconds and memory that are not the loss's.
    import trl.trainer.utils as utils
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction, _use_triton

    def token_logps(problem: Problem) -> Tensor:
        mask = problem.labels != IGNORED
        compact = _use_triton(problem.hidden.device)
        hidden = problem.hidden[mask] if compact else problem.hidden.flatten(0, 1)
        targets = problem.labels[mask] if compact else problem.labels.clamp(min=0).flatten()
        size = utils._CHUNKED_LOGPROB_CHUNK_SIZE
        logps = ChunkedLogProbFunction.apply(
            hidden, problem.weight, None, targets, 1.0, size, softcap, 1.0, ("log_probs",)
        )[0]
        if compact:
            return logps.new_zeros(mask.shape).masked_scatter(mask, logps)
        return logps.view(mask.shape).masked_fill(~mask, 0)

    return _dpo_of(token_logps)


def liger(softcap: float | None = None, *, compiled: bool) -> Step:
    """Liger's fused linear DPO; it takes no reference log-probabilities, so it gets none."""
    if softcap is not None:
        raise UnavailableError("it has no soft-cap")
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    function = LigerFusedLinearDPOLoss(
        ignore_index=IGNORED, beta=BETA, compiled=compiled, use_ref_model=False
    )
    return _backwards(lambda problem: function(problem.weight, problem.hidden, problem.labels)[0])


def torch_linear_ce() -> Step:
    """PyTorch's own chunked linear cross-entropy, from 2.13 on."""
    if not hasattr(F, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def token_logps(problem: Problem) -> Tensor:
        nll = F.linear_cross_entropy(
            problem.hidden.flatten(0, 1),
            problem.weight,
            problem.labels.flatten(),
            reduction="none",
            ignore_index=IGNORED,
            options=options,
        )
        # Half-precision inputs come back in half precision; the sum at least shall not round.
        return -nll.float()

    return _dpo_of(token_logps)


def cut_cross_entropy(impl: str) -> Step:
    """Apple's cut-cross-entropy kernels, in one of the variants that they offer."""
    if not torch.cuda.is_available():
        raise UnavailableError("its kernels need CUDA")
    from cut_cross_entropy import linear_cross_entropy

    def token_logps(problem: Problem) -> Tensor:
        return -linear_cross_entropy(
            problem.hidden,
            problem.weight,
            problem.labels,
            ignore_index=IGNORED,
            reduction="none",
            impl=impl,
        ).float()

    return _dpo_of(token_logps)


@dataclass(frozen=True)
class Way:
    """A way from hidden states to loss and gradients.

    Attributes:
      load: imports what the way needs and returns its step.
      formula: the loss that it computes.
      takes_reference: whether it accepts the reference's log-probabilities.
      note: what its row in the table should say.
    """

    load: Callable[[], Step]
    formula: Formula = dpo
    takes_reference: bool = True
    note: str = ""


WAYS = {
    FLOOR: Way(partial(floor, None)),
    "full_logits": Way(full_logits),
    "trl": Way(trl),
    "liger": Way(
        partial(liger, compiled=False),
        takes_reference=False,
        note="no reference: takes the reference's hidden states, not its log-probabilities",
    ),
    "liger_compiled": Way(
        partial(liger, compiled=True), takes_reference=False, note="no reference, as liger"
    ),
    "torch_linear_ce": Way(torch_linear_ce),
    "cut_cross_entropy": Way(
        partial(cut_cross_entropy, "cce"),
        note="leaves small gradients out; the head's is summed in its own dtype",
    ),
    "cut_cross_entropy_exact": Way(partial(cut_cross_entropy, "cce_exact")),
    "spoloss": Way(partial(spoloss, dpo)),
    "spoloss_spo": Way(partial(spoloss, spo), spo),
    "spoloss_apo_down": Way(partial(spoloss, apo_down), apo_down),
    "spoloss_kto": Way(partial(spoloss, kto), kto),
}
CPU_WAYS = (
    *(FLOOR, "full_logits", "trl", "liger_compiled"),
    *("spoloss_spo", "spoloss_apo_down", "spoloss_kto"),
)
"""The fastest of each library, and a loss of the margin, of the log-ratios, of completions."""
