"""Time and memory of one call in this process, on the CPU or on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch


class Timed(NamedTuple):
    """What one call took.

    Attributes:
      seconds: with one CPU thread the processor time of this process, which other processes hardly
        disturb; with several, where waiting takes processor time as well, the time by the clock;
        on a GPU the time between two events.
      others: the share of the processor's cores that other processes took meanwhile.
    """

    seconds: float
    others: float


class HostGauge:
    """Time of the CPU, memory by the peak that Linux keeps for a process."""

    def reset(self) -> None:
        """Forget the peak so far, so that growth counts from what is held now."""
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):
            # Freed memory that the C library keeps would hide that much growth.
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = self._status("VmRSS")

    def growth_mib(self) -> float | None:
        """The peak since the reset minus what was held then; None where the system keeps none."""
        peak = self._status("VmHWM")
        return None if peak is None or self._before is None else (peak - self._before) / 1024

    def timed(self, call: Callable[[], object]) -> Timed:
        """How long one call takes."""
        now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        before, start = _core_seconds(), now()
        call()
        seconds = now() - start
        return Timed(seconds, _share_of_others(before, _core_seconds()))

    @staticmethod
    def _status(name: str) -> int | None:
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith(name):
                    return int(line.split()[1])
        return None


class CardGauge:
    """Time by CUDA's events, memory by PyTorch's allocator."""

    def reset(self) -> None:
        """Forget the peak so far, so that growth counts from what is held now."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def growth_mib(self) -> float:
        """The peak since the reset minus what was held then."""
        return (torch.cuda.max_memory_allocated() - self._before) / 2**20

    def timed(self, call: Callable[[], object]) -> Timed:
        """How long one call takes on the GPU."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before = _core_seconds()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        others = _share_of_others(before, _core_seconds())
        return Timed(start.elapsed_time(end) / 1e3, others)


def gauge_of(device: str) -> HostGauge | CardGauge:
    """The gauge of a kind of device."""
    return CardGauge() if device == "cuda" else HostGauge()


class _CoreSeconds(NamedTuple):
    """Seconds of all cores since the start of the system: in all, and spent on other processes."""

    total: float
    others: float


def _core_seconds() -> _CoreSeconds | None:
    try:
        line = Path("/proc/stat").read_text().partition("\n")[0]
    except OSError:
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; later columns count twice.
    ticks = [int(number) / os.sysconf("SC_CLK_TCK") for number in line.split()[1:9]]
    return _CoreSeconds(sum(ticks), sum(ticks) - ticks[3] - ticks[4] - time.process_time())


def _share_of_others(before: _CoreSeconds | None, after: _CoreSeconds | None) -> float:
    if before is None or after is None or after.total == before.total:
        return 0.0
    return max(0.0, (after.others - before.others) / (after.total - before.total))
