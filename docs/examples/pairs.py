"""Preference pairs: JSON lines, checked line by line, split into training and held-out pairs."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from arguments import Options
from errors import InputError

HELD_OUT_SHARE = 0.1
MAX_REWARD_GAP = 1e9  # its square fits a float32
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """One line of the pairs file.

    Attributes:
      prompt: the question.
      chosen: the better answer.
      rejected: the other answer.
      split: "train", "test", or None if the line has no split.
      line: the number of the line, from 1.
      reward_gap: how much better the chosen answer is, > 0, or None without --reward-gap.
    """

    prompt: str
    chosen: str
    rejected: str
    split: str | None
    line: int
    reward_gap: float | None = None


@dataclass(frozen=True)
class Split:
    """The pairs to train on and those held out."""

    train: list[Pair]
    held_out: list[Pair]


def read_pairs(path: Path, *, with_gap: bool = False) -> list[Pair]:
    """Reads the pairs of a JSONL file, plain or .gz. Skips blank lines.

    Args:
      path: the file.
      with_gap: whether each line must have `reward_gap` or `p_chosen`. Otherwise they are ignored.

    Raises:
      InputError: the file cannot be read, or a line is not a pair.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            lines = enumerate(file, start=1)
            return [parse_pair(text, path, line, with_gap) for line, text in lines if text.strip()]
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: expected a readable file of pairs, got: {reason}") from error


def parse_pair(text: bytes, path: Path, line: int, with_gap: bool) -> Pair:
    """Reads one line of the pairs file."""

    def refuse(expected: str, got: str) -> NoReturn:
        raise InputError(f"{path}:{line}: expected {expected}, got {got}")

    record = parse_object(text, refuse)
    for key in ("prompt", "chosen", "rejected"):
        if key not in record:
            refuse(f"the key {key!r}", f"the keys {list(record)!r:.60}")
        if not isinstance(record[key], str):
            refuse(f"a string as {key!r}", f"{record[key]!r:.40}")
        if LONE_SURROGATE.search(record[key]):
            refuse(f"text as {key!r}", "half a character: a lone surrogate")
        if key != "prompt" and not record[key].strip():
            refuse(f"text as {key!r}", repr(record[key]))
    if record["chosen"] == record["rejected"]:
        refuse("a rejected completion that differs from the chosen one", "the same twice")
    split = record.get("split")
    if "split" in record and split not in ("train", "test"):
        refuse("'train' or 'test' as 'split'", f"{split!r:.40}")
    gap = parse_gap(record, refuse) if with_gap else None
    return Pair(record["prompt"], record["chosen"], record["rejected"], split, line, gap)


def parse_object(text: bytes, refuse: Callable[[str, str], NoReturn]) -> dict[str, object]:
    """Reads the JSON object of one line."""
    try:
        record = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        refuse("UTF-8 text", f"a byte that is not: {error.reason}")
    except json.JSONDecodeError as error:
        refuse("a JSON object", f"malformed JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError):
        refuse("a JSON object", "numbers or nesting that Python does not read")
    if not isinstance(record, dict):
        refuse("a JSON object", f"{record!r:.40}")
    return record


def parse_gap(record: dict[str, object], refuse: Callable[[str, str], NoReturn]) -> float:
    """Reads the reward gap of one line."""
    given = [key for key in ("reward_gap", "p_chosen") if key in record]
    if len(given) != 1:
        refuse("one of the keys 'reward_gap' and 'p_chosen'", " and ".join(given) or "neither")
    key = given[0]
    low, high = (0.0, MAX_REWARD_GAP) if key == "reward_gap" else (0.5, 1.0)
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
        refuse(f"a number above {low:g} and below {high:g} as {key!r}", f"{value!r:.40}")
    return float(value) if key == "reward_gap" else math.log(value / (1.0 - value))


def split_pairs(pairs: list[Pair], options: Options) -> Split:
    """Splits the pairs by their `split`, or by prompt if no line has one.

    Raises:
      InputError: some lines have a split and others do not, or one side is empty.
    """
    unmarked = [pair for pair in pairs if pair.split is None]
    if unmarked and len(unmarked) < len(pairs):
        raise InputError(
            f"{options.pairs}:{unmarked[0].line}: expected 'split' on every line or on none, "
            "got a line without it"
        )
    if unmarked:
        # Hold out whole prompts, because the answers to one prompt are similar.
        prompts = sorted({pair.prompt for pair in pairs})
        random.Random(options.seed).shuffle(prompts)
        chosen = set(prompts[: max(1, round(HELD_OUT_SHARE * len(prompts)))])
        held_out = [pair for pair in pairs if pair.prompt in chosen]
        train = [pair for pair in pairs if pair.prompt not in chosen]
    else:
        held_out = [pair for pair in pairs if pair.split == "test"]
        train = [pair for pair in pairs if pair.split == "train"]
    if not (train and held_out):
        raise InputError(
            f"{options.pairs}: expected pairs to train on and pairs to hold out, "
            f"got {len(train)} and {len(held_out)}"
        )
    if options.held_out is not None:
        held_out = draw_subset(held_out, options.held_out, options.seed)
    return Split(train, held_out)


def draw_subset(items: Sequence[T], size: int, seed: int) -> list[T]:
    """Draws at most `size` of the items, in their original order."""
    if size >= len(items):
        return list(items)
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), size))]
