"""Calls of the core: a public function, a library, four arrays and options, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import spoloss
from benchmarks.fuzz.libraries import LIBRARIES, Library, Value

LOGPS = (
    "policy_chosen_logps",
    "policy_rejected_logps",
    "reference_chosen_logps",
    "reference_rejected_logps",
)
SHARES = {"numpy": 20, "torch": 13, "mlx": 6, "jax": 1}
OF_LOSS = {
    "spo": ("beta", "reward_gap", "linear_below"),
    "dpo": ("beta", "label_smoothing"),
    "squared": ("beta", "reward_gap"),
    "ipo": ("beta",),
}
REDUCED = ("weights", "reduction")
OPTIONS: dict[str, tuple[str, ...]] = {
    **{f"{loss}_loss": (*options, *REDUCED) for loss, options in OF_LOSS.items()},
    **{f"{loss}_grad": (*options, *REDUCED) for loss, options in OF_LOSS.items()},
    **{f"{loss}_prob_grad": OF_LOSS[loss] for loss in ("spo", "dpo")},
    "pair_loss": ("loss", "beta", *REDUCED),
    "pair_grad": ("loss", "beta", *REDUCED),
    "log_ratio_margin": (),
    "implicit_rewards": ("beta",),
    "preference_metrics": ("beta", "reward_gap", "weights"),
}
REQUIRED = {"pair_loss": "beta", "pair_grad": "beta", "implicit_rewards": "beta"}
REQUIRED["preference_metrics"] = "beta"


@dataclass(frozen=True)
class Call:
    """One call, with arrays as `Value`s: the reference reads them, the library makes them."""

    function: str
    library: Library
    logps: tuple[Any, ...]
    options: dict[str, Any]

    def arguments(self) -> dict[str, Any]:
        """All arguments by name, in the library's arrays."""
        given = {**dict(zip(LOGPS, self.logps, strict=True)), **self.options}
        return {k: self.library.make(v) if isinstance(v, Value) else v for k, v in given.items()}

    @property
    def dtype(self) -> str:
        """The documented dtype of the result."""
        wide = any(isinstance(v, Value) and v.dtype == "float64" for v in self.logps)
        return "float64" if wide else "float32"


def run(function: str, arguments: dict[str, Any]) -> Any:
    """The public function at these arguments, `loss` and the log-probabilities by position."""
    rest = dict(arguments)
    first = [rest.pop("loss")] if "loss" in rest else []
    logps = [rest.pop(name) for name in LOGPS]
    return getattr(spoloss, function)(*first, *logps, **rest)


def draw(rng: random.Random, library: str | None = None) -> Call:
    """A call that is right in every argument."""
    name = library or rng.choices(list(LIBRARIES), [SHARES[name] for name in LIBRARIES])[0]
    of = LIBRARIES[name]
    function = rng.choice(list(OPTIONS))
    shape = rng.choice([(1,), (2,), (3,), (5,), (6,), (0,), (), (2, 3)])
    dtype = rng.choice(of.dtypes)
    mixed = rng.random() < 0.2
    size = _sizes(rng, dtype)
    logps = tuple(
        0.0
        if place >= 2 and rng.random() < 0.1
        else Value.rounded(_array(shape, size), rng.choice(of.dtypes) if mixed and place else dtype)
        for place in range(4)
    )
    options = {}
    for option in OPTIONS[function]:
        if option in ("loss", REQUIRED.get(function)) or rng.random() < 0.5:
            options[option] = _DRAW[option](rng, of, shape)
    return _poison(rng, Call(function, of, logps, options))


def _array(shape: tuple[int, ...], one: Callable[[], float]) -> np.ndarray:
    count = int(np.prod(shape))
    return np.array([one() for _ in range(count)]).reshape(shape)


def _sizes(rng: random.Random, dtype: str) -> Callable[[], float]:
    """One kind of log-probability: usual, close to each other, wide, or anything that is finite."""
    greatest = {"float16": 3.8, "bfloat16": 36.0, "float32": 36.0, "float64": 300.0}[dtype]
    centre = rng.uniform(-60.0, 0.0)
    return rng.choice(
        [
            lambda: rng.gauss(-40.0, 6.0),
            lambda: centre + rng.gauss(0.0, 0.01),
            lambda: rng.uniform(-1000.0, 0.0),
            lambda: rng.choice((-1.0, 1.0)) * 10.0 ** rng.uniform(-greatest, greatest),
        ]
    )


def _per_pair(low: float, high: float, *, signed: bool = False) -> Callable[..., Any]:
    """A number, a NumPy scalar, a 0-d array or one value for each pair, log-uniform."""

    def one(rng: random.Random) -> float:
        if signed and rng.random() < 0.3:
            return rng.choice((0.0, -1.0, -0.5))
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    def option(rng: random.Random, library: Library, shape: tuple[int, ...]) -> Any:
        kind = rng.choice(("number", "integer", "scalar", "0-d", "pairs", "pairs"))
        if kind == "number":
            return one(rng)
        if kind == "integer":
            return rng.choice((1, 2, np.int64(1)))
        if kind == "scalar":
            return rng.choice((np.float32, np.float64, np.float16))(one(rng))
        values = _array(() if kind == "0-d" else shape, lambda: one(rng))
        return Value.rounded(values, rng.choice(library.dtypes))

    return option


def _loss(rng: random.Random, *_: Any) -> Any:
    x0 = _linear_below(rng)
    return rng.choice((spoloss.SPO(x0), spoloss.DPO(_smoothing(rng)), spoloss.Squared()))


def _linear_below(rng: random.Random, *_: Any) -> Any:
    x0 = rng.choice((rng.uniform(-5.0, 0.99), rng.uniform(-699.0, -5.0)))
    return rng.choice((None, x0, x0, np.float32(x0), np.float64(x0), 0))


def _smoothing(rng: random.Random, *_: Any) -> Any:
    e = rng.uniform(0.001, 0.499)
    return rng.choice((0.0, 0, e, np.float32(e), np.float64(e)))


_DRAW: dict[str, Callable[..., Any]] = {
    "beta": _per_pair(1e-3, 10.0),
    "reward_gap": _per_pair(0.05, 5.0),
    "weights": _per_pair(0.1, 10.0, signed=True),
    "reduction": lambda rng, *_: rng.choice(("mean", "sum", "none")),
    "linear_below": _linear_below,
    "label_smoothing": _smoothing,
    "loss": _loss,
}


def _poison(rng: random.Random, call: Call) -> Call:
    """Now and then, what must not matter: nan and inf in pairs of weight 0."""
    weights = call.options.get("weights")
    if not isinstance(weights, Value) or weights.values.ndim == 0 or rng.random() < 0.7:
        return call
    logps = list(call.logps)
    place = rng.choice([i for i, v in enumerate(logps) if isinstance(v, Value)])
    bad = rng.choice((np.nan, np.inf, -np.inf))
    value = logps[place]
    logps[place] = Value(np.where(weights.values == 0.0, bad, value.values), value.dtype)
    return replace(call, logps=tuple(logps))
