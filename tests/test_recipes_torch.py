"""The padding-free and the vocabulary-parallel recipe against each sequence on its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from recipes_oracle import RECIPES, exact_step, load, relative_error, toy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

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
    return {"loss": loss.item(), "grads": gathered, "rows": rows}


def test_vocab_parallel(tmp_path: Path) -> None:
    policy, reference = toy.models(dtype=torch.float64)
    expected, exact = exact_step(policy, reference, PAIRS, BETA)
    for rank in processes.run(split, 2, tmp_path):
        assert rank["rows"] == toy.VOCABULARY // 2
        assert rank["loss"] == pytest.approx(expected, rel=1e-6)
        assert relative_error(rank["grads"], exact) < 1e-6


def test_they_run_as_scripts() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for command in (
        [sys.executable, str(RECIPES / "padding_free.py")],
        [*torchrun, str(RECIPES / "vocab_parallel.py")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        # Two ranks may write into one line.
        losses = [float(number) for number in re.findall(r"-?\d+\.\d+", done.stdout)]
        assert len(losses) == 6
        assert losses[-1] < losses[0] < 0.1
