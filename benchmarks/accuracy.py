"""Errors of values and slopes against 60-digit arithmetic, in eps: python -m benchmarks.accuracy.

Each row of the result holds the median and the worst error over the same points of one range, of
one way to compute one loss. An error is |result - exact| / (eps * size), where the size is what the
rounding of one operation scales with: the exact value, or, where a difference cancels, its terms
(`tests/helpers/oracles.py`).
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import machine

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "accuracy.csv"
sys.path.append(str(ROOT / "tests"))

from helpers.oracles import LOSSES  # noqa: E402

COLUMNS = ("loss", "beta", "way", "dtype", "range", *(
    f"{what}_{which}" for what in ("value", "slope") for which in ("median", "worst")
))  # fmt: skip
POINTS = 400
BETAS = (1.0, 0.1)
NAMES = ("SPO", "SPO, linear below -1", "DPO", "DPO, smoothing 0.1", "Squared")
Way = Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]]


def ranges(dtype: str) -> dict[str, float]:
    """The largest |x| of each range; beyond the last, e^|x| leaves the dtype."""
    return {"|x| < 1": 1.0, "|x| < 20": 20.0, "all": 80.0 if dtype == "float32" else 700.0}


def hand_spo(h: Tensor, beta: float) -> Tensor:
    """Equation 6 as it is on paper."""
    x = beta * h
    return -x * torch.exp(-x)


def hand_spo_linear(h: Tensor, beta: float) -> Tensor:
    """The same with its tangent below -1."""
    x = beta * h
    return torch.where(x < -1.0, math.e - 2.0 * math.e * (x + 1.0), -x * torch.exp(-x))


def hand_dpo(h: Tensor, beta: float) -> Tensor:
    """DPO's equation 7 as it is on paper."""
    return -torch.log(torch.sigmoid(beta * h))


def hand_dpo_smooth(h: Tensor, beta: float) -> Tensor:
    """The same with smoothing 0.1."""
    x = beta * h
    return -0.9 * torch.log(torch.sigmoid(x)) - 0.1 * torch.log(torch.sigmoid(-x))


def hand_squared(h: Tensor, beta: float) -> Tensor:
    """The squared error of section 2.2."""
    return (h - 1.0 / beta) ** 2


def trl_sigmoid(h: Tensor, beta: float) -> Tensor:
    """loss_type="sigmoid" of trl.DPOTrainer."""
    return -F.logsigmoid(beta * h)


def trl_smooth(h: Tensor, beta: float) -> Tensor:
    """The label smoothing of trl.DPOTrainer, loss_type="aot_unpaired", on sorted margins."""
    return -F.logsigmoid(beta * h) * (1 - 0.1) - F.logsigmoid(-beta * h) * 0.1


def trl_ipo(h: Tensor, beta: float) -> Tensor:
    """loss_type="ipo" of trl.DPOTrainer, whose beta is half of ours."""
    return (h - 1 / (2 * (beta / 2))) ** 2


PEERS: dict[str, dict[str, Callable[[Tensor, float], Tensor]]] = {
    "SPO": {"by hand": hand_spo},
    "SPO, linear below -1": {"by hand": hand_spo_linear},
    "DPO": {"by hand": hand_dpo, "TRL": trl_sigmoid},
    "DPO, smoothing 0.1": {"by hand": hand_dpo_smooth, "TRL": trl_smooth},
    "Squared": {"by hand": hand_squared, "TRL": trl_ipo},
}


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


def rows() -> Iterator[tuple[object, ...]]:
    """The table, way by way."""
    for name in NAMES:
        for beta in BETAS:
            for dtype in ("float32", "float64"):
                for title, limit in ranges(dtype).items():
                    margins = points(dtype, limit / beta)
                    truths = [LOSSES[name][1](float(h), beta) for h in margins]
                    for way, compute in ways(name).items():
                        errors = errors_of(compute(margins, beta), truths, dtype)
                        yield (name, beta, way, dtype, title, *errors)


def points(dtype: str, limit: float) -> np.ndarray:
    """Margins of both signs, uniform and by decades."""
    rng = np.random.default_rng(0)
    decades = limit * 10.0 ** rng.uniform(-6.0, 0.0, POINTS // 2) * rng.choice((-1, 1), POINTS // 2)
    return np.concatenate([rng.uniform(-limit, limit, POINTS // 2), decades]).astype(dtype)


def errors_of(results: Any, truths: Any, dtype: str) -> list[str]:
    """Median and worst error of values, then of slopes."""
    eps, out = float(np.finfo(dtype).eps), []
    for got, exact, size in zip(
        results,
        ([t.value for t in truths], [t.slope for t in truths]),
        ([t.value_scale for t in truths], [t.slope_scale for t in truths]),
        strict=True,
    ):
        errors = [
            float(abs(float(g) - e) / (eps * s)) if math.isfinite(g) else math.inf
            for g, e, s in zip(got, exact, size, strict=True)
            if s > 0
        ]
        out += [f"{np.median(errors):.3g}", f"{max(errors):.3g}"]
    return out


def main() -> None:
    """Write the result file."""
    jax.config.update("jax_enable_x64", True)
    mx.set_default_device(mx.cpu)
    versions = ("torch", "numpy", "jax", "mlx", "mpmath", "trl", "spoloss")
    with RESULT.open("w", newline="") as file:
        print(f"# {machine.describe(*versions)}", file=file)
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows()])


if __name__ == "__main__":
    main()
