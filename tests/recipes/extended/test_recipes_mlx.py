"""The MLX recipe makes the gradient of equation 6, on the CPU, and sees a reference that changes.

Arrays are float64, but MLX 0.32 takes float64's exponential on the CPU in single precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.optimizers import SGD

from helpers.recipes_oracle import (
    BETA,
    PAIRS,
    MeanOfEmbeddings,
    assert_step,
    exact_step,
    load,
    moved,
    run_script,
)


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with mx.stream(mx.cpu):  # a GPU of Apple has no float64
        yield


def weights(model: Any) -> dict[str, np.ndarray]:
    return {name: np.array(model[name]) for name in ("embed", "head")}


def setup() -> tuple[Any, Any, Any]:
    """Policy, reference, and the compiled step of descent at rate 1."""
    policy, reference = (load("toy_mlx").model(mx.float64) for _ in range(2))
    new = moved(weights(reference))
    reference.update({name: mx.array(w, mx.float64) for name, w in new.items()})
    reference.freeze()
    return policy, reference, load("mlx_nn").make_train_step(policy, reference, SGD(1.0), BETA)


def check(policy: Any, reference: Any, train_step: Any) -> None:
    before = weights(policy)
    sides = MeanOfEmbeddings(before), MeanOfEmbeddings(weights(reference))
    exact = exact_step(*sides, PAIRS)
    loss = train_step(*load("toy_mlx").batch(len(PAIRS))).item()
    grads = {name: torch.tensor(before[name] - w) for name, w in weights(policy).items()}
    assert_step(loss, grads, exact)


def test_every_compiled_step_makes_the_gradient_of_equation_6() -> None:
    policy, reference, train_step = setup()
    check(policy, reference, train_step)
    check(policy, reference, train_step)
    reference.update({"head": reference.head * 2.0})
    check(policy, reference, train_step)


def test_recipe_runs_as_a_script() -> None:
    losses = run_script("mlx_nn")
    assert losses[0] == pytest.approx(0.0, abs=1e-6)  # the reference is a copy of the policy
    assert losses == sorted(losses, reverse=True)
