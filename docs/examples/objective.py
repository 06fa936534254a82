"""The objective of the command line: a loss of the margin, and the target of each pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from arguments import Options
from errors import InputError
from pairs import Pair
from spoloss import DPO, SPO, MarginLoss, Squared

LOSSES: dict[str, Callable[[], MarginLoss]] = {"spo": SPO, "dpo": DPO, "squared": Squared}


def margin_loss(options: Options) -> MarginLoss:
    """Returns the loss of the command line, for `pair_loss` and `linear_pair_loss`."""
    if options.linear_below is not None:
        return SPO(linear_below=options.linear_below)
    return LOSSES[options.loss]()


def targets(reward_gaps: Any, options: Options) -> dict[str, Any]:
    """Returns the arguments that set the target of the loss.

    Args:
      reward_gaps: the known reward gap of each pair, an array of shape [B]; None without
        --reward-gap.
      options: the command line.

    Returns:
      The arguments `beta` and, for SPO with known gaps, `weights` of `pair_loss`.
    """
    if reward_gaps is None:
        return {"beta": options.beta}
    # The minimum of the loss is at the margin gap / beta, which is the target of beta / gap.
    beta = options.beta / reward_gaps
    if options.loss == "squared":
        return {"beta": beta}
    # SPO's curvature grows like 1 / gap^2, so without weights small gaps dominate the batch.
    return {"beta": beta, "weights": reward_gaps**2}


def check_objective(pairs: Sequence[Pair], options: Options) -> None:
    """Raises an error if the loss or the gradient of the first step overflows or vanishes."""
    try:
        loss = margin_loss(options)
    except ValueError as error:
        raise InputError(f"--linear-below: {error}") from error
    gaps = np.array([pair.reward_gap for pair in pairs]) if options.reward_gap else None
    with np.errstate(all="ignore"):
        given = {name: np.float32(value) for name, value in targets(gaps, options).items()}
        margin = np.zeros_like(given["beta"])
        values = loss.value(margin, given["beta"])
        slopes = loss.slope(margin, given["beta"]) * given.get("weights", np.float32(1.0))
    usable = np.isfinite(values) & np.isfinite(slopes) & (slopes != 0.0)
    if not usable.all():
        where = f"--beta {options.beta:g}"
        if gaps is not None:
            first = pairs[int(np.argmin(usable))]
            where += f" with the reward gap {first.reward_gap:g} of {options.pairs}:{first.line}"
        raise InputError(
            f"{where}: expected a loss and a gradient that float32 can hold at the first step, "
            "got one that overflows or vanishes"
        )
