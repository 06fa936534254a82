"""What works under which transform, function by function: the table in docs/transforms.md."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.func import grad, hessian, jacrev, vmap

from helpers.fused import flat_logps, flat_spo
from helpers.pages import ROOT, table_below
from helpers.wings import D, P, T, V
from spoloss.torch import _tiles, sequence_logps

pytestmark = pytest.mark.usefixtures("small_tiles")

GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(2, P, T, D, generator=GENERATOR, dtype=torch.float64)
WEIGHT = torch.randn(V, D, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.randint(0, V, (2, P, T), generator=GENERATOR)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "LOGITS_BYTES", 3 * V * 8)


def by_logits(weight: Tensor) -> Tensor:
    return sequence_logps(HIDDEN[0] @ weight.t(), LABELS[0])


def by_head(weight: Tensor) -> Tensor:
    return flat_logps(HIDDEN[0], weight, LABELS[0])


def one_loss(weight: Tensor) -> Tensor:
    return flat_spo(*HIDDEN, weight, *LABELS, 0.0, 0.0).loss


def plain(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function from PyTorch's own operations."""

    def logps(side: int, weight: Tensor) -> Tensor:
        logits = (HIDDEN[side] @ weight.t())[:, :-1].log_softmax(-1)
        return logits.gather(2, LABELS[side, :, 1:, None]).sum((1, 2))

    def loss(weight: Tensor) -> Tensor:
        x = 0.1 * (logps(0, weight) - logps(1, weight))
        return (-x * torch.exp(-x)).mean()

    return loss if function is one_loss else lambda weight: logps(0, weight)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sequence_logps": by_logits,
    "linear_logps": by_head,
    "linear_..._loss": one_loss,
}
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "func.grad": lambda f: grad(lambda weight: f(weight).sum())(WEIGHT),
    "func.vmap": lambda f: vmap(f)(torch.stack([WEIGHT, 2.0 * WEIGHT])),
    "vmap of grad": lambda f: vmap(grad(lambda weight: f(weight).sum()))(
        torch.stack([WEIGHT, 2.0 * WEIGHT])
    ),
    "func.jacrev": lambda f: jacrev(f)(WEIGHT),
    "func.hessian": lambda f: hessian(lambda weight: f(weight).sum())(WEIGHT),
    "second derivative": lambda f: torch.autograd.functional.hessian(
        lambda weight: f(weight).sum(), WEIGHT
    ),
}
FUSED, TILES = "the fused head does not support torch.vmap", "fills its gradients tile by tile"
ONCE, FORWARD = "the fused head has no second derivative", "jvp function"
REFUSED = {
    ("sequence_logps", "func.jacrev"): TILES,
    ("sequence_logps", "func.hessian"): FORWARD,
    ("linear_logps", "func.vmap"): FUSED,
    ("linear_logps", "vmap of grad"): FUSED,
    ("linear_logps", "func.jacrev"): TILES,
    ("linear_logps", "func.hessian"): FORWARD,
    ("linear_logps", "second derivative"): ONCE,
    ("linear_..._loss", "func.vmap"): FUSED,
    ("linear_..._loss", "vmap of grad"): FUSED,
    ("linear_..._loss", "func.hessian"): FORWARD,
    ("linear_..._loss", "second derivative"): ONCE,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms(name: str, transform: str) -> None:
    function, apply = FUNCTIONS[name], TRANSFORMS[transform]
    if (name, transform) in REFUSED:
        with pytest.raises((RuntimeError, NotImplementedError), match=REFUSED[name, transform]):
            apply(function)
    else:
        torch.testing.assert_close(apply(function), apply(plain(function)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name: str) -> None:
    weight = WEIGHT.clone().requires_grad_()
    assert torch.autograd.gradcheck(FUNCTIONS[name], weight)
    if (name, "second derivative") not in REFUSED:
        assert torch.autograd.gradgradcheck(FUNCTIONS[name], weight)


def test_batched_upstream_gradients() -> None:
    """`is_grads_batched` scales the gradients of one pass, which are made once, several times."""
    weight = WEIGHT.clone().requires_grad_()
    factors = torch.tensor([1.0, -2.0], dtype=torch.float64)
    (got,) = torch.autograd.grad(one_loss(weight), weight, factors, is_grads_batched=True)
    (want,) = torch.autograd.grad(one_loss(weight), weight)
    torch.testing.assert_close(got, factors[:, None, None] * want)
    upstream = torch.eye(P, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=re.escape("torch.autograd.functional.jacobian")):
        torch.autograd.grad(by_head(weight), weight, upstream, is_grads_batched=True)


def test_a_frozen_head_under_torch_func() -> None:
    """Its directions are known after the forward, so that jacrev works too."""
    fused = lambda states: flat_logps(states, WEIGHT, LABELS[0])  # noqa: E731
    plain = lambda states: sequence_logps(states @ WEIGHT.t(), LABELS[0])  # noqa: E731
    torch.testing.assert_close(jacrev(fused)(HIDDEN[0]), jacobian(plain, HIDDEN[0]))
    squared = lambda states: fused(states).square().sum()  # noqa: E731
    want = grad(lambda states: plain(states).square().sum())(HIDDEN[0])
    torch.testing.assert_close(grad(squared)(HIDDEN[0]), want)
    with pytest.raises(RuntimeError, match=ONCE):
        grad(lambda states: grad(squared)(states).sum())(HIDDEN[0])


def test_the_page_says_so() -> None:
    columns, rows = table_below((ROOT / "docs" / "transforms.md").read_text(), "### spoloss.torch")
    assert columns == list(TRANSFORMS)
    for name in FUNCTIONS:
        cells = ["error" if (name, column) in REFUSED else "yes" for column in columns]
        assert rows[f"`{name}`"] == cells
