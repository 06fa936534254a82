"""The MLX recipe makes the gradient of equation 6, on the CPU, and avoids its traps.

Arrays are float64, but MLX 0.32 takes float64's exponential on the CPU in single precision.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.optimizers import SGD

from helpers.recipes_oracle import (
    RECIPES,
    MeanOfEmbeddings,
    exact_step,
    load,
    relative_error,
    toy,
)

BETA = 0.1
EXACT = 1e-6
PAIRS = toy.pairs(6)
NAMES = ("embed", "head")


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with mx.stream(mx.cpu):  # a GPU of Apple has no float64
        yield


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Without the seconds that a C++ compiler takes for each new shape."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def weights(model) -> dict[str, np.ndarray]:
    return {name: np.array(model[name]) for name in NAMES}


def exact(policy, reference, pairs=PAIRS):
    return exact_step(
        MeanOfEmbeddings(weights(policy)), MeanOfEmbeddings(weights(reference)), pairs, BETA
    )


def step(policy, train_step, batch) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and the gradient as what plain descent at rate 1 moves the policy by."""
    before = weights(policy)
    loss = train_step(*batch).item()
    return loss, {name: torch.tensor(before[name] - w) for name, w in weights(policy).items()}


@pytest.mark.usefixtures("uncompiled")
def test_every_step_makes_the_gradient_of_equation_6() -> None:
    toy_mlx, recipe = load("toy_mlx"), load("mlx_nn")
    policy, reference = toy_mlx.models(mx.float64)
    train_step = recipe.make_train_step(policy, reference, SGD(1.0), BETA)
    for count in (6, 6, 4):
        loss, expected = exact(policy, reference, PAIRS[:count])
        value, grads = step(policy, train_step, toy_mlx.batch(count))
        assert value == pytest.approx(loss, rel=EXACT)
        assert relative_error(grads, expected) < EXACT


@pytest.mark.usefixtures("uncompiled")
def test_the_comparison_sees_swapped_pairs_and_another_beta() -> None:
    toy_mlx, recipe = load("toy_mlx"), load("mlx_nn")
    for beta, swap in ((BETA, True), (2.0 * BETA, False)):
        policy, reference = toy_mlx.models(mx.float64)
        _, expected = exact(policy, reference)
        rows = toy_mlx.batch(len(PAIRS))
        if swap:
            rows = [mx.concatenate(mx.split(array, 2)[::-1]) for array in rows]
        train_step = recipe.make_train_step(policy, reference, SGD(1.0), beta)
        _, grads = step(policy, train_step, rows)
        assert relative_error(grads, expected) > 0.5


def test_the_compiled_step_sees_a_reference_that_changes() -> None:
    toy_mlx, recipe = load("toy_mlx"), load("mlx_nn")
    policy, reference = toy_mlx.models(mx.float64)
    train_step = recipe.make_train_step(policy, reference, SGD(1.0), BETA)
    train_step(*toy_mlx.batch(6))
    frozen = mx.compile(lambda ids: reference(ids))
    ids = toy_mlx.batch(6).ids
    stale = frozen(ids)
    reference.update({"head": reference.head * 2.0})
    assert mx.array_equal(frozen(ids), stale)  # a constant of what closes over it: the trap
    loss, expected = exact(policy, reference)
    value, grads = step(policy, train_step, toy_mlx.batch(6))
    assert value == pytest.approx(loss, rel=EXACT)
    assert relative_error(grads, expected) < EXACT


def test_mlx_takes_an_ignored_label_for_an_index() -> None:
    from mlx.nn.losses import cross_entropy

    logits = mx.arange(128.0)[None]
    assert cross_entropy(logits, mx.array([-100])) == cross_entropy(logits, mx.array([28]))


@pytest.mark.filterwarnings("always")
def test_the_recipe_runs_as_a_script(recwarn, capsys) -> None:
    load("toy_mlx")
    path = RECIPES / "mlx_nn.py"
    runpy.run_path(str(path), run_name="__main__")
    losses = [float(line) for line in re.findall(r"-?0\.\d+", capsys.readouterr().out)]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 3
    ours = [w for w in recwarn if w.filename == str(path) or "spoloss" in w.filename]
    assert not ours, [str(w.message) for w in ours]
