"""The public functions of four log-probabilities, called alike, and the tables about transforms.

A subject takes the four, `beta` and `weights`, and returns one number per pair that depends on that
pair alone (`preference_metrics`: one number). So its derivatives can be had from differences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import spoloss
from helpers.pages import ROOT, table_below
from helpers.pairs import four
from spoloss import SPO
from spoloss.torch import DPOLoss, SPOLoss, SquaredLoss

PAGE = (ROOT / "docs" / "transforms.md").read_text()

Subject = Callable[..., Any]


def _loss(function: Callable[..., Any], *first: Any, **options: Any) -> Subject:
    def subject(*logps: Any, beta: Any, weights: Any, reduction: str = "none") -> Any:
        parameters = {"beta": beta, "weights": weights, "reduction": reduction}
        return function(*first, *logps, **parameters, **options)

    return subject


def _grad(function: Callable[..., Any], *first: Any, **options: Any) -> Subject:
    loss = _loss(function, *first, **options)
    return lambda *logps, **parameters: loss(*logps, **parameters).policy_chosen


def _prob_grad(function: Callable[..., Any], **options: Any) -> Subject:
    return lambda *logps, beta, **_: function(*logps, beta=beta, **options).policy_chosen.log_abs


def _module(module: Any) -> Subject:
    return lambda *logps, weights, **_: module(*logps, weights=weights).losses


SUBJECTS: dict[str, Subject] = {
    "spo_loss": _loss(spoloss.spo_loss, linear_below=-1.0),
    "dpo_loss": _loss(spoloss.dpo_loss, label_smoothing=0.1),
    "squared_loss": _loss(spoloss.squared_loss, reward_gap=0.7),
    "ipo_loss": _loss(spoloss.ipo_loss),
    "pair_loss": _loss(spoloss.pair_loss, SPO()),
    "log_ratio_margin": lambda *logps, **_: spoloss.log_ratio_margin(*logps),
    "implicit_rewards": lambda *logps, beta, **_: (
        spoloss.implicit_rewards(*logps, beta=beta).chosen
    ),
    "preference_metrics": lambda *logps, beta, weights, **_: spoloss.preference_metrics(
        *logps, beta=beta, weights=weights
    )["rewards/margins"],
    "spo_grad": _grad(spoloss.spo_grad, linear_below=-1.0),
    "dpo_grad": _grad(spoloss.dpo_grad, label_smoothing=0.1),
    "squared_grad": _grad(spoloss.squared_grad, reward_gap=0.7),
    "ipo_grad": _grad(spoloss.ipo_grad),
    "pair_grad": _grad(spoloss.pair_grad, SPO()),
    "spo_prob_grad": _prob_grad(spoloss.spo_prob_grad, reward_gap=0.7),
    "dpo_prob_grad": _prob_grad(spoloss.dpo_prob_grad, label_smoothing=0.1),
}
MODULES: dict[str, Subject] = {
    "SPOLoss": _module(SPOLoss(0.2, linear_below=-1.0)),
    "DPOLoss": _module(DPOLoss(0.2, label_smoothing=0.1)),
    "SquaredLoss": _module(SquaredLoss(0.2)),
}


def cells(heading: str, rows: set[str], columns: set[str], slow: tuple[str, ...] = ()) -> list[Any]:
    """The cells of the table below a heading of the page, as pytest's parameters.

    The table must have exactly these rows and columns. Columns that compile are slow.
    """
    head, body = table_below(PAGE, f"\n## {heading}\n")
    found = {name.strip("`"): marks for name, marks in body.items()}
    assert set(found) == rows, set(found) ^ rows
    assert set(head) == columns, set(head) ^ columns
    return [
        pytest.param(
            *(name, column, mark),
            id=f"{name}-{column}",
            marks=[pytest.mark.slow] if column in slow else [],
        )
        for name, marks in found.items()
        for column, mark in zip(head, marks, strict=True)
    ]


def arguments(size: int = 5) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Four log-probabilities, a beta per pair and a weight per pair, one of which is 0."""
    beta = np.linspace(0.1, 0.4, size)
    weights = np.linspace(-0.5, 2.0, size)
    weights[size // 2] = 0.0
    return [array / 4.0 for array in four(seed=7, size=size)], beta, weights


def first_difference(subject: Subject) -> np.ndarray:
    """The derivative by the policy's chosen log-probability, pair by pair, in NumPy."""
    return (_shifted(subject, 1e-5) - _shifted(subject, -1e-5)) / 2e-5


def second_difference(subject: Subject) -> np.ndarray:
    """The second derivative by the policy's chosen log-probability, pair by pair, in NumPy."""
    up, here, down = (_shifted(subject, shift) for shift in (1e-3, 0.0, -1e-3))
    return (up - 2.0 * here + down) / 1e-6


def _shifted(subject: Subject, shift: float) -> np.ndarray:
    (chosen, *rest), beta, weights = arguments()
    return np.asarray(subject(chosen + shift, *rest, beta=beta, weights=weights))
