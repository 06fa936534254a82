"""The problem that every way solves in `bench_fused`, and its solution in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.real_head import IGNORED, RealHead

BETA = 0.1
EXACT_ROWS = 256


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

    def tiny(self) -> Problem:
        """The same head with two tokens in each sequence, to load every library."""
        hidden = self.hidden.detach()[:, :2].contiguous()
        labels = torch.zeros_like(self.labels[:, :2]).contiguous()
        return Problem.over(hidden, self.weight, labels, self.reference)

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


def random_problem(
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
    return Problem.over(hidden, weight, labels, _reference(hidden, weight, labels))


def real_problem(head: RealHead, *, dtype: torch.dtype, device: str, frozen: bool) -> Problem:
    """The problem that a language model's head sets on its hidden states of real text."""
    hidden = torch.as_tensor(head.hidden, dtype=dtype, device=device)
    weight = head.weight().to(device, dtype).requires_grad_(not frozen)
    labels = torch.as_tensor(head.labels, device=device)
    return Problem.over(hidden, weight, labels, _reference(hidden, weight, labels))


def _reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of a reference for which the margins lie between 1 and 6 nats.

    Without the policy's own log-probabilities in it, margins would grow with the length and push
    the slopes to 0 or, with SPO, to infinity.
    """
    generator = torch.Generator(hidden.device).manual_seed(0)
    nats = 0.5 + 2.5 * torch.rand(len(hidden) // 2, generator=generator, device=hidden.device)
    with torch.no_grad():
        reference = logps_in_tiles(hidden.float(), weight.float(), labels)
    return reference + torch.cat([-nats, nats])


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
        if not torch.is_grad_enabled():  # checkpoint imports the compiler, which takes seconds
            return -sum(nll(tile, weight, y) for tile, y in tiles)
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
