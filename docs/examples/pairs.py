"""From a file of preference pairs to padded batches of token ids."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that does not count


class InputError(Exception):
    """The pairs, the model or the output folder cannot be used."""


class Pair(NamedTuple):
    """One line of the file: a prompt with the better and the worse completion."""

    prompt: str
    chosen: str
    rejected: str


class Text(NamedTuple):
    """A prompt with one completion as token ids, [tokens] each. The labels ignore the prompt."""

    ids: Tensor
    labels: Tensor


class EncodedPair(NamedTuple):
    """A pair as token ids."""

    chosen: Text
    rejected: Text


class Batch(NamedTuple):
    """Texts that are padded on the right to the longest, [texts, tokens] each."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


def read_pairs(path: Path) -> list[Pair]:
    """Reads a JSON Lines file with the keys prompt, chosen and rejected, as TRL and datasets do.

    Raises:
      InputError: the file cannot be read, or a line is not a pair. The message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--pairs: expected a readable UTF-8 file, got: {error}") from error
    return [
        parse_pair(line, f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def parse_pair(line: str, where: str) -> Pair:
    """Reads one line. Keys other than the three are ignored."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: expected a JSON object, got malformed JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, got {record!r:.40}")
    for key in ("prompt", "chosen", "rejected"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            got = f"{record[key]!r:.40}" if key in record else f"only the keys {list(record)}"
            raise InputError(f"{where}: expected text under the key {key!r}, got {got}")
    if record["chosen"] == record["rejected"]:
        raise InputError(f"{where}: expected two different completions, got the same text twice")
    return Pair(record["prompt"], record["chosen"], record["rejected"])


def hold_out(pairs: Sequence[Pair], prompts: int) -> tuple[list[Pair], list[Pair]]:
    """Splits pairs by prompt, because completions of one prompt are similar.

    Args:
      pairs: all pairs.
      prompts: the number of prompts to hold out.

    Returns:
      The pairs to train on, and the pairs to hold out.

    Raises:
      InputError: no prompt is left to train on.
    """
    different = sorted({pair.prompt for pair in pairs})
    if len(different) <= prompts:
        got = f"{len(different)} with --held-out {prompts}"
        raise InputError(f"--pairs: expected more prompts than are held out, got {got}")
    chosen = set(random.sample(different, prompts))
    return (
        [pair for pair in pairs if pair.prompt not in chosen],
        [pair for pair in pairs if pair.prompt in chosen],
    )


def encode(pair: Pair, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedPair:
    """Returns a pair as token ids, each text cut to `max_length` tokens."""
    prompt = encode_prompt(pair.prompt, tokenizer)
    # Prompt and completion are encoded apart, so that no token crosses their boundary.
    chosen, rejected = (
        [*tokenizer.encode(completion, add_special_tokens=False), tokenizer.eos_token_id]
        for completion in (pair.chosen, pair.rejected)
    )
    # The question is usually at the end of a prompt, so the prompt loses its beginning, down to
    # half of the length. Only then does a completion lose its end.
    room = max_length - max(len(chosen), len(rejected))
    prompt = prompt[-max(room, max_length // 2) :]
    return EncodedPair(join(prompt, chosen, max_length), join(prompt, rejected, max_length))


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns a prompt in the model's chat template, or as a line if the model has none."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(prompt + "\n")
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def join(prompt: list[int], completion: list[int], max_length: int) -> Text:
    """Joins a prompt with as much of a completion as fits."""
    ids = torch.tensor([*prompt, *completion][:max_length])
    labels = ids.clone()
    labels[: len(prompt)] = IGNORED
    return Text(ids, labels)


def pad(texts: Sequence[Text], device: torch.device) -> Batch:
    """Pads texts for one forward pass. The mask hides the padding, so any token id will do."""
    columns = (
        ([text.ids for text in texts], 0),
        ([torch.ones_like(text.ids) for text in texts], 0),
        ([text.labels for text in texts], IGNORED),
    )
    return Batch(*(pad_sequence(rows, True, filler).to(device) for rows, filler in columns))
