"""What works under which transform, function by function: the table in docs/transforms.md."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from helpers.pages import ROOT, table_below
from helpers.wings import D, P, T, V
from spoloss.jax import Completions, Head, linear_logps, linear_spo_loss, sequence_logps

pytestmark = pytest.mark.usefixtures("quick_compiler")

RANDOM = np.random.default_rng(0)
HIDDEN = jnp.asarray(RANDOM.normal(size=(2, P, T, D)))
WEIGHT = jnp.asarray(RANDOM.normal(size=(V, D)))
LABELS = jnp.asarray(RANDOM.integers(0, V, (2, P, T)))
SIDES = [Completions(HIDDEN[side], LABELS[side]) for side in (0, 1)]
TWO = jnp.stack([WEIGHT, 2.0 * WEIGHT])
Function = Callable[[Array], Array]


def by_logits(weight: Array) -> Array:
    return sequence_logps(HIDDEN[0] @ weight.T, LABELS[0]).sum()


def by_head(weight: Array) -> Array:
    return linear_logps(Head(weight, chunk_size=12), SIDES[0]).sum()


def one_loss(weight: Array) -> Array:
    return linear_spo_loss(Head(weight, chunk_size=12), *SIDES, 0.0, 0.0, beta=0.1).loss


def plain(function: Function) -> Function:
    """The same function from JAX's own operations; one function for all log-probabilities."""

    def logps(side: int, weight: Array) -> Array:
        logits = jax.nn.log_softmax((HIDDEN[side] @ weight.T)[:, :-1])
        return jnp.take_along_axis(logits, LABELS[side, :, 1:, None], axis=2).sum((1, 2))

    def loss(weight: Array) -> Array:
        x = 0.1 * (logps(0, weight) - logps(1, weight))
        return (-x * jnp.exp(-x)).mean()

    return loss if function is one_loss else lambda weight: logps(0, weight).sum()


@functools.cache
def by_jax(name: str, transform: str) -> Any:
    """The result of a transform of the plain function."""
    function, apply = plain(FUNCTIONS[name]), TRANSFORMS[transform]
    return jax.jit(lambda: apply(function))()


def accumulated(function: Function) -> Array:
    """Micro-batches in a scan, gradients added up."""

    def step(total: Array, factor: Array) -> tuple[Array, None]:
        return total + jax.grad(lambda weight: function(factor * weight))(WEIGHT), None

    return jax.lax.scan(step, jnp.zeros_like(WEIGHT), jnp.array([1.0, 0.5]))[0]


FUNCTIONS: dict[str, Function] = {
    "sequence_logps": by_logits,
    "linear_logps": by_head,
    "linear_..._loss": one_loss,
}
TRANSFORMS: dict[str, Callable[[Function], Any]] = {
    "jit": lambda f: jax.jit(f)(WEIGHT),
    "jit of value_and_grad": lambda f: jax.jit(jax.value_and_grad(f))(WEIGHT),
    "grad of jit": lambda f: jax.grad(jax.jit(f))(WEIGHT),
    "grad of checkpoint": lambda f: jax.jit(jax.grad(jax.checkpoint(f)))(WEIGHT),
    "grad of scan": lambda f: jax.grad(
        lambda weight: jax.lax.scan(
            lambda total, factor: (total + f(factor * weight), None), 0.0, jnp.array([1.0, 0.5])
        )[0]
    )(WEIGHT),
    "scan of grad": accumulated,
    "vmap": lambda f: jax.vmap(f)(TWO),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f))(TWO),
    "jvp": lambda f: jax.jvp(f, (WEIGHT,), (WEIGHT,)),
    "jvp of grad": lambda f: jax.jvp(jax.grad(f), (WEIGHT,), (jnp.ones_like(WEIGHT),)),
    "grad of grad": lambda f: jax.grad(lambda weight: (jax.grad(f)(weight) ** 2).sum())(WEIGHT),
}
FORWARD = "(jvp) to a custom_vjp function"
TWICE = "Reverse-mode differentiation does not work for lax.while_loop"
REFUSED = {
    ("linear_logps", "jvp"): FORWARD,
    ("linear_logps", "grad of grad"): TWICE,
    ("linear_..._loss", "jvp"): FORWARD,
    ("linear_..._loss", "grad of grad"): TWICE,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms(name: str, transform: str) -> None:
    function, apply = FUNCTIONS[name], TRANSFORMS[transform]
    if (name, transform) in REFUSED:
        with pytest.raises((TypeError, ValueError), match=re.escape(REFUSED[name, transform])):
            apply(function)
        return
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11),
        apply(function),
        by_jax("linear_..._loss" if function is one_loss else "linear_logps", transform),
    )


@pytest.mark.parametrize("context", ["grad", "jit", "checkpoint", "scan"])
def test_a_frozen_head_makes_no_gradient_of_its_size(context: str) -> None:
    """Whatever surrounds it: nothing of [V, D] is in the program but the weight itself."""
    entries = 23

    def loss(hidden: Array, weight: Array) -> Array:
        sides = map(Completions, hidden, LABELS % entries)
        return linear_spo_loss(Head(weight), *sides, 0.0, 0.0, beta=0.1).loss

    def scanned(hidden: Array, weight: Array) -> Array:
        step = lambda total, _: (total + loss(hidden, weight), None)  # noqa: E731
        return jax.lax.scan(step, 0.0, None, length=2)[0]

    around = {
        "grad": loss,
        "jit": jax.jit(loss),
        "checkpoint": jax.checkpoint(loss),
        "scan": scanned,
    }[context]
    weight = jnp.asarray(RANDOM.normal(size=(entries, D)))
    zeros = re.compile(rf"broadcast_in_dim[^\n]*-> tensor<{entries}x{D}xf64>")
    for wanted, found in ((0, False), ((0, 1), True)):
        program = jax.jit(jax.grad(around, wanted)).lower(HIDDEN, weight).as_text()
        assert bool(zeros.search(program)) is found


def test_the_page_says_so() -> None:
    columns, rows = table_below((ROOT / "docs" / "transforms.md").read_text(), "### spoloss.jax")
    assert columns == list(TRANSFORMS)
    for name in FUNCTIONS:
        cells = ["error" if (name, column) in REFUSED else "yes" for column in columns]
        assert rows[f"`{name}`"] == cells
