"""Half precision: as near to float64 as half-precision logits, under a loss scale too."""

from __future__ import annotations

import math

import numpy as np
import pytest

from helpers.fused import cut_blocks
from helpers.wings import HEAD, STATES, WINGS, Wing, check_half_precision

HALF = ["bfloat16", "float16"]
NEEDS = [(*STATES, *HEAD), STATES]


@pytest.mark.parametrize("need", NEEDS, ids=["trained", "frozen"])
@pytest.mark.parametrize(
    ("dtype", "loss_scale"), [("bfloat16", 1.0), ("float16", 1.0), ("float16", 2.0**24)]
)
@pytest.mark.parametrize("chunk_size", [3, None])
def test_half_precision_is_no_worse_than_the_naive_path(
    wing: Wing, dtype: str, loss_scale: float, need: tuple[str, ...], chunk_size: int | None
) -> None:
    check_half_precision(wing, dtype, need, chunk_size, loss_scale=loss_scale)


@pytest.mark.parametrize("columns", [1, 5])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("chunk_size", [3, None])
def test_block_by_block(
    dtype: str, chunk_size: int | None, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch in blocks of one or five of the 13 entries."""
    cut_blocks(monkeypatch, columns)
    check_half_precision(WINGS["torch"], dtype, NEEDS[0], chunk_size)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_scale_keeps_the_gradient_of_a_sure_token(
    wing: Wing, *, compiled: bool, trained: bool
) -> None:
    """Its derivative is 8e-8, which float16 cannot hold before it is scaled."""
    scale, labels = 2.0**16, wing.array([[0]])
    arrays = {
        "weight": wing.array(20.0 * np.eye(3, 2), "float16"),  # logits 20, 0, 0
        "hidden": wing.array([[[1.0, 0.0]]], "float16"),
    }

    def call(a: dict[str, object]) -> object:
        side = wing.api.Completions(a["hidden"], labels, shift=False)
        return wing.api.linear_logps(wing.api.Head(a["weight"]), side).sum() * scale

    call = wing.compiled(call) if compiled else call
    _, grads = wing.grads(call, arrays, ["hidden", *(["weight"] if trained else [])])
    assert grads["hidden"].dtype == np.float16
    expected = 20.0 * 2.0 * math.exp(-20.0) * scale
    np.testing.assert_allclose(float(grads["hidden"][0, 0, 0]), expected, rtol=1e-3)
