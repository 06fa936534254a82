"""Reviews that a policy writes to openings, VADER's reward of them, and pairs of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from benchmarks.studies import seeds
from benchmarks.studies.pretrained import IGNORED, TopBlocks, write_answers
from benchmarks.studies.training import Answers, Pairs

LEAST_GAP = 0.05
ROWS = 64
"""Reviews that are written side by side."""


def write_reviews(
    policy: TopBlocks,
    openings: Sequence[str],
    each: int,
    length: int,
    generator: torch.Generator,
) -> Answers:
    """Lets a policy write `each` reviews to every opening; they come opening by opening.

    The reward is VADER's compound score of a review without its opening.

    Raises:
      FloatingPointError: the policy's logits are not finite.
    """
    tokenizer = policy.base.tokenizer
    ids = [tokenizer(opening)["input_ids"] for opening in openings]
    width = max(map(len, ids)) - 1 + length
    by_length: dict[int, list[int]] = defaultdict(list)
    for place, prompt in enumerate(ids):
        by_length[len(prompt)].append(place)
    together = max(1, ROWS // each)
    written, places = [], []
    for alike in by_length.values():
        for start in range(0, len(alike), together):
            chunk = alike[start : start + together]
            prompts = [ids[place] for place in chunk]
            written.append(write_answers(policy, prompts, each, length, width, generator))
            places += chunk
    order = (torch.tensor(places).argsort()[:, None] * each + torch.arange(each)).flatten()
    states, labels, logps, reference = (
        torch.cat(parts)[order] for parts in zip(*written, strict=True)
    )
    rewards = [compound(tokenizer.decode(row[row != IGNORED])) for row in labels]
    inputs = {"states": states, "labels": labels}
    return Answers(inputs, torch.tensor(rewards, dtype=torch.float64), logps, reference)


@cache
def analyzer() -> SentimentIntensityAnalyzer:
    """VADER, whose lexicon is read once."""
    return SentimentIntensityAnalyzer()


def compound(text: str) -> float:
    """VADER's compound score, in [-1, 1]."""
    return float(analyzer().polarity_scores(text)["compound"])


def distinct_2(labels: Tensor) -> float:
    """The share of different ones among all pairs of neighbouring tokens of reviews."""
    first, second = labels[:, :-1], labels[:, 1:]
    there = (first != IGNORED) & (second != IGNORED)
    pairs = torch.stack((first[there], second[there]), 1)
    return len(pairs.unique(dim=0)) / max(1, len(pairs))


# ---------------------------------------------------------------------------------------- the pairs


def draw_pairs(reviews: Answers) -> Pairs:
    """Every two neighbouring reviews of an opening whose rewards differ, the better one chosen."""
    first = torch.arange(0, len(reviews.rewards), 2)
    pairs = labelled(Pairs(reviews, first, first + 1))
    # Reviews come opening by opening: in this order the first pairs would be of a few openings.
    return pairs[torch.randperm(len(pairs), generator=seeds.generator("order", len(pairs)))]


def draw_any_pairs(reviews: Answers, each: int, number: int, generator: torch.Generator) -> Pairs:
    """So many pairs of two of the `each` reviews of an opening whose rewards differ; none twice."""
    starts = torch.arange(0, len(reviews.rewards), each)[:, None]
    first, second = (starts + side for side in torch.triu_indices(each, each, 1))
    pairs = labelled(Pairs(reviews, first.flatten(), second.flatten()))
    return pairs[torch.randperm(len(pairs), generator=generator)[:number]]


def labelled(pairs: Pairs) -> Pairs:
    """Those of the pairs whose rewards differ, the better answer chosen."""
    pairs = pairs[pairs.gap.abs() >= LEAST_GAP]
    better = pairs.gap > 0
    return Pairs(
        pairs.answers,
        chosen=torch.where(better, pairs.chosen, pairs.rejected),
        rejected=torch.where(better, pairs.rejected, pairs.chosen),
    )
