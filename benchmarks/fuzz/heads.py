"""Generated cases of the fused heads against logits in float64 and formulas written out here."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import spoloss.torch
from benchmarks.fuzz.checks import Finding

IGNORED = -100


@dataclass(frozen=True)
class Case:
    """One call of a fused function of a wing."""

    title: str
    loss: str
    seed: int
    shape: dict[str, int]
    dtype: torch.dtype
    grads: tuple[bool, ...]
    options: dict[str, Any] = field(default_factory=dict)
    of_loss: dict[str, Any] = field(default_factory=dict)


def draw(rng: random.Random) -> Case:
    """A head with options of every kind, small enough for thousands of cases."""
    loss = rng.choice(("spo", "dpo", "squared", "ipo"))
    options: dict[str, Any] = {"beta": rng.choice((0.1, 0.05, 0.5))}
    for name, values in {
        "shift": (True, False),
        "average": (True, False),
        "softcap": (None, None, 5.0, 30.0),
        "logit_scale": (1.0, 0.5, 1.5),
        "temperature": (1.0, 0.7, 2.0),
        "chunk_size": (None, 1, 2, 3, 7, 20, 1000),
        "reduction": ("mean", "sum", "none"),
        "nll_weight": (0.0, 0.0, 0.3, 1.0),
    }.items():
        if rng.random() < 0.6:
            options[name] = rng.choice(values)
    of_loss: dict[str, Any] = {}
    if loss == "spo" and rng.random() < 0.5:
        of_loss["linear_below"] = rng.choice((-2.0, 0.0, 0.5))
    if loss == "dpo" and rng.random() < 0.5:
        of_loss["label_smoothing"] = rng.choice((0.1, 0.3))
    if loss in ("spo", "squared") and rng.random() < 0.3:
        of_loss["reward_gap"] = rng.choice((0.5, 2.0))
    ints = {
        "pairs": (1, 6),
        "chosen": (1, 9),
        "rejected": (1, 9),
        "width": (1, 6),
        "words": (2, 40),
    }
    grads = tuple(rng.random() < 0.7 for _ in range(4))
    return Case(
        title="torch, fused head",
        loss=loss,
        seed=rng.randrange(2**31),
        shape={name: rng.randint(*ends) for name, ends in ints.items()},
        dtype=rng.choice((torch.float64, torch.float64, torch.float32)),
        grads=grads if any(grads) else (True, *grads[1:]),
        options=options,
        of_loss=of_loss,
    )


def check(case: Case) -> int:
    """Loss, log-probabilities and gradients; returns how many values were compared."""
    inputs = Inputs(case)
    try:
        got = inputs.fused()
        wanted = [t for t in inputs.tensors if t.requires_grad]
        grads = torch.autograd.grad((got.loss * inputs.upstream(got.loss)).sum(), wanted)
    except Exception as error:
        raise Finding(f"{type(error).__name__}: {error}") from error
    loss, logps, twins = inputs.by_logits()
    exact = torch.autograd.grad(
        (loss * inputs.upstream(loss)).sum(),
        [t for t in twins if t.requires_grad],
        allow_unused=True,
    )
    exact = [
        torch.zeros_like(t) if g is None else g
        for t, g in zip([t for t in twins if t.requires_grad], exact, strict=True)
    ]
    names = ("loss", "chosen_logps", "rejected_logps", *(f"gradient {i}" for i in range(4)))
    found = (got.loss, got.chosen_logps, got.rejected_logps, *grads)
    right = (loss.detach(), *(side.detach() for side in logps), *exact)
    return sum(
        _close(case, name, mine, theirs)
        for name, mine, theirs in zip(names[: len(found)], found, right, strict=True)
    )


def _close(case: Case, name: str, got: Tensor, want: Tensor) -> int:
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-4}[case.dtype]
    size = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    if not (got.double() - want).abs().le(tolerance * size).all():
        off = float((got.double() - want).abs().max())
        raise Finding(f"{name} is {off:.3g} off, at a size of {size:.3g}")
    return got.numel()


class Inputs:
    """The tensors of a case, and its two ways to the loss."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(case.seed)
        pairs, d, v = (case.shape[name] for name in ("pairs", "width", "words"))
        shapes = (
            (pairs, case.shape["chosen"], d),
            (pairs, case.shape["rejected"], d),
            (v, d),
            (v,),
        )
        self.tensors = [
            torch.randn(shape, generator=generator, dtype=torch.float64)
            .to(case.dtype)
            .requires_grad_(grad)
            for shape, grad in zip(shapes, case.grads, strict=True)
        ]
        self.labels = []
        for tensor in self.tensors[:2]:
            labels = torch.randint(0, v, tensor.shape[:2], generator=generator)
            ignored = torch.rand(labels.shape, generator=generator) < 0.3
            self.labels.append(labels.masked_fill(ignored, IGNORED))
        self.reference = -5.0 * torch.rand(2, pairs, generator=generator, dtype=torch.float64)
        self.weights = torch.randint(0, 3, (pairs,), generator=generator).double()

    def upstream(self, loss: Tensor) -> Tensor:
        """A gradient that is another for each pair."""
        return torch.arange(1.0, loss.numel() + 1.0, dtype=torch.float64).view(loss.shape)

    def fused(self) -> Any:
        """The package's way."""
        chosen, rejected, weight, bias = self.tensors
        function = getattr(spoloss.torch, f"linear_{self.case.loss}_loss")
        options = {**self.case.options, **self.case.of_loss, "weights": self.weights}
        return function(
            chosen, rejected, weight, *self.labels, *self.reference, bias=bias, **options
        )

    def by_logits(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The long way: loss, log-probabilities, and the tensors to differentiate by."""
        twins = [t.detach().double().requires_grad_(t.requires_grad) for t in self.tensors]
        shift = self.case.options.get("shift", True)
        sides, means = [], []
        for hidden, labels in zip(twins[:2], self.labels, strict=True):
            logits = self._logits(hidden, *twins[2:])
            if shift:
                logits, labels = logits[:, :-1], labels[:, 1:]
            counts = labels != IGNORED
            at_label = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            total = torch.where(counts, at_label, 0.0).sum(1)
            means.append(total / counts.sum(1).clamp(min=1))
            sides.append(means[-1] if self.case.options.get("average") else total)
        margin = (sides[0] - self.reference[0]) - (sides[1] - self.reference[1])
        values = self._formula(margin) - self.case.options.get("nll_weight", 0.0) * means[0]
        values = self.weights * values
        reduction = self.case.options.get("reduction", "mean")
        loss = {"mean": values.mean(), "sum": values.sum(), "none": values}[reduction]
        return loss, sides, twins

    def _logits(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        options = self.case.options
        z = (hidden @ weight.t() + bias) * options.get("logit_scale", 1.0)
        cap = options.get("softcap")
        z = z if cap is None else cap * torch.tanh(z / cap)
        return z / options.get("temperature", 1.0)

    def _formula(self, h: Tensor) -> Tensor:
        of_loss, x = self.case.of_loss, h * self.case.options["beta"]
        x = x / of_loss.get("reward_gap", 1.0)
        if self.case.loss == "spo":
            x0 = torch.tensor(of_loss.get("linear_below", -1e3), dtype=torch.float64)
            near = torch.maximum(x, x0)
            tangent = (x0 - 1.0) * torch.exp(-x0) * (x - near) if x0 > -1e3 else 0.0
            return -near * torch.exp(-near) + tangent
        if self.case.loss == "dpo":
            e = of_loss.get("label_smoothing", 0.0)
            return (1 - e) * torch.log1p(torch.exp(-x)) + e * torch.log1p(torch.exp(x))
        target = {"ipo": 0.5, "squared": of_loss.get("reward_gap", 1.0)}[self.case.loss]
        return (h - target / self.case.options["beta"]) ** 2
