"""The problem that `bench_fused` sets, the ways to solve it, and its solution in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BETA = 0.1
IGNORED = -100
EXACT_ROWS = 256
FLOOR_ROWS = (None, 256, 512, 1024)
"""Heights of the floor's row tiles that are tried; None is all rows in one piece."""

Step = Callable[["Problem"], Tensor]
"""Forward and backward of the loss on a problem; returns the loss, leaves gradients in `.grad`."""


class UnavailableError(Exception):
    """A way cannot run here; the message says why."""


@dataclass(frozen=True)
class Problem:
    """What comes out of a language model: hidden states, head, labels; and the reference.

    Some ways want both sides in one tensor and some apart. `hidden` and (`chosen`, `rejected`)
    are separate autograd leaves over the same memory, so that none pays for another's layout.

    Attributes:
      hidden: chosen, then rejected sequences, [2P, T, D].
      chosen: the first half of `hidden`, [P, T, D].
      rejected: the second half of `hidden`, [P, T, D].
      weight: the head, [V, D]; without requires_grad where it is frozen.
      labels: position t predicts label t, [2P, T].
      reference: log-probabilities under the reference, float32, [2P].
    """

    hidden: Tensor
    chosen: Tensor
    rejected: Tensor
    weight: Tensor
    labels: Tensor
    reference: Tensor

    @classmethod
    def over(cls, hidden: Tensor, weight: Tensor, labels: Tensor, reference: Tensor) -> Problem:
        """A problem whose leaves share the memory of `hidden`."""
        leaves = [part.detach().requires_grad_() for part in (hidden, *hidden.chunk(2))]
        return cls(*leaves, weight, labels, reference)

    def middle(self, tokens: int) -> Problem:
        """The same sequences, cut to `tokens` labels that count in each."""
        start = self.labels.shape[1] // 2
        cut = slice(start, start + tokens)
        hidden = self.hidden.detach()[:, cut].contiguous()
        return Problem.over(hidden, self.weight, self.labels[:, cut].contiguous(), self.reference)

    def without_reference(self) -> Problem:
        """The same with a reference that finds everything certain, log-probability 0."""
        return replace(self, reference=torch.zeros_like(self.reference))

    def clear(self) -> None:
        """Drop the gradients."""
        for leaf in (self.hidden, self.chosen, self.rejected, self.weight):
            leaf.grad = None

    def gradients(self) -> list[Tensor]:
        """The gradients that a step has left: of the hidden states [2P, T, D], and of the head."""
        hidden = self.hidden.grad
        if hidden is None:
            hidden = torch.cat([self.chosen.grad, self.rejected.grad])
        return [hidden] if self.weight.grad is None else [hidden, self.weight.grad]


def make_problem(
    pairs: int,
    tokens: int,
    width: int,
    vocab: int,
    *,
    dtype: torch.dtype,
    device: str,
    frozen: bool,
    ignored: float,
) -> Problem:
    """A random problem, the same at each call; logits and hidden states have unit variance."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    hidden = normal(2 * pairs, tokens, width).to(dtype)
    weight = (normal(vocab, width) / math.sqrt(width)).to(dtype).requires_grad_(not frozen)
    labels = torch.randint(vocab, (2 * pairs, tokens), generator=generator, device=device)
    ignore(labels, ignored)
    # Margins between 1 and 6 nats. Without the policy's own log-probabilities in the reference
    # they would grow with the length and push the slopes to 0 or, with SPO, to infinity.
    nats = 0.5 + 2.5 * torch.rand(pairs, generator=generator, device=device)
    with torch.no_grad():
        reference = logps_in_tiles(hidden.float(), weight.float(), labels)
    reference += torch.cat([-nats, nats])
    return Problem.over(hidden, weight, labels, reference)


def ignore(labels: Tensor, share: float) -> None:
    """Ignore a share of each row's labels: a prompt in front and padding at the end.

    Both vary from pair to pair: the prompt takes half to four fifths of what is ignored.
    """
    pairs, tokens = len(labels) // 2, labels.shape[1]
    total = round(share * tokens)
    for pair, part in enumerate(torch.linspace(0.5, 0.8, pairs).tolist()):
        prompt = round(part * total)
        for row in (labels[pair], labels[pairs + pair]):
            row[:prompt] = IGNORED
            row[tokens - (total - prompt) :] = IGNORED


# ------------------------------------------------------------------------------------- the losses


def dpo(x: Tensor) -> Tensor:
    """DPO eq. 7 of x = beta * margin."""
    return -F.logsigmoid(x)


def spo(x: Tensor) -> Tensor:
    """SPO, paper eq. 6, of x = beta * margin."""
    return -x * torch.exp(-x)


def mean_loss(formula: Callable[[Tensor], Tensor], logps: Tensor, reference: Tensor) -> Tensor:
    """The mean loss of sequence log-probabilities [2P], chosen first."""
    chosen, rejected = (logps - reference).chunk(2)
    return formula(BETA * (chosen - rejected)).mean()


def logps_in_tiles(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sequence log-probabilities in the dtype of `hidden`, without keeping logits. Slow."""

    def nll(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ weight.T, labels, reduction="sum", ignore_index=IGNORED)

    def logp(row: Tensor, row_labels: Tensor) -> Tensor:
        tiles = zip(row.split(EXACT_ROWS), row_labels.split(EXACT_ROWS), strict=True)
        return -sum(checkpoint(nll, tile, weight, y, use_reentrant=False) for tile, y in tiles)

    return torch.stack([logp(*row) for row in zip(hidden, labels, strict=True)])


def max_error(problem: Problem, loss: float, formula: Callable[[Tensor], Tensor]) -> float:
    """The largest error of a solution against full logits in float64, relative to the largest.

    Args:
      problem: solved: its gradients are in place.
      loss: as the way found it.
      formula: the loss of x that the way computes.

    Returns:
      The maximum over loss, hidden and head gradient of max|got - want| / max|want|.
    """
    got = [torch.tensor(loss, dtype=torch.float64), *problem.gradients()]
    hidden = problem.hidden.detach().double().requires_grad_()
    weight = problem.weight.detach().double().requires_grad_(problem.weight.requires_grad)
    logps = logps_in_tiles(hidden, weight, problem.labels)
    exact = mean_loss(formula, logps, problem.reference.double())
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    want = [exact.detach(), *torch.autograd.grad(exact, leaves)]
    if len(got) != len(want):  # a gradient is missing, or was made for a frozen head
        return math.inf
    return max(
        ((g.to(w.device) - w).abs().max() / w.abs().max()).item()
        for g, w in zip(got, want, strict=True)
    )


# --------------------------------------------------------------------------------------- the ways


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
