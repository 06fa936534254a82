"""Judged preference pairs: read from JSON lines, and as token ids."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from transformers import PreTrainedTokenizerBase

from benchmarks.alignment.errors import InputError
from benchmarks.alignment.pretrained import IGNORED


@dataclass(frozen=True)
class Pair:
    """A prompt with two completions. `reward_gap` > 0 says how much better the chosen one is."""

    prompt: str
    chosen: str
    rejected: str
    reward_gap: float


@dataclass(frozen=True)
class Text:
    """A prompt and a completion as token ids; the labels of the prompt are ignored."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class TokenPair:
    """A pair as token ids. `truncated` says whether a text was cut."""

    chosen: Text
    rejected: Text
    truncated: bool
    reward_gap: float


def read_pairs(path: Path) -> list[Pair]:
    """Reads a file of JSON lines, plain or .gz, with the keys prompt, chosen and rejected.

    Each line also has `reward_gap`, or the judge's probability `p_chosen` > 0.5 that the chosen
    completion is better. The gap is then the log-odds.

    Raises:
      InputError: the file cannot be read, or a line is not a judged pair.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a readable file of pairs, got: {error}") from error
    return [parse_pair(line, f"{path}:{number}") for number, line in lines]


def parse_pair(line: str, where: str) -> Pair:
    """Reads one line."""

    def refuse(expected: str) -> NoReturn:
        raise InputError(f"{where}: expected {expected}, got {line.strip():.60}")

    try:
        record = json.loads(line)
        texts = [record[key] for key in ("prompt", "chosen", "rejected")]
        known = "reward_gap" in record
        gap = float(record["reward_gap"]) if known else log_odds(record["p_chosen"])
    except (ValueError, TypeError, KeyError, ZeroDivisionError):
        refuse("an object with prompt, chosen, rejected and reward_gap or p_chosen")
    if not all(isinstance(text, str) for text in texts):
        refuse("text as prompt, chosen and rejected")
    if not 0.0 < gap < math.inf:
        refuse("a finite reward gap above 0")
    return Pair(*texts, gap)


def log_odds(probability: float) -> float:
    """Returns the log-odds of a probability."""
    return math.log(probability / (1.0 - probability))


def encode_pair(pair: Pair, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenPair:
    """Returns a pair as token ids."""
    prompt = encode_prompt(pair.prompt, tokenizer)
    chosen, rejected = (
        [*tokenizer.encode(completion, add_special_tokens=False), tokenizer.eos_token_id]
        for completion in (pair.chosen, pair.rejected)
    )
    longest = max(len(chosen), len(rejected))
    # The question is at the end of a prompt, so the prompt loses its start, at most half the room.
    kept = prompt[-max(max_length - longest, max_length // 2) :]
    return TokenPair(
        chosen=join(kept, chosen, max_length),
        rejected=join(kept, rejected, max_length),
        truncated=len(prompt) + longest > max_length,
        reward_gap=pair.reward_gap,
    )


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns a prompt in the model's chat template, or as a line if the model has none."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(prompt + "\n")
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def join(prompt: list[int], completion: list[int], max_length: int) -> Text:
    """Joins a prompt and as much of a completion as fits."""
    completion = completion[: max_length - len(prompt)]
    return Text(ids=prompt + completion, labels=[IGNORED] * len(prompt) + completion)
