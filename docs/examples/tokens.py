"""Tensors from pairs: token ids, truncation, padding and the order of the batches."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pairs import Pair

IGNORED = -100
T = TypeVar("T")


@dataclass(frozen=True)
class Text:
    """A prompt with a completion, as token ids. The labels are -100 on the prompt."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class TokenPair:
    """A pair as token ids.

    Attributes:
      chosen: the prompt with the better completion.
      rejected: the prompt with the other completion.
      truncated: whether a text was cut.
      reward_gap: how much better the chosen completion is, or None if that is unknown.
    """

    chosen: Text
    rejected: Text
    truncated: bool
    reward_gap: float | None

    @property
    def length(self) -> int:
        """The number of tokens of the longer text."""
        return max(len(self.chosen.ids), len(self.rejected.ids))


@dataclass(frozen=True)
class ScoredPair(TokenPair):
    """A pair as token ids, with the log-probabilities of its completions under the reference.

    Attributes:
      reference_chosen: log pi_ref(chosen | prompt), nats.
      reference_rejected: log pi_ref(rejected | prompt), nats.
    """

    reference_chosen: float
    reference_rejected: float


@dataclass(frozen=True)
class Batch:
    """Texts padded to one length: three integer tensors of shape [texts, longest]."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


def encode_pair(pair: Pair, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenPair:
    """Encodes a pair as tokens, and truncates texts to `max_length`."""
    # Prompt and completion are encoded separately, so no token crosses their boundary.
    prompt = encode_prompt(pair.prompt, tokenizer)
    chosen, rejected = (
        [*tokenizer.encode(completion, add_special_tokens=False), tokenizer.eos_token_id]
        for completion in (pair.chosen, pair.rejected)
    )
    longest = max(len(chosen), len(rejected))
    # The prompt is truncated first, from its start, because the question is usually at its end. It
    # keeps half of the length, because a completion without its question is useless.
    kept = prompt[-max(max_length - longest, max_length // 2) :]
    return TokenPair(
        chosen=join(kept, chosen, max_length),
        rejected=join(kept, rejected, max_length),
        truncated=len(prompt) + longest > max_length,
        reward_gap=pair.reward_gap,
    )


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encodes a prompt with the model's chat template, or as a line if the model has none."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(prompt + "\n")
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def join(prompt: list[int], completion: list[int], max_length: int) -> Text:
    """Joins a prompt and as much of a completion as fits. Only the completion has labels."""
    completion = completion[: max_length - len(prompt)]
    return Text(ids=prompt + completion, labels=[IGNORED] * len(prompt) + completion)


def pad_pairs(pairs: Sequence[TokenPair], device: torch.device | str) -> Batch:
    """Pads pairs for one forward pass: all chosen texts, then all rejected."""
    return pad([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs], device)


def pad(texts: Sequence[Text], device: torch.device | str) -> Batch:
    """Pads texts on the right to the longest of them."""
    longest = max(len(text.ids) for text in texts)

    def filled(rows: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows], device=device)

    # The mask hides the padding, so any token id works, here 0.
    return Batch(
        ids=filled([text.ids for text in texts], 0),
        mask=filled([[1] * len(text.ids) for text in texts], 0),
        labels=filled([text.labels for text in texts], IGNORED),
    )


def known_gaps(pairs: Sequence[TokenPair], device: torch.device | str) -> Tensor | None:
    """Returns the reward gaps of a batch of pairs, [B], or None if they are unknown."""
    if pairs[0].reward_gap is None:
        return None
    return torch.tensor([pair.reward_gap for pair in pairs], device=device)


def draw_batches(items: Sequence[T], steps: int, batch_size: int, seed: int) -> Iterator[list[T]]:
    """Yields a full batch for every step, from repeated shuffled passes over the items."""
    rng = random.Random(seed)
    passes = (rng.sample(items, len(items)) for _ in itertools.count())
    shuffled = itertools.chain.from_iterable(passes)
    for _ in range(steps):
        yield list(itertools.islice(shuffled, batch_size))
