"""The ways from hidden states to the gradients of a preference loss, for `bench_fused`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fused_problem import BETA, IGNORED, Problem, dpo, mean_loss, spo

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
    """DPO by hand after a way to the log-probabilities [2P, T], 0 where the label is ignored."""
    return _backwards(
        lambda problem: mean_loss(
            dpo, token_logps(problem).view(problem.labels.shape).sum(1), problem.reference
        )
    )


def full_logits() -> Step:
    """All logits at once, cross-entropy in float32, autograd: the best that is typed by hand."""

    def token_logps(problem: Problem) -> Tensor:
        logits = F.linear(problem.hidden, problem.weight).flatten(0, 1).float()
        labels = problem.labels.flatten()
        return -F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)

    return _dpo_of(token_logps)


def trl() -> Step:
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
            hidden, problem.weight, None, targets, 1.0, size, None, 1.0, ("log_probs",)
        )[0]
        if compact:
            return logps.new_zeros(mask.shape).masked_scatter(mask, logps)
        return logps.view(mask.shape).masked_fill(~mask, 0)

    return _dpo_of(token_logps)


def liger(*, compiled: bool) -> Step:
    """Liger's fused linear DPO; it takes no reference log-probabilities, so it gets none."""
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


def spoloss(name: str) -> Step:
    """The one-pass loss of this package, by name."""
    import spoloss.torch

    if not hasattr(spoloss.torch, name):
        raise UnavailableError(f"spoloss.torch has no {name}")
    function = getattr(spoloss.torch, name)

    def loss(problem: Problem) -> Tensor:
        return function(
            problem.chosen,
            problem.rejected,
            problem.weight,
            *problem.labels.chunk(2),
            *problem.reference.chunk(2),
            beta=BETA,
            shift=False,
        ).loss

    return _backwards(loss)


@dataclass(frozen=True)
class Way:
    """A way from hidden states to loss and gradients.

    Attributes:
      load: imports what the way needs and returns its step.
      color: of its bars.
      formula: the loss of x = beta * margin that it computes.
      takes_reference: whether it accepts the reference's log-probabilities.
      note: what its row in the table should say.
    """

    load: Callable[[], Step]
    color: str
    formula: Callable[[Tensor], Tensor] = dpo
    takes_reference: bool = True
    note: str = ""


FLOOR = "matmul_floor"
FULL = "full_logits"
WAYS = {
    FLOOR: Way(lambda: floor(None), "black"),
    FULL: Way(full_logits, "tab:gray"),
    "trl": Way(trl, "tab:blue"),
    "liger": Way(
        lambda: liger(compiled=False),
        "tab:cyan",
        takes_reference=False,
        note="no reference: takes the reference's hidden states, not its log-probabilities",
    ),
    "liger_compiled": Way(
        lambda: liger(compiled=True),
        "tab:purple",
        takes_reference=False,
        note="no reference, as liger",
    ),
    "torch_linear_ce": Way(torch_linear_ce, "tab:green"),
    "cut_cross_entropy": Way(
        lambda: cut_cross_entropy("cce"),
        "tab:olive",
        note="leaves small gradients out; the head's is summed in its own dtype",
    ),
    "cut_cross_entropy_exact": Way(lambda: cut_cross_entropy("cce_exact"), "tab:brown"),
    "spoloss": Way(lambda: spoloss("linear_dpo_loss"), "tab:red"),
    "spoloss_spo": Way(lambda: spoloss("linear_spo_loss"), "tab:orange", formula=spo),
}
IGNORING_WAYS = (FLOOR, FULL, "spoloss", "spoloss_spo")
"""The ways that also run with most labels ignored."""
