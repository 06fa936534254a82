"""The two protocols on the made-up language, quick and full."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.alignment.language_task import LanguageFoundation
from benchmarks.alignment.protocol import Part, Protocol, arms
from benchmarks.alignment.training import Stage

PREFERENCE, MEMORISED = "preference", "memorised"
QUICK = Protocol(
    foundation=LanguageFoundation(
        fine_tuning=Stage(pairs=10_000, steps=600, batch=64, lr=2e-3, clip=None),
        pairs=2000,
        held_out_pairs=512,
        answers=64,
        limit_answers=400,
    ),
    parts=(
        Part(
            PREFERENCE,
            arms=(*arms("dpo", "0.1", "0.4"), *arms("spo", "0.1")),
            stage=Stage(pairs=2000, steps=200, snapshots=5),
            seeds=1,
        ),
        Part(
            MEMORISED,
            arms=(*arms("dpo", "0.25"), *arms("spo", "0.25")),
            stage=Stage(pairs=64, steps=300, lr_end=1.0, snapshots=10),
            seeds=1,
            prefix="memorised-",
        ),
    ),
)
FULL = Protocol(
    foundation=replace(
        QUICK.foundation,
        fine_tuning=replace(QUICK.foundation.fine_tuning, steps=1000),
        pairs=3000,
    ),
    parts=(
        Part(
            PREFERENCE,
            arms=(
                *arms("dpo", "0.025", "0.05", "0.1", "0.2", "0.25", "0.4", "1", "4"),
                *arms("spo", "0.025", "0.05", "0.1", "0.25", "1"),
                *arms("spo-below0", "0.1"),
                *arms("squared", "0.1", "0.2"),
                *arms("dpo-soft", "0.25"),
                *arms("squared-gap", "0.25"),
                *arms("spo-gap", "0.25"),
                *arms("spo-gap-floor", "0.25"),
                *arms("spo-gap-weighted", "0.25"),
                *arms("spo-gap-weighted-below0", "0.25"),
                *arms("dpo", "0.025@noisy", "0.1@noisy", "0.25@noisy", "0.4@noisy", "1@noisy"),
                *arms("spo", "0.025@noisy", "0.1@noisy", "0.25@noisy"),
                *arms("spo-below0", "0.1@noisy"),
            ),
            stage=Stage(pairs=3000, steps=300, snapshots=5),
            seeds=5,
        ),
        Part(
            MEMORISED,
            arms=(*arms("dpo", "0.1", "1"), *arms("spo", "0.1", "1")),
            stage=Stage(pairs=300, steps=1500, lr_end=1.0, snapshots=30),
            seeds=1,
            prefix="memorised-",
        ),
    ),
)
