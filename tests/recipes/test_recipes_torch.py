"""The padding-free and the vocabulary-parallel recipe against each sequence on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from helpers import processes
from helpers.distributed_worker import run_script
from helpers.interpreter import run_python
from helpers.recipes_oracle import RECIPES, exact_step, load, relative_error, toy

padding_free, vocab_parallel = load("padding_free"), load("vocab_parallel")

PAIRS = toy.pairs(5)
BETA = 0.1


def grads(policy: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("by", ["loss_by_logits", "loss_by_tiles"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_free(by: str, attention: str) -> None:
    policy, reference = toy.models(dtype=torch.float64)
    for model in (policy, reference):
        model.set_attn_implementation(attention)
    loss = getattr(padding_free, by)(policy, reference, padding_free.pack(PAIRS), BETA)
    loss.backward()
    expected, exact = exact_step(policy, reference, PAIRS, BETA)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert relative_error(grads(policy), exact) < 1e-6


@pytest.mark.parametrize("by", ["loss_by_logits", "loss_by_tiles"])
def test_a_packed_row_without_its_borders_is_seen(by: str) -> None:
    policy, reference = toy.models(dtype=torch.float64)
    row = padding_free.pack(PAIRS)
    _, exact = exact_step(policy, reference, PAIRS, BETA)
    through = torch.arange(row.ids.shape[1])[None]  # attention runs across the sequences
    getattr(padding_free, by)(policy, reference, row._replace(position_ids=through)).backward()
    assert relative_error(grads(policy), exact) > 1e-2


def split(_rank: int) -> dict[str, Any]:
    policy, reference = toy.models(dtype=torch.float64)
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
    policy, reference = toy.models(dtype=torch.float64)
    expected, exact = exact_step(policy, reference, PAIRS, BETA)
    for rank in ranks:
        assert rank["rows"] == toy.VOCABULARY // 2
        assert rank["loss"] == pytest.approx(expected, rel=1e-6)
        assert relative_error(rank["grads"], exact) < 1e-6


def test_vocab_parallel_runs_as_a_script(ranks: list[dict[str, Any]]) -> None:
    first, second = (falling(rank["printed"]) for rank in ranks)
    assert first == second


def test_padding_free_runs_as_a_script() -> None:
    done = run_python(RECIPES / "padding_free.py")
    assert done.returncode == 0, done.stderr
    falling(done.stdout)


def falling(printed: str) -> list[float]:
    """The losses that a script printed, a line each, which must fall."""
    losses = [float(line.split()[-1]) for line in printed.splitlines()]
    assert len(losses) >= 3
    assert losses[-1] < losses[0] < 0.1
    return losses
