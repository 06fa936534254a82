"""Short reviews as a task: openings that a model continues, rewarded by VADER's sentiment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from benchmarks.studies import seeds
from benchmarks.studies.evaluation import find_limits
from benchmarks.studies.experiment import (
    Foundation,
    Ground,
    describe_pairs,
    foundation_name,
    load_kept,
    save_ground,
)
from benchmarks.studies.pretrained import TopBlocks, load_base, reference_policy
from benchmarks.studies.reviews import (
    Reviews,
    distinct_2,
    draw_any_pairs,
    draw_pairs,
    write_reviews,
)
from benchmarks.studies.store import Store
from benchmarks.studies.training import Pairs, Rounds

THINGS = (
    *("hotel", "film", "museum", "novel", "concert", "restaurant"),
    *("lecture", "city", "teacher", "coffee", "game", "train ride"),
)
OPENINGS = (
    "I must say that the {} was",
    "To be honest, the {} was",
    "In my opinion, the {} was",
    "After a week, the {} was",
    "My friends and I found the {}",
    "What I remember is that the {} was",
)
SHOWN_TEXTS = 6
ANSWERS_ON_THE_WAY = 10
"""At most so many answers to each held-out opening judge a policy during its training."""


@dataclass(frozen=True)
class SentimentFoundation(Foundation):
    """A pretrained model as the reference, and pairs of its own reviews.

    Attributes:
      model: a Transformers folder, or a name on the Hugging Face Hub.
      held_out_openings: openings that no pair is trained on; the others give the pairs.
      pair_answers: reviews to each opening to train on; two make a pair.
      held_out_pair_answers: reviews to each held-out opening for the held-out pairs.
      answers: reviews by which a policy is judged, for each held-out opening.
      limit_answers: reviews of the reference for each held-out opening, for best of n.
      length: tokens after which a review is cut off.
    """

    reference_name: ClassVar[str] = "reference"
    measures: ClassVar[tuple[str, ...]] = ("tokens", "reference_nll", "distinct_2")
    measured_pairs: ClassVar[int] = 64
    snapshot_pairs: ClassVar[int] = 32

    model: str
    held_out_openings: int = 24
    pair_answers: int = 24
    held_out_pair_answers: int = 8
    answers: int = 10
    limit_answers: int = 16
    length: int = 12

    def settings(self) -> dict[str, Any]:
        """All that the results depend on: the model by its weights, not by where they lie."""
        return {**asdict(self), "model": load_base(self.model).description}

    def lay(self, seed: int, store: Store) -> None:
        """Lets the reference write, makes pairs, judges it and finds what best of n reaches."""
        training, held_out = split_openings(self.held_out_openings, seed)
        reference = reference_policy(self.model)

        def written(openings: Sequence[str], each: int, name: str) -> Reviews:
            generator = seeds.generator(seed, name)
            return write_reviews(reference, openings, each, self.length, generator)

        ground = SentimentGround(
            reference,
            draw_pairs(written(training, self.pair_answers, "training pairs")),
            draw_pairs(written(held_out, self.held_out_pair_answers, "held-out pairs")),
            training,
            held_out,
            self.answers,
            self.length,
        )
        save_ground(ground, store, seed)
        limits = find_limits(written(held_out, self.limit_answers, "limits").rewards)
        judged = ground.judge(reference, foundation_name(seed))
        description = describe_pairs(ground.pairs, seed)
        store.write(foundation_name(seed), {**judged, "limits": limits, **description})

    def load(self, store: Store, seed: int) -> SentimentGround:
        """The pretrained model, and a seed's pairs."""
        *pairs, _ = load_kept(store, seed)
        openings = split_openings(self.held_out_openings, seed)
        reference = reference_policy(self.model)
        return SentimentGround(reference, *pairs, *openings, self.answers, self.length)


@dataclass(frozen=True)
class SentimentGround(Ground):
    """A pretrained model and pairs of its reviews.

    Attributes:
      training_openings: those of the training pairs.
      openings: the held-out ones.
      answers: reviews by which a policy is judged, for each of them.
      length: tokens after which a review is cut off.
    """

    training_openings: list[str]
    openings: list[str]
    answers: int
    length: int

    @property
    def on_the_way(self) -> SentimentGround:
        """The same with fewer answers."""
        return replace(self, answers=min(self.answers, ANSWERS_ON_THE_WAY))

    def rounds(self, policy: TopBlocks, stage: Rounds, seed: int) -> Iterator[Pairs]:
        """The pairs of each step, from what the policy writes to training openings.

        A round with fewer pairs takes fewer steps; the first without a batch ends the training.
        """
        openings = self.training_openings[: stage.openings]
        for number in range(stage.rounds):
            # The arms of a seed share the random numbers, so their first rounds are the same.
            generator = seeds.generator(seed, f"round {number}")
            try:
                reviews = write_reviews(policy, openings, stage.answers, self.length, generator)
            except FloatingPointError:
                return  # the policy is judged as it is, which finds the same
            fresh = draw_any_pairs(reviews, stage.pairs, generator)
            rows = torch.arange(len(fresh) // stage.batch * stage.batch).view(-1, stage.batch)
            if len(rows) == 0:
                return
            yield from (fresh[batch] for batch in rows)

    def judge(self, policy: TopBlocks, name: str) -> dict[str, Any]:
        """What a policy's own reviews of the held-out openings say of it.

        "log_ratios" are log pi - log pi_ref of every review, nats, [P, n].
        """
        generator = seeds.generator("answers", name)
        shape = (len(self.openings), self.answers)
        try:
            reviews = write_reviews(policy, self.openings, self.answers, self.length, generator)
        except FloatingPointError:
            keys = ("reward", "kl", *SentimentFoundation.measures)
            unknown = np.full(shape, math.nan).tolist()
            each = {"rewards": unknown, "log_ratios": unknown}
            return {**dict.fromkeys(keys, math.nan), **each, "texts": []}
        log_ratios = reviews.logps - reviews.reference
        return {
            "reward": float(reviews.rewards.mean()),
            "kl": log_ratios.mean().item(),
            "tokens": reviews.lengths.double().mean().item(),
            "reference_nll": (-reviews.reference.sum() / reviews.lengths.sum()).item(),
            "distinct_2": distinct_2(reviews.tokens),
            "rewards": reviews.rewards.tolist(),
            "log_ratios": log_ratios.view(shape).tolist(),
            "texts": reviews.texts[:: self.answers][:SHOWN_TEXTS],
        }


def all_openings() -> list[str]:
    """Every opening of every thing."""
    return [opening.format(thing) for opening in OPENINGS for thing in THINGS]


def split_openings(held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """The openings to train on, and so many held-out ones."""
    openings = all_openings()
    seeds.rng(seed, "openings").shuffle(openings)
    return openings[held_out:], openings[:held_out]
