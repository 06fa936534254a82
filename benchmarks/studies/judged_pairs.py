"""Judged preference pairs: a file of them, as token ids, and the folds that they are cut into."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.studies import InputError, seeds
from benchmarks.studies.pretrained import IGNORED, Base, TopBlocks, load_base, reference_policy

LENGTH = 160
"""The most tokens of a prompt and its answer. Longer ones lose the end of the answer."""
FOLDS = 5
LEAST_PAIRS = 10


class Pair(NamedTuple):
    """A line of the file; `reward_gap` is how much better the chosen answer is."""

    prompt: str
    chosen: str
    rejected: str
    reward_gap: float


class Text(NamedTuple):
    """A prompt with an answer as token ids; the labels are `IGNORED` on the prompt."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Material:
    """A file of preference pairs, and the model that is trained on them.

    Attributes:
      file: JSON lines.
      model: a Transformers folder, or a name on the Hugging Face Hub.
    """

    file: Path
    model: str

    @property
    def pairs(self) -> list[Pair]:
        """All pairs of the file.

        Raises:
          InputError: a line is no pair with a gap, or the prompts are too few for the folds.
        """
        return read_once(self.file)

    @property
    def description(self) -> str:
        """The pairs in one line: how many there are, and a fingerprint."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            digest.update(repr(tuple(pair)).encode())
        return f"{len(self.pairs)} pairs, {digest.hexdigest()[:12]}"

    @cached_property
    def fold_of_each(self) -> Tensor:
        """The number of the fold that each pair is in, [N]; pairs of one prompt share it."""
        prompts = sorted({pair.prompt for pair in self.pairs})
        seeds.rng("folds").shuffle(prompts)
        fold = {prompt: number % FOLDS for number, prompt in enumerate(prompts)}
        return torch.tensor([fold[pair.prompt] for pair in self.pairs])

    @property
    def base(self) -> Base:
        """The model in its two parts."""
        return load_base(self.model)

    @property
    def reference(self) -> TopBlocks:
        """The model as a policy."""
        return reference_policy(self.model)

    def texts(self, rows: range) -> list[Text]:
        """The chosen answer of the first pair as token ids, its rejected answer, and so on."""
        pairs = self.pairs[rows.start : rows.stop]
        return [text for pair in pairs for text in encode(pair, self.base.tokenizer)[0]]

    def cut(self) -> float:
        """The share of all pairs of which a text is cut."""
        return float(np.mean([encode(pair, self.base.tokenizer)[1] for pair in self.pairs]))


@cache
def read_once(file: Path) -> list[Pair]:
    """The pairs of a file."""
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as lines:
            found = [parse(json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: expected readable pairs with gaps, got: {error!r}") from error
    prompts = len({pair.prompt for pair in found})
    if prompts < FOLDS or len(found) < LEAST_PAIRS:
        raise InputError(
            f"{file}: expected at least {LEAST_PAIRS} pairs of at least {FOLDS} prompts, "
            f"got {len(found)} of {prompts}"
        )
    return found


def parse(line: dict[str, Any]) -> Pair:
    """A line as a pair, whose gap may be given as the log-odds of `p_chosen`.

    Raises:
      ValueError: the gap is not above 0 and finite.
    """
    gap = line.get("reward_gap")
    if gap is None:
        gap = math.log(line["p_chosen"] / (1.0 - line["p_chosen"]))
    if not 0.0 < gap < math.inf:
        raise ValueError(f"the gap {gap} of {line['prompt']!r:.40}")
    return Pair(line["prompt"], line["chosen"], line["rejected"], float(gap))


def encode(pair: Pair, tokenizer: Any) -> tuple[list[Text], bool]:
    """Both texts of a pair as token ids, cut at `LENGTH`; and whether one was cut."""
    # Prompt and answer are encoded separately, so no token crosses their boundary.
    if tokenizer.chat_template is None:
        prompt = tokenizer.encode(pair.prompt + "\n")
    else:
        chat = [{"role": "user", "content": pair.prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False)
    answers = [
        [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        for answer in (pair.chosen, pair.rejected)
    ]
    longest = max(map(len, answers))
    # The prompt is cut first, from its start, because the question is usually at its end. It keeps
    # half of the length, because an answer without its question is useless.
    kept = prompt[-max(LENGTH - longest, LENGTH // 2) :]
    room = LENGTH - len(kept)
    texts = [
        Text(kept + answer[:room], [IGNORED] * len(kept) + answer[:room]) for answer in answers
    ]
    return texts, len(prompt) + longest > LENGTH
