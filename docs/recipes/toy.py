"""What the recipes train when started as scripts: a tiny model and its reference, random pairs."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 64
IGNORED = -100

TRAINER: dict[str, Any] = {
    "output_dir": tempfile.gettempdir(),
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}
"""Arguments for three steps of Transformers' Trainer, and of TRL."""


class Pair(NamedTuple):
    """A prompt and its two completions, as token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Batch(NamedTuple):
    """Rows [2B, T]: all chosen, then all rejected. Labels are -100 on prompt and padding."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


def models(
    *, tied: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Qwen2ForCausalLM, Qwen2ForCausalLM]:
    """A policy with random weights, and its frozen copy as the reference."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    policy = Qwen2ForCausalLM(config).to(dtype)
    return policy, copy.deepcopy(policy).requires_grad_(False).eval()


def pairs(count: int, seed: int = 1) -> list[Pair]:
    """Pairs of random tokens, with completions of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(fewest: int, most: int) -> list[int]:
        length = int(torch.randint(fewest, most + 1, (), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return [Pair(tokens(2, 5), tokens(3, 9), tokens(3, 9)) for _ in range(count)]


def collate(pairs: list[Pair]) -> Batch:
    """Pad pairs into one batch."""
    texts = [(pair.prompt, pair.chosen) for pair in pairs]
    texts += [(pair.prompt, pair.rejected) for pair in pairs]

    def padded(rows: list[list[int]], value: int) -> Tensor:
        return pad_sequence([*map(torch.tensor, rows)], batch_first=True, padding_value=value)

    return Batch(
        padded([prompt + completion for prompt, completion in texts], 2),
        padded([[1] * len(prompt + completion) for prompt, completion in texts], 0),
        padded([[IGNORED] * len(prompt) + completion for prompt, completion in texts], IGNORED),
    )


def named(pairs: list[Pair], *names: str) -> dict[str, Tensor]:
    """The batch with the names that Trainer passes to the model."""
    return dict(zip(names, collate(pairs), strict=True))


def train(policy: nn.Module, loss_of: Callable[[], Tensor]) -> None:
    """Three steps, which print their loss."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for _ in range(3):
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(loss.item())


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with the ids as words: " <3> <7>" is [3, 7]. <1> ends a text, <2> pads it."""
    words = {f"<{i}>": i for i in range(VOCABULARY)}
    model = Tokenizer(WordLevel(words, unk_token="<0>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<1>", pad_token="<2>")


def texts(pairs: list[Pair]) -> list[dict[str, str]]:
    """The pairs as text, under the names of preference datasets."""

    def text(ids: list[int]) -> str:
        return "".join(f" <{i}>" for i in ids)

    return [{name: text(ids) for name, ids in pair._asdict().items()} for pair in pairs]
