"""The pairs of a file as a pretrained model reads them, and the folds that they are cut into."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.alignment import seeds
from benchmarks.alignment.errors import InputError
from benchmarks.alignment.pretrained import (
    IGNORED,
    Base,
    TopBlocks,
    load_base,
    reference_policy,
)
from benchmarks.alignment.training import Answers, StepHook, score
from benchmarks.real_pairs.judged import Pair, Text, TokenPair, encode_pair, read_pairs

LENGTH = 160
"""The most tokens of a prompt and its answer. Longer ones lose the end of the answer."""
FOLDS = 5
LEAST_PAIRS = 10
ROWS = 16
"""Texts that the frozen blocks read side by side."""


@dataclass(frozen=True)
class Material:
    """A file of preference pairs, and the model that is trained on them.

    Attributes:
      file: JSON lines, as `judged.read_pairs` reads them.
      model: a Transformers folder, or a name on the Hugging Face Hub.
    """

    file: Path
    model: str

    @property
    def pairs(self) -> list[Pair]:
        """All pairs of the file, each with its reward gap.

        Raises:
          InputError: the file cannot be read, a line is not a pair with a gap, or the prompts are
            too few for the folds.
        """
        return read_once(self.file)

    @property
    def description(self) -> str:
        """The pairs in one line: how many there are, and a fingerprint."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            fields = (pair.prompt, pair.chosen, pair.rejected, pair.reward_gap)
            digest.update(repr(fields).encode())
        return f"{len(self.pairs)} pairs, {digest.hexdigest()[:12]}"

    @property
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

    def tokens_of(self, rows: range) -> list[TokenPair]:
        """Some of the pairs as token ids, cut at `LENGTH`."""
        pairs = self.pairs[rows.start : rows.stop]
        return [encode_pair(pair, self.base.tokenizer, LENGTH) for pair in pairs]

    def encode(self, rows: range, hook: StepHook) -> Answers:
        """Runs the frozen blocks and the reference on the answers of some of the pairs.

        Args:
          rows: the pairs.
          hook: called once for every `ROWS` texts.

        Returns:
          The chosen answer of the first pair, its rejected answer, those of the second, ...
        """
        pairs = self.tokens_of(rows)
        texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
        made = []
        for start in range(0, len(texts), ROWS):
            made.append(frozen_states(self.base, texts[start : start + ROWS]))
            hook()
        states, labels = map(torch.cat, zip(*made, strict=True))
        inputs = {"states": states, "labels": labels}
        # Only the difference of two rewards is ever used, and that is the known gap.
        rewards = torch.tensor([reward for pair in pairs for reward in (pair.reward_gap, 0.0)])
        return Answers(inputs, rewards, score(self.reference, inputs))


@cache
def read_once(file: Path) -> list[Pair]:
    """The pairs of a file."""
    found = read_pairs(file)
    prompts = len({pair.prompt for pair in found})
    if prompts < FOLDS or len(found) < LEAST_PAIRS:
        raise InputError(
            f"{file}: expected at least {LEAST_PAIRS} pairs of at least {FOLDS} prompts, "
            f"got {len(found)} of {prompts}"
        )
    return found


@torch.no_grad()
def frozen_states(base: Base, texts: list[Text]) -> tuple[Tensor, Tensor]:
    """Runs the frozen blocks on M texts.

    Returns:
      The states [M, LENGTH - 1, D], and for each state the label of the next token,
      [M, LENGTH - 1].
    """
    ids = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    labels = torch.full((len(texts), LENGTH), IGNORED)
    for row, text in enumerate(texts):
        ids[row, : len(text.ids)] = torch.tensor(text.ids)
        labels[row, : len(text.labels)] = torch.tensor(text.labels)
    # Padding on the right needs no mask: no earlier token attends to it, and it has no labels.
    embedded = base.lower.embed_tokens(ids[:, :-1])
    states = base.lower(inputs_embeds=embedded, use_cache=False).last_hidden_state
    return states, labels[:, 1:]
