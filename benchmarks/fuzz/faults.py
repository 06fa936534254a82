"""One argument of a right call made wrong, in a way that the documentation refuses."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

import spoloss
from benchmarks.fuzz.calls import LOGPS, Call
from benchmarks.fuzz.libraries import LIBRARIES, Value


class OnlyValue:
    """Half a loss."""

    def value(self, margin: Any, beta: Any) -> Any:
        """The margin times beta."""
        return margin * beta


NOT_NUMBERS: tuple[Any, ...] = ([0.1, 0.2], "0.1", True, np.True_, 1j, {}, object())
OUT_OF_RANGE = {
    "beta": (0.0, -1.0, 0, np.nan, np.inf, np.float32(-0.1)),
    "reward_gap": (0.0, -1.0, 0, np.nan, np.inf, np.float64(0.0)),
    "weights": (np.nan, np.inf, -np.inf, np.float32(np.nan)),
    "reduction": ("MEAN", "average", "", None, 0, ["mean"], b"mean"),
    "linear_below": (1.0, 2, -700.0, np.nan, np.inf, -np.inf, "0", True, [0.0], np.zeros(1)),
    "label_smoothing": (0.5, -0.1, 1, np.nan, np.inf, None, "0", False, [0.1], np.zeros(1)),
    "loss": (spoloss.SPO, "spo", None, OnlyValue(), 0.0, spoloss.spo_loss),
}
ARRAYS = (*LOGPS, "beta", "reward_gap", "weights")


def spoil(rng: random.Random, call: Call) -> tuple[str, dict[str, Any]]:
    """The name of an argument of `call`, and all arguments with a wrong value there."""
    arguments = call.arguments()
    name = rng.choice(list(arguments))
    kinds = [*OUT_OF_RANGE.get(name, ())]
    if name in ARRAYS:
        kinds += [*NOT_NUMBERS, _of_integers(call), *_of_other_libraries(call)]
        if name in LOGPS[:2]:
            kinds += [None, 0.0]
        kinds.append(_of_another_shape(rng, call))
    arguments[name] = rng.choice(kinds)
    return name, arguments


def _shape(call: Call) -> tuple[int, ...]:
    return call.logps[0].values.shape  # type: ignore[no-any-return]


def _of_another_shape(rng: random.Random, call: Call) -> Any:
    """A shape that broadcasts, as far as there is one."""
    shape = _shape(call)
    shapes = [(*shape, 1), (1, *shape), (*shape, 4), (7,)]
    return call.library.make(Value(np.ones(rng.choice(shapes)), "float32"))


def _of_other_libraries(call: Call) -> list[Any]:
    others = [library for library in LIBRARIES.values() if library is not call.library]
    return [library.make(Value(np.ones(_shape(call)), "float32")) for library in others]


def _of_integers(call: Call) -> Any:
    array = call.library.make(Value(np.ones(_shape(call)), "float32"))
    return array > 0.0 if np.prod(_shape(call)) % 2 else (array > 0.0) * 1
