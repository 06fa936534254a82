"""The second study on a pretrained model, as docs/second_study.md plans it: its four parts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from benchmarks.studies import declared
from benchmarks.studies.arms import Arm, arms
from benchmarks.studies.experiment import Part
from benchmarks.studies.plan import Plan, Read
from benchmarks.studies.training import Rounds, Stage

STAGE = Stage(pairs=10_000, steps=64, batch=8, lr=3e-4)
"""No seed has so many pairs, so all are used."""
FACTOR = 4.0
"""By which a grid of betas is extended if its edge is chosen."""
RATES = (1e-4, 3e-4, 1e-3)

MATCHED = Part(
    "matched",
    arms=(
        *arms("dpo", 0.0125, 0.05, 0.1, 0.4),
        *arms("spo", 0.003125, 0.0125, 0.025, 0.1),
    ),
    stage=STAGE,
    seeds=range(10, 18),
    prefix="matched-",
)
OVERTRAINED = Part(
    "overtrained",
    arms=(
        *arms("dpo", 0.05, 0.1, 0.4, 1.6),
        *arms("spo", 0.0125, 0.025, 0.1, 0.4),
    ),
    stage=replace(STAGE, pairs=48, steps=240, lr_end=1.0, snapshots=6, judgements=(40, 120)),
    seeds=range(10, 18),
    prefix="overtrained-",
)
DECAYED = replace(
    OVERTRAINED,
    name="overtrained-cosine",
    arms=(*arms("dpo", 0.1, 0.4), *arms("spo", 0.025, 0.1)),
    stage=replace(OVERTRAINED.stage, lr_end=0.0, judgements=()),
    prefix="overtrained-cosine-",
)
PILOTED = {
    "squared-gap": Arm("squared-gap", 0.2),
    "spo-gap-weighted-below0": Arm("spo-gap-weighted-below0", 0.2),
    "spo-weighted-below0": Arm("spo-gap-weighted-below0", 0.2),
    "dpo": Arm("dpo", 0.8),
    "dpo-weighted": Arm("dpo", 0.8),
    "dpo-soft": Arm("dpo-soft", 0.2),
}
"""The arm whose pilot chooses the learning rate, for each form of part 3."""
ON_POLICY = Part(
    "on-policy",
    arms=(
        *arms("squared-gap", 0.2),
        *arms("spo-gap-weighted-below0", 0.2),
        *arms("dpo-soft", 0.2),
        *arms("dpo", 0.2, 0.8, 3.2),
        *arms("dpo-weighted", 0.8),
        *arms("spo-weighted-below0", 0.42),
    ),
    stage=Rounds(pairs=240, steps=240, batch=8, lr=3e-4, judgements=(60, 120, 180)),
    seeds=range(10, 15),
    prefix="on-policy-",
)
PILOT = replace(
    ON_POLICY,
    name="pilot",
    arms=tuple(
        replace(arm, rate=rate) for arm in dict.fromkeys(PILOTED.values()) for rate in RATES
    ),
    seeds=range(99, 100),
)
ROAD = Part(
    "road",
    arms=tuple(
        # At the stage's own rate an arm is that of part 1, so those of both are trained once.
        replace(arm, rate=None if rate == STAGE.lr else rate)
        for rate in RATES
        for arm in (
            *arms("dpo", 0.1, 0.4, 1.6),
            *arms("spo", 0.025, 0.1, 0.4),
            *arms("spo-below-1", 0.025, 0.1, 0.4),
            *arms("squared", 0.05, 0.2, 0.8),
        )
    ),
    stage=STAGE,
    seeds=range(10, 12),
    prefix=MATCHED.prefix,
)


def second_study(size: Callable[[Part], Part] = lambda part: part) -> dict[str, Plan]:
    """The plans of the four parts, by number.

    Args:
      size: makes a part smaller, for a quick run.
    """
    overtrained = (size(OVERTRAINED), size(DECAYED))
    return {
        "1": Plan((size(MATCHED),), declared.of_matched),
        "2": Plan(overtrained, declared.of_overtrained, extended),
        "3": Plan((size(ON_POLICY), size(PILOT)), declared.of_on_policy, rated),
        "4": Plan((size(ROAD),), declared.of_road),
    }


def extended(parts: tuple[Part, ...], read: Read) -> tuple[Part, ...]:
    """Once trained, the first part with both its grids of betas extended where an edge is best."""
    first, *others = parts
    results = read(first)
    if results is None:
        return parts
    grids = [results.sorted_arms(form) for form in ("dpo", "spo")]
    chosen = {edge for grid in grids for edge in declared.edges(results, grid[0].form)}
    further: list[Arm] = []
    for lowest, *_, highest in grids:
        further += [replace(lowest, beta=lowest.beta / FACTOR)] if "lowest" in chosen else []
        further += [replace(highest, beta=highest.beta * FACTOR)] if "highest" in chosen else []
    return (replace(first, arms=(*first.arms, *further)), *others)


def rated(parts: tuple[Part, ...], read: Read) -> tuple[Part, ...]:
    """The pilot, and once it is trained the part, each arm at the learning rate of most J there.

    A rate at which the pilot breaks is the last choice.
    """
    part, pilot = parts
    results = read(pilot)
    if results is None:
        return (pilot,)

    def merit(arm: Arm) -> float:
        (found,) = results.arms[arm]
        j = declared.objective(found)
        return -math.inf if math.isnan(j) or found["stopped_at"] is not None else j

    best = {
        piloted: max((arm for arm in pilot.arms if replace(arm, rate=None) == piloted), key=merit)
        for piloted in PILOTED.values()
    }
    rates = tuple(replace(arm, rate=best[PILOTED[arm.form]].rate) for arm in part.arms)
    return replace(part, arms=rates), pilot


def tiny(part: Part) -> Part:
    """A part with at most two betas of each loss, two seeds and eight steps."""
    families: dict[Arm, list[Arm]] = defaultdict(list)
    for arm in part.arms:
        families[replace(arm, beta=1.0)].append(arm)
    steps = 8
    stage = replace(
        part.stage,
        steps=steps,
        snapshots=min(part.stage.snapshots, 2),
        judgements=tuple(step * steps // part.stage.steps for step in part.stage.judgements),
    )
    if isinstance(stage, Rounds):
        stage = replace(stage, pairs=32, rounds=2, openings=8, answers=4)
    return replace(
        part,
        arms=tuple(arm for family in families.values() for arm in family[:2]),
        stage=stage,
        seeds=part.seeds[: min((len(part.seeds) + 1) // 2, 2)],
    )
