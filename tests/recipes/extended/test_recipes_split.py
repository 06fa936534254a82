"""The the vocabulary-parallel recipe against each sequence on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from helpers import processes
from helpers.distributed_worker import run_script
from helpers.recipes_oracle import exact_step, load, models, relative_error, toy

vocab_parallel = load("vocab_parallel")

PAIRS = toy.pairs(5)
BETA = 0.1


def grads(policy: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def split(_rank: int) -> dict[str, Any]:
    policy, reference = models()
    mesh = init_device_mesh("cpu", (2,))
    for model in (policy, reference):
        vocab_parallel.split_head(model, mesh)
    loss = vocab_parallel.spo_step(policy, reference, toy.collate(PAIRS), BETA)
    loss.backward()
    gathered = {
        name: (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
        for name, grad in grads(policy).items()
    }
    rows = len(policy.lm_head.weight.to_local())
    printed = run_script("vocab_parallel")
    return {"loss": loss.item(), "grads": gathered, "rows": rows, "printed": printed}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return processes.run(split, 2, tmp_path_factory.mktemp("split"))


def test_vocab_parallel(ranks: list[dict[str, Any]]) -> None:
    policy, reference = models()
    expected, exact = exact_step(policy, reference, PAIRS, BETA)
    for rank in ranks:
        assert rank["rows"] == toy.VOCABULARY // 2
        assert rank["loss"] == pytest.approx(expected, rel=1e-6)
        assert relative_error(rank["grads"], exact) < 1e-6


def test_vocab_parallel_runs_as_a_script(ranks: list[dict[str, Any]]) -> None:
    first, second = (falling(rank["printed"]) for rank in ranks)
    assert first == second


def falling(printed: str) -> list[float]:
    """The losses that a script printed, a line each, which must fall."""
    losses = [float(line.split()[-1]) for line in printed.splitlines()]
    assert len(losses) >= 3
    assert losses[-1] < losses[0] < 0.1
    return losses
