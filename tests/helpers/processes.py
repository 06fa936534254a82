"""Several processes on gloo, each running one function; what goes wrong in one is raised here."""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 300.0

CPUS = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
"""The environment in which Accelerate and DeepSpeed see no GPU; they look at their import."""


def run(work: Callable[..., Any], world: int, folder: Path, *arguments: Any) -> list[Any]:
    """work(rank, *arguments) in `world` processes of one group: what each rank returned."""
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_rank, args=(work, rank, world, folder, arguments))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + SECONDS
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
        if any(process.exitcode not in (None, 0) for process in ranks):
            break
    for process in ranks:
        process.kill()
        process.join()
    failures = "\n".join(path.read_text() for path in sorted(folder.glob("failure-*")))
    results = [folder / f"result-{rank}" for rank in range(world)]
    if failures or not all(path.exists() for path in results):
        raise AssertionError(failures or f"no result within {SECONDS} s: a deadlock?")
    return [torch.load(path, weights_only=False) for path in results]


def _rank(
    work: Callable[..., Any], rank: int, world: int, folder: Path, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=SECONDS / 2),
        )
        result = work(rank, *arguments)
        torch.save(result, folder / f"partial-{rank}")
        (folder / f"partial-{rank}").rename(folder / f"result-{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"failure-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        sys.exit(1)
