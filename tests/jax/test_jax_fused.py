"""The fused losses of JAX: constants among the results, and the number of matrix products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from helpers.wings import (
    STATES,
    WINGS,
    APODown,
    completions_of,
    fused,
    head_of,
    make_arrays,
)
from spoloss import SPO
from spoloss.jax import (
    Head,
    linear_logps,
    linear_pair_loss,
)

pytestmark = pytest.mark.usefixtures("quick_compiler")

JAX = WINGS["jax"]


def test_log_probabilities_are_returned_as_constants() -> None:
    arrays = make_arrays(JAX)
    sides = [completions_of(JAX, arrays, side, {}) for side in ("chosen", "rejected")]

    def metric(head: Head) -> Any:
        out = linear_pair_loss(SPO(), head, *sides, 0.0, 0.0, beta=0.1)
        return out.chosen_logps.sum() + out.rejected_logps.sum(), out

    head = head_of(JAX, arrays, {})
    grad, out = jax.grad(metric, has_aux=True)(head)
    assert not grad.weight.any()
    for side, logps in zip(sides, (out.chosen_logps, out.rejected_logps), strict=True):
        np.testing.assert_allclose(logps, linear_logps(head, side), rtol=1e-12)


@pytest.mark.parametrize(
    ("wanted", "reduction", "products"),
    [
        ((), "mean", 1),
        (STATES, "mean", 2),
        (STATES, "none", 2),
        (("weight",), "mean", 2),
        ((*STATES, "weight"), "mean", 3),
        ((*STATES, "weight"), "none", 4),
    ],
)
@pytest.mark.parametrize("loss", [SPO(), APODown()], ids=["margin", "pair"])
def test_products_per_token(
    loss: Any, wanted: tuple[str, ...], reduction: str, products: int
) -> None:
    """The matrix products in the program of a batch whose pairs share a tile."""
    arrays = make_arrays(JAX)
    del arrays["bias"]
    arrays["weight"] = jnp.ones((16, arrays["weight"].shape[1]))  # its update is one slice in eight

    def total(by: dict[str, Array]) -> Array:
        return fused(JAX, loss, {**arrays, **by}, reduction=reduction, softcap=2.0).loss.sum()

    by = {name: arrays[name] for name in wanted}
    program = str(jax.make_jaxpr(jax.grad(total) if wanted else total)(by))
    assert program.count("dot_general") == products
