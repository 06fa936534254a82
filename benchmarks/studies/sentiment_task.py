"""Short reviews as a task: openings that a model continues, rewarded by VADER's sentiment."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

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
from benchmarks.studies.pretrained import (
    IGNORED,
    TopBlocks,
    Written,
    load_base,
    reference_policy,
    write_answers,
)
from benchmarks.studies.store import Store
from benchmarks.studies.training import Answers, Pairs, Rounds

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
LEAST_GAP = 0.05
ROWS = 64
"""Reviews that are written side by side."""
SHOWN_TEXTS = 6
ANSWERS_ON_THE_WAY = 10
"""At most so many answers to each held-out opening judge a policy during its training."""


# ---------------------------------------------------------------------------------- the foundation


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
        """The pairs of each step, from what the policy writes to training openings."""
        openings = self.training_openings[: stage.openings]
        for number in range(stage.rounds):
            # The arms of a seed share the random numbers, so their first rounds are the same.
            generator = seeds.generator(seed, f"round {number}")
            try:
                reviews = write_reviews(policy, openings, stage.answers, self.length, generator)
            except FloatingPointError:
                return  # the policy is judged as it is, which finds the same
            fresh = draw_any_pairs(reviews, stage.pairs, generator)
            yield from (fresh[rows] for rows in torch.arange(len(fresh)).split(stage.batch))

    def judge(self, policy: TopBlocks, name: str) -> dict[str, Any]:
        """What a policy's own reviews of the held-out openings say of it."""
        generator = seeds.generator("answers", name)
        shape = (len(self.openings), self.answers)
        try:
            reviews = write_reviews(policy, self.openings, self.answers, self.length, generator)
        except FloatingPointError:
            keys = ("reward", "kl", *SentimentFoundation.measures)
            rewards = np.full(shape, math.nan).tolist()
            return {**dict.fromkeys(keys, math.nan), "rewards": rewards, "texts": []}
        return {
            "reward": float(reviews.rewards.mean()),
            "kl": (reviews.logps - reviews.reference).mean().item(),
            "tokens": reviews.lengths.double().mean().item(),
            "reference_nll": (-reviews.reference.sum() / reviews.lengths.sum()).item(),
            "distinct_2": distinct_2(reviews.tokens),
            "rewards": reviews.rewards.tolist(),
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


# ----------------------------------------------------------------------------- reviews and pairs


@dataclass(frozen=True)
class Reviews:
    """What a policy wrote to P openings, n reviews each, opening by opening.

    Attributes:
      texts: each with its opening.
      tokens: ids of the reviews [P * n, L]; `IGNORED` behind the end.
      inputs: what a policy reads the reviews from.
      rewards: VADER's compound score of each review without its opening, [P, n].
      logps: log-probabilities under the policy, nats, [P * n].
      reference: those under the reference.
    """

    texts: list[str]
    tokens: Tensor
    inputs: dict[str, Tensor]
    rewards: np.ndarray
    logps: Tensor
    reference: Tensor

    @property
    def lengths(self) -> Tensor:
        """Tokens of each review, [P * n]."""
        return (self.tokens != IGNORED).sum(1)

    @property
    def scored(self) -> Answers:
        """The reviews as answers that pairs are made of."""
        rewards = torch.tensor(self.rewards).flatten()
        return Answers(self.inputs, rewards, self.reference.float())


def write_reviews(
    policy: TopBlocks,
    openings: Sequence[str],
    each: int,
    length: int,
    generator: torch.Generator,
) -> Reviews:
    """Lets a policy write `each` reviews to every opening.

    Raises:
      FloatingPointError: the policy's logits are not finite.
    """
    tokenizer = policy.base.tokenizer
    ids = [tokenizer(opening)["input_ids"] for opening in openings]
    by_length: dict[int, list[int]] = defaultdict(list)
    for place, prompt in enumerate(ids):
        by_length[len(prompt)].append(place)
    written: dict[int, Written] = {}
    together = max(1, ROWS // each)
    for places in by_length.values():
        for start in range(0, len(places), together):
            chunk = places[start : start + together]
            prompts = [ids[place] for place in chunk]
            answers = write_answers(policy, prompts, each, length, generator)
            for offset, place in enumerate(chunk):
                written[place] = answers[offset * each : (offset + 1) * each]
    in_order = [written[place] for place in range(len(openings))]
    return gather(in_order, openings, tokenizer)


def gather(
    written: Sequence[Written], openings: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Reviews:
    """Puts the answers to all openings together and rewards them."""
    tokens = torch.cat([each.tokens for each in written])
    answers = [tokenizer.decode(row[row != IGNORED]) for row in tokens]
    number = len(written[0].tokens)
    longest = max(each.inputs["labels"].shape[1] for each in written)
    return Reviews(
        [openings[i // number] + answer for i, answer in enumerate(answers)],
        tokens,
        {
            name: torch.cat([pad(each.inputs[name], longest, fill) for each in written])
            for name, fill in (("states", 0.0), ("labels", IGNORED))
        },
        np.reshape([compound(answer) for answer in answers], (len(openings), number)),
        torch.cat([each.logps for each in written]),
        torch.cat([each.reference for each in written]),
    )


def pad(tensor: Tensor, length: int, fill: float) -> Tensor:
    """Lengthens dimension 1 of a tensor [M, T, ...] to `length`."""
    behind = (0, length - tensor.shape[1])
    return functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + behind, value=fill)


@cache
def analyzer() -> SentimentIntensityAnalyzer:
    """VADER, whose lexicon is read once."""
    return SentimentIntensityAnalyzer()


def compound(text: str) -> float:
    """VADER's compound score, in [-1, 1]."""
    return float(analyzer().polarity_scores(text)["compound"])


def distinct_2(tokens: Tensor) -> float:
    """The share of different ones among all pairs of neighbouring tokens."""
    first, second = tokens[:, :-1], tokens[:, 1:]
    there = second != IGNORED
    pairs = torch.stack((first[there], second[there]), 1)
    return len(pairs.unique(dim=0)) / max(1, len(pairs))


def draw_pairs(reviews: Reviews) -> Pairs:
    """Every two neighbouring reviews of an opening whose rewards differ, the better one chosen."""
    first = torch.arange(0, reviews.rewards.size, 2)
    pairs = labelled(Pairs(reviews.scored, first, first + 1))
    # Reviews come opening by opening: in this order the first pairs would be of a few openings.
    return pairs[torch.randperm(len(pairs), generator=seeds.generator("order", len(pairs)))]


def draw_any_pairs(reviews: Reviews, number: int, generator: torch.Generator) -> Pairs:
    """So many of all pairs of two reviews of an opening whose rewards differ; no pair twice."""
    openings, each = reviews.rewards.shape
    starts = each * torch.arange(openings)[:, None]
    first, second = (starts + side for side in torch.triu_indices(each, each, 1))
    pairs = labelled(Pairs(reviews.scored, first.flatten(), second.flatten()))
    return pairs[torch.randperm(len(pairs), generator=generator)[:number]]


def labelled(pairs: Pairs) -> Pairs:
    """Those of the pairs whose rewards differ, the better answer chosen."""
    pairs = pairs[pairs.gap.abs() >= LEAST_GAP]
    return pairs.flipped(pairs.gap < 0)
