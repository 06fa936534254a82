"""Reviews that a policy writes to openings, VADER's reward of them, and pairs of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from benchmarks.studies import seeds
from benchmarks.studies.pretrained import IGNORED, TopBlocks, Written, write_answers
from benchmarks.studies.training import Answers, Pairs

LEAST_GAP = 0.05
ROWS = 64
"""Reviews that are written side by side."""


@dataclass(frozen=True)
class Reviews:
    """What a policy wrote to P openings, n reviews each, opening by opening.

    Attributes:
      tokens: ids of the reviews [P * n, L]; `IGNORED` behind the end.
      inputs: what a policy reads the reviews from.
      rewards: VADER's compound score of each review without its opening, [P, n].
      logps: log-probabilities under the policy, nats, [P * n].
      reference: those under the reference.
    """

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
    return gather(in_order, tokenizer)


def gather(written: Sequence[Written], tokenizer: PreTrainedTokenizerBase) -> Reviews:
    """Puts the answers to all openings together and rewards them."""
    tokens = torch.cat([each.tokens for each in written])
    answers = [tokenizer.decode(row[row != IGNORED]) for row in tokens]
    longest = max(each.inputs["labels"].shape[1] for each in written)
    return Reviews(
        tokens,
        {
            name: torch.cat([pad(each.inputs[name], longest, fill) for each in written])
            for name, fill in (("states", 0.0), ("labels", IGNORED))
        },
        np.reshape([compound(answer) for answer in answers], (len(written), -1)),
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


# ---------------------------------------------------------------------------------------- the pairs


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
