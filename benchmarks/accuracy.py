"""Errors of values and slopes against 60-digit arithmetic, in eps.

    python -m benchmarks.accuracy            results/accuracy.csv
    python -m benchmarks.accuracy --quick    a few points; the table alone

Each row has the median and the worst error over the same points of one range, of one way to compute
one loss. An error is |result - exact| / (eps * size), where the size is what the rounding of one
operation scales with: the exact value, or, where a difference cancels, its terms.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mlx.core as mx
import mpmath
import numpy as np
import torch
from mpmath import mpf
from torch import Tensor
from torch.nn import functional as F

from benchmarks.record import RESULTS, Table, machine
from spoloss import DPO, SPO, Squared

POINTS = 400
BETAS = (1.0, 0.1)
PACKAGES = ("torch", "numpy", "jax", "mlx", "mpmath", "trl", "spoloss")
Way = Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Cell:
    """One way to compute one loss, over one range of x."""

    loss: str
    beta: float
    way: str
    dtype: str
    range: str


# ------------------------------------------------------------------------------------ the oracles


class Truth(NamedTuple):
    """Exact value and slope at one margin, and the sizes that their rounding errors scale with."""

    value: Any
    slope: Any
    value_size: Any
    slope_size: Any


def exact_spo(h: float, beta: float) -> Truth:
    """Equation 6."""
    b = mpf(beta)
    x = b * mpf(h)
    e = mpmath.exp(-x)
    return Truth(-x * e, b * (x - 1) * e, abs(x) * e, b * (1 + abs(x)) * e)


def exact_spo_linear(h: float, beta: float) -> Truth:
    """The same with its tangent below x = -1: e + (-2e)(x + 1)."""
    x, b = mpf(beta) * mpf(h), mpf(beta)
    if x >= -1:
        return exact_spo(h, beta)
    rise = -2 * mpmath.e * (x + 1)
    return Truth(mpmath.e + rise, -2 * b * mpmath.e, 2 * mpmath.e + rise, 2 * b * mpmath.e)


def exact_dpo(h: float, beta: float, smoothing: float = 0.0) -> Truth:
    """DPO eq. 7 of labels that are wrong with probability `smoothing`."""
    b, wrong = mpf(beta), mpf(smoothing)
    x, right = b * mpf(h), 1 - wrong
    agree, flip = mpmath.log1p(mpmath.exp(-x)), mpmath.log1p(mpmath.exp(x))
    up, down = 1 / (1 + mpmath.exp(x)), 1 / (1 + mpmath.exp(-x))
    value, terms = right * agree + wrong * flip, (right * up, wrong * down)
    return Truth(value, b * (terms[1] - terms[0]), value, b * sum(terms))


def exact_dpo_smooth(h: float, beta: float) -> Truth:
    """The same with smoothing 0.1."""
    return exact_dpo(h, beta, 0.1)


def exact_squared(h: float, beta: float) -> Truth:
    """The squared error of section 2.2; at beta = 1, h - 1 rounds once."""
    h, target = mpf(h), 1 / mpf(beta)
    error = h - target
    size = abs(error) if beta == 1.0 else abs(h) + target
    return Truth(error**2, 2 * error, size**2, 2 * size)


LOSSES: dict[str, tuple[Any, Callable[[float, float], Truth]]] = {
    "SPO": (SPO(), exact_spo),
    "SPO, linear below -1": (SPO(linear_below=-1.0), exact_spo_linear),
    "DPO": (DPO(), exact_dpo),
    "DPO, smoothing 0.1": (DPO(label_smoothing=0.1), exact_dpo_smooth),
    "Squared": (Squared(), exact_squared),
}


# --------------------------------------------------------------------------------------- the ways


def ranges(dtype: str) -> dict[str, float]:
    """The largest |x| of each range; beyond the last, e^|x| leaves the dtype."""
    return {"|x| < 1": 1.0, "|x| < 20": 20.0, "all": 80.0 if dtype == "float32" else 700.0}


def spo_by_hand(x: Tensor) -> Tensor:
    """Equation 6 as it is on paper."""
    return -x * torch.exp(-x)


PEERS: dict[str, dict[str, Callable[[Tensor, float], Tensor]]] = {
    "SPO": {"by hand": lambda h, beta: spo_by_hand(beta * h)},
    "SPO, linear below -1": {
        "by hand": lambda h, beta: torch.where(
            beta * h < -1.0, math.e - 2.0 * math.e * (beta * h + 1.0), spo_by_hand(beta * h)
        )
    },
    "DPO": {
        "by hand": lambda h, beta: -torch.log(torch.sigmoid(beta * h)),
        "TRL": lambda h, beta: -F.logsigmoid(beta * h),  # loss_type="sigmoid"
    },
    "DPO, smoothing 0.1": {
        "by hand": lambda h, beta: (
            -0.9 * torch.log(torch.sigmoid(beta * h)) - 0.1 * torch.log(torch.sigmoid(-beta * h))
        ),
        # loss_type="aot_unpaired", on sorted margins
        "TRL": lambda h, beta: -F.logsigmoid(beta * h) * (1 - 0.1) - F.logsigmoid(-beta * h) * 0.1,
    },
    "Squared": {
        "by hand": lambda h, beta: (h - 1.0 / beta) ** 2,
        # loss_type="ipo", whose beta is half of ours
        "TRL": lambda h, beta: (h - 1 / (2 * (beta / 2))) ** 2,
    },
}
"""Expressions that others use: as they are printed in the papers, and those of trl.DPOTrainer."""


def by_autograd(function: Callable[[Tensor, float], Tensor]) -> Way:
    """Value and slope of a PyTorch expression."""

    def way(h: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
        margin = torch.tensor(h, requires_grad=True)
        value = function(margin, beta)
        (slope,) = torch.autograd.grad(value.sum(), margin)
        return value.detach().numpy(), slope.numpy()

    return way


def on(loss: Any, array: Callable[[np.ndarray], Any]) -> Way:
    """Value and slope of a loss object on the arrays of one library."""

    def way(h: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
        margin = array(h)
        return np.asarray(loss.value(margin, beta)), np.asarray(loss.slope(margin, beta))

    return way


def ways(name: str) -> dict[str, Way]:
    """All ways to compute a loss."""
    loss, _ = LOSSES[name]
    return {
        "spoloss, NumPy": on(loss, np.asarray),
        "spoloss, PyTorch": on(loss, torch.tensor),
        "spoloss, PyTorch autograd": by_autograd(loss.value),
        "spoloss, JAX": on(loss, jnp.asarray),
        "spoloss, MLX": on(loss, lambda h: mx.array(h, dtype=getattr(mx, str(h.dtype)))),
        **{f"{peer}, PyTorch autograd": by_autograd(f) for peer, f in PEERS[name].items()},
    }


# -------------------------------------------------------------------------------------- the table


def cells() -> list[Cell]:
    """Every loss, beta, dtype and range, way by way."""
    return [
        Cell(loss, beta, way, dtype, title)
        for loss in LOSSES
        for beta in BETAS
        for dtype in ("float32", "float64")
        for title in ranges(dtype)
        for way in ways(loss)
    ]


@functools.lru_cache(maxsize=1)
def exact(
    loss: str, beta: float, dtype: str, limit: float, count: int
) -> tuple[np.ndarray, list[Truth]]:
    """Margins of both signs up to |x| = limit, uniform and by decades; and the exact results."""
    rng = np.random.default_rng(0)
    decades = 10.0 ** rng.uniform(-6.0, 0.0, count // 2) * rng.choice((-1, 1), count // 2)
    uniform = rng.uniform(-1.0, 1.0, count // 2)
    margins = (limit / beta * np.concatenate([uniform, decades])).astype(dtype)
    return margins, [LOSSES[loss][1](float(h), beta) for h in margins]


def errors_of(
    got: tuple[np.ndarray, np.ndarray], truths: Sequence[Truth], dtype: str
) -> dict[str, str]:
    """Median and worst error of values and of slopes."""
    eps, found = float(np.finfo(dtype).eps), {}
    for what, results in zip(("value", "slope"), got, strict=True):
        errors = [
            float(abs(float(result) - getattr(truth, what)) / (eps * size))
            if math.isfinite(result)
            else math.inf
            for result, truth in zip(results, truths, strict=True)
            if (size := getattr(truth, f"{what}_size")) > 0
        ]
        found[f"{what}_median"], found[f"{what}_worst"] = (
            f"{each:.3g}" for each in (np.median(errors), max(errors))
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Compute, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few points; no file")
    quick = parser.parse_args(argv).quick
    jax.config.update("jax_enable_x64", True)
    mx.set_default_device(mx.cpu)
    mpmath.mp.dps = 60
    table = Table(None if quick else RESULTS / "accuracy.csv", machine(*PACKAGES), Cell)
    for cell in table.todo(cells()):
        limit, count = ranges(cell.dtype)[cell.range], 10 if quick else POINTS
        margins, truths = exact(cell.loss, cell.beta, cell.dtype, limit, count)
        results = ways(cell.loss)[cell.way](margins, cell.beta)
        table.add(cell, **errors_of(results, truths, cell.dtype))


if __name__ == "__main__":
    main()
