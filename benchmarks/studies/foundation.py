"""What every arm of a seed starts from: openings that a model continues, rewarded by VADER."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.studies import seeds
from benchmarks.studies.pretrained import IGNORED, TopBlocks, load_base, reference_policy
from benchmarks.studies.reviews import distinct_2, draw_any_pairs, draw_pairs, write_reviews
from benchmarks.studies.store import Store
from benchmarks.studies.training import Pairs, Rounds

MEASURES = ("tokens", "reference_nll", "distinct_2")
"""What is measured of a policy's completions beside reward and KL."""
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
SPLITS = ("pairs", "held-out")
ANSWERS_ON_THE_WAY = 10
"""At most so many answers to each held-out opening judge a policy during its training."""


@dataclass(frozen=True)
class Foundation:
    """A pretrained model as the reference, and pairs of its own reviews.

    Attributes:
      model: a Transformers folder, or a name on the Hugging Face Hub.
      held_out_openings: openings that no pair is trained on; the others give the pairs.
      pair_answers: reviews to each opening to train on; two make a pair.
      held_out_pair_answers: reviews to each held-out opening for the held-out pairs.
      answers: reviews by which a policy is judged, for each held-out opening.
      length: tokens after which a review is cut off.
    """

    model: str
    held_out_openings: int = 24
    pair_answers: int = 24
    held_out_pair_answers: int = 8
    answers: int = 50
    length: int = 12

    def settings(self) -> dict[str, Any]:
        """All that the results depend on: the model by its weights, not by where they lie."""
        return {**asdict(self), "model": load_base(self.model).description}

    def openings(self, seed: int) -> tuple[list[str], list[str]]:
        """The openings to train on, and the held-out ones."""
        openings = all_openings()
        random.Random(seeds.number(seed, "openings")).shuffle(openings)
        return openings[self.held_out_openings :], openings[: self.held_out_openings]

    def lay(self, seed: int, store: Store) -> None:
        """Lets the reference write, makes pairs, and judges it."""
        reference = reference_policy(self.model)

        def drawn(openings: list[str], each: int, name: str) -> Pairs:
            generator = seeds.generator(seed, name)
            return draw_pairs(write_reviews(reference, openings, each, self.length, generator))

        training, held_out = self.openings(seed)
        pairs = drawn(training, self.pair_answers, "training pairs")
        others = drawn(held_out, self.held_out_pair_answers, "held-out pairs")
        for split, made in zip(SPLITS, (pairs, others), strict=True):
            store.write_tensors(f"{foundation_name(seed)}-{split}", made.tensors())
        ground = Ground(self, seed, reference, pairs, others)
        judged = ground.judge(reference, foundation_name(seed), self.answers)
        known = {"pairs": len(pairs), "mean_gap": pairs.gap.mean().item()}
        store.write(foundation_name(seed), {**judged, **known})

    def load(self, seed: int, store: Store) -> Ground:
        """What `lay` has made."""
        names = (f"{foundation_name(seed)}-{split}" for split in SPLITS)
        pairs = (Pairs.of_tensors(store.read_tensors(name)) for name in names)
        return Ground(self, seed, reference_policy(self.model), *pairs)


def foundation_name(seed: int) -> str:
    """Under which the store keeps a seed's foundation."""
    return f"seed-{seed}/foundation"


def all_openings() -> list[str]:
    """Every opening of every thing."""
    return [opening.format(thing) for opening in OPENINGS for thing in THINGS]


@dataclass(frozen=True)
class Ground:
    """A seed's foundation that has been laid.

    Attributes:
      foundation: what it is made by.
      seed: the seed.
      reference: of all arms, and what they start from.
      pairs: training pairs, each labelled by its true rewards.
      held_out: pairs on the held-out openings, labelled by their true rewards.
    """

    foundation: Foundation
    seed: int
    reference: TopBlocks
    pairs: Pairs
    held_out: Pairs

    def rounds(self, policy: TopBlocks, stage: Rounds) -> Iterator[Pairs]:
        """The pairs of each step, from what the policy writes to training openings.

        A round with fewer pairs takes fewer steps; the first without a batch ends the training.
        """
        openings = self.foundation.openings(self.seed)[0][: stage.openings]
        for number in range(stage.rounds):
            # The arms of a seed share the random numbers, so their first rounds are the same.
            generator = seeds.generator(self.seed, f"round {number}")
            length = self.foundation.length
            try:
                reviews = write_reviews(policy, openings, stage.answers, length, generator)
            except FloatingPointError:
                return  # the policy is judged as it is, which finds the same
            fresh = draw_any_pairs(reviews, stage.answers, stage.pairs, generator)
            rows = torch.arange(len(fresh) // stage.batch * stage.batch).view(-1, stage.batch)
            if len(rows) == 0:
                return
            yield from (fresh[batch] for batch in rows)

    def judge(self, policy: TopBlocks, name: str, each: int) -> dict[str, Any]:
        """What a policy's own reviews of the held-out openings say of it.

        Args:
          policy: the policy.
          name: seeds the reviews, so that no two policies share random numbers: with shared
            ones, policies that are nearly alike give the same text, and ties hide which of
            them is better.
          each: reviews of each opening.

        Returns:
          Means over the reviews under "reward", "kl" and `MEASURES`; of every review, [P, n], its
          "rewards" and "log_ratios" (log pi - log pi_ref, nats). All nan where the policy's logits
          are not finite.
        """
        openings = self.foundation.openings(self.seed)[1]
        generator = seeds.generator("answers", name)
        try:
            reviews = write_reviews(policy, openings, each, self.foundation.length, generator)
        except FloatingPointError:
            unknown = [[math.nan] * each] * len(openings)
            means = dict.fromkeys(("reward", "kl", *MEASURES), math.nan)
            return {**means, "rewards": unknown, "log_ratios": unknown}
        labels, log_ratios = reviews.inputs["labels"], reviews.logps - reviews.reference
        lengths = (labels != IGNORED).sum(1)
        return {
            "reward": reviews.rewards.numpy().mean().item(),
            "kl": log_ratios.mean().item(),
            "tokens": lengths.double().mean().item(),
            "reference_nll": (-reviews.reference.sum() / lengths.sum()).item(),
            "distinct_2": distinct_2(labels),
            "rewards": reviews.rewards.view(-1, each).tolist(),
            "log_ratios": log_ratios.view(-1, each).tolist(),
        }
