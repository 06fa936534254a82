"""What every arm of a seed starts from: openings that a model continues, rewarded by VADER."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from benchmarks.studies import seeds
from benchmarks.studies.pretrained import TopBlocks, load_base, reference_policy
from benchmarks.studies.reviews import distinct_2, draw_any_pairs, draw_pairs, write_reviews
from benchmarks.studies.store import Store, write_atomically
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
SUFFIX = ".safetensors"
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

    def lay(self, seed: int, store: Store) -> None:
        """Lets the reference write, makes pairs, and judges it."""
        openings = split_openings(self.held_out_openings, seed)
        reference = reference_policy(self.model)
        made = {}
        for split, prompts, each, name in zip(
            ("pairs", "held_out"),
            openings,
            (self.pair_answers, self.held_out_pair_answers),
            ("training pairs", "held-out pairs"),
            strict=True,
        ):
            generator = seeds.generator(seed, name)
            made[split] = draw_pairs(
                write_reviews(reference, prompts, each, self.length, generator)
            )
        tensors = {
            f"{split}/{name}": tensor.contiguous()
            for split, pairs in made.items()
            for name, tensor in pairs.tensors().items()
        }
        write_atomically(store.path(foundation_name(seed), SUFFIX), save(tensors))
        ground = Ground(reference, *made.values(), *openings, self.answers, self.length)
        judged = ground.judge(reference, foundation_name(seed))
        pairs = {"pairs": len(ground.pairs), "mean_gap": ground.pairs.gap.mean().item()}
        store.write(foundation_name(seed), {**judged, **pairs})

    def load(self, store: Store, seed: int) -> Ground:
        """The pretrained model, and a seed's pairs."""
        tensors = load_file(store.path(foundation_name(seed), SUFFIX))
        pairs = (Pairs.of_tensors(tensors, f"{split}/") for split in ("pairs", "held_out"))
        openings = split_openings(self.held_out_openings, seed)
        reference = reference_policy(self.model)
        return Ground(reference, *pairs, *openings, self.answers, self.length)


def foundation_name(seed: int) -> str:
    """Under which the store keeps a seed's foundation."""
    return f"seed-{seed}/foundation"


@dataclass(frozen=True)
class Ground:
    """A foundation that has been laid.

    Attributes:
      policy: the reference of all arms, and what they start from.
      pairs: training pairs, each labelled by its true rewards.
      held_out: pairs on the held-out openings, labelled by their true rewards.
      training_openings: those of the training pairs.
      openings: the held-out ones.
      answers: reviews by which a policy is judged, for each of them.
      length: tokens after which a review is cut off.
    """

    policy: TopBlocks
    pairs: Pairs
    held_out: Pairs
    training_openings: list[str]
    openings: list[str]
    answers: int
    length: int

    @property
    def on_the_way(self) -> Ground:
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

        Args:
          policy: the policy.
          name: seeds the reviews, so that no two policies share random numbers: with shared
            ones, policies that are nearly alike give the same text, and ties hide which of
            them is better.

        Returns:
          Means over the reviews under "reward", "kl" and `MEASURES`; of every review, [P, n], its
          "rewards" and "log_ratios" (log pi - log pi_ref, nats). All nan where the policy's logits
          are not finite.
        """
        generator = seeds.generator("answers", name)
        shape = (len(self.openings), self.answers)
        try:
            reviews = write_reviews(policy, self.openings, self.answers, self.length, generator)
        except FloatingPointError:
            keys = ("reward", "kl", *MEASURES)
            unknown = np.full(shape, math.nan).tolist()
            each = {"rewards": unknown, "log_ratios": unknown}
            return {**dict.fromkeys(keys, math.nan), **each}
        log_ratios = reviews.logps - reviews.reference
        return {
            "reward": float(reviews.rewards.mean()),
            "kl": log_ratios.mean().item(),
            "tokens": reviews.lengths.double().mean().item(),
            "reference_nll": (-reviews.reference.sum() / reviews.lengths.sum()).item(),
            "distinct_2": distinct_2(reviews.tokens),
            "rewards": reviews.rewards.tolist(),
            "log_ratios": log_ratios.view(shape).tolist(),
        }


def all_openings() -> list[str]:
    """Every opening of every thing."""
    return [opening.format(thing) for opening in OPENINGS for thing in THINGS]


def split_openings(held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """The openings to train on, and so many held-out ones."""
    openings = all_openings()
    seeds.rng(seed, "openings").shuffle(openings)
    return openings[held_out:], openings[:held_out]
