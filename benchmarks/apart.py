"""A process of its own for what is measured, so that nothing else shares its memory and caches."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class Apart:
    """A fresh process that calls functions by name, and keeps what they leave in their modules.

    An exception in the process is raised here; if the process dies, BrokenProcessPool is.
    """

    def __init__(self) -> None:
        # Forked from a server that has imported torch and done nothing else: as clean as a new
        # interpreter, without its seconds of start-up.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])
        self._pool = ProcessPoolExecutor(1, context)

    def __enter__(self) -> Apart:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """What `function(*args)` returns in the process."""
        return self._pool.submit(function, *args).result()
