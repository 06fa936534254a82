"""The problem of `benchmarks.fused`: hidden states, head, labels, reference; and its solution."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BETA = 0.1
IGNORED = -100
"""The label of tokens that do not count."""
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
    pairs: int, tokens: int, width: int, vocab: int, *, dtype: torch.dtype, device: str
) -> Problem:
    """A random problem, the same at each call; logits and hidden states have unit variance."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    hidden = normal(2 * pairs, tokens, width).to(dtype)
    weight = (normal(vocab, width) / math.sqrt(width)).to(dtype)
    labels = torch.randint(vocab, (2 * pairs, tokens), generator=generator, device=device)
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


# ------------------------------------------------------------------------------ a real model's head


class Shape(NamedTuple):
    """What `write_states` found: P, T, D and V, and the share of the labels that are ignored."""

    size: tuple[int, int, int, int]
    ignored: float


def write_states(model: str, pairs: Path, count: int, path: Path) -> Shape:
    """Run a language model over preference pairs, and keep its head, last states and labels.

    Args:
      model: a Transformers folder, or a name on the Hugging Face Hub.
      pairs: JSON lines with prompt, chosen and rejected.
      count: how many of them.
      path: the .safetensors file to write; the states are 0 where the label is ignored.
    """
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rows = [json.loads(line) for line in pairs.read_text().splitlines()[:count]]
    found = [
        _states(whole.base_model, tokenizer, row["prompt"], row[side])
        for side in ("chosen", "rejected")
        for row in rows
    ]
    padded = torch.nn.utils.rnn.pad_sequence
    hidden = padded([states for states, _ in found], batch_first=True)
    labels = padded([labels for _, labels in found], batch_first=True, padding_value=IGNORED)
    hidden = hidden.masked_fill(labels[..., None] == IGNORED, 0.0)
    weight = whole.get_output_embeddings().weight.detach()
    save_file({"hidden": hidden, "labels": labels, "weight": weight.clone()}, path)
    vocab, width = weight.shape
    ignored = (labels == IGNORED).float().mean().item()
    return Shape((len(rows), labels.shape[1], width, vocab), ignored)


def _states(
    model: torch.nn.Module, tokenizer: object, prompt: str, completion: str
) -> tuple[Tensor, Tensor]:
    """Hidden states [T, D] and labels [T] of a prompt with its completion."""
    turns = [{"role": "user", "content": prompt}]
    start = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    end = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        states = model(torch.tensor([start + end])).last_hidden_state[0, :-1]
    return states, torch.tensor([IGNORED] * (len(start) - 1) + end)


def real_problem(path: Path, *, dtype: torch.dtype, device: str) -> Problem:
    """The problem of a file that `write_states` has written."""
    from safetensors.torch import load_file

    found = load_file(path, device=device)
    hidden, weight = found["hidden"].to(dtype), found["weight"].to(dtype)
    return Problem.over(
        hidden, weight, found["labels"], _reference(hidden, weight, found["labels"])
    )


# ------------------------------------------------------------------------------------- the losses


def dpo(chosen: Tensor, rejected: Tensor) -> Tensor:
    """DPO eq. 7 of the log-ratios [P] of both sides."""
    return -F.logsigmoid(BETA * (chosen - rejected))


def spo(chosen: Tensor, rejected: Tensor) -> Tensor:
    """SPO, paper eq. 6."""
    x = BETA * (chosen - rejected)
    return -x * torch.exp(-x)


def apo_down(chosen: Tensor, rejected: Tensor, beta: float = BETA) -> Tensor:
    """APO-down, as in TRL: a loss of the two log-ratios, not of their difference alone."""
    return torch.sigmoid(beta * chosen) - torch.sigmoid(beta * (chosen - rejected)) + 1.0


def kto(chosen: Tensor, rejected: Tensor) -> Tensor:
    """KTO eq. 8 with the batch's mean log-ratio as its reference point: a loss of completions."""
    ratios = torch.cat([chosen, rejected])
    point = ratios.mean().clamp(min=0.0).detach()
    signs = torch.cat([torch.ones_like(chosen), -torch.ones_like(rejected)])
    return 1.0 - torch.sigmoid(BETA * signs * (ratios - point))


Formula = Callable[[Tensor, Tensor], Tensor]


def mean_loss(formula: Formula, logps: Tensor, reference: Tensor) -> Tensor:
    """The mean loss of sequence log-probabilities [2P], chosen first."""
    return formula(*(logps - reference).chunk(2)).mean()


# --------------------------------------------------------------------------- the solution, checked


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


def max_error(problem: Problem, loss: float, formula: Formula) -> float:
    """The largest error of a solution against full logits in float64, relative to the largest.

    Args:
      problem: solved: its gradients are in place.
      loss: as the way found it.
      formula: the loss that the way computes.

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
