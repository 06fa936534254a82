"""Several processes on gloo, each running one function; what goes wrong in one is raised here."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CPUS = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
"""The environment in which Accelerate and DeepSpeed see no GPU; they look at their import."""


def run(work: Callable[..., Any], world: int, folder: Path, *arguments: Any) -> list[Any]:
    """work(rank, *arguments) in `world` processes of one group: what each rank returned."""
    torch.multiprocessing.spawn(_rank, (work, world, folder, arguments), world)
    return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(world)]


def _rank(
    rank: int, work: Callable[..., Any], world: int, folder: Path, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=150),  # a rank that waits longer raises an error
    )
    torch.save(work(rank, *arguments), folder / f"result-{rank}")
    dist.barrier()
    dist.destroy_process_group()
