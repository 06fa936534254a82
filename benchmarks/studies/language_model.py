"""The policy: a small decoder-only language model, its samples and their log-probabilities."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.studies.arms import Arm
from benchmarks.studies.language import (
    COMPLETION_TOKENS,
    END,
    PROMPT_TOKENS,
    TOKEN_IDS,
    VOCABULARY,
)
from benchmarks.studies.training import PairLoss, Pairs
from spoloss import log_ratio_margin
from spoloss.torch import sequence_logps

if TYPE_CHECKING:
    from torch.nn import Parameter
    from typing_extensions import Self

WIDTH, LAYERS, HEADS = 64, 2, 4
END_ID, IGNORED = TOKEN_IDS[END], -100


class Block(nn.Module):
    """Causal attention and an MLP, each on a normalised copy of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, stream: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Adds to the stream [B, T, D]; takes and returns keys and values [2, B, H, *, D/H]."""
        q, k, v = self.qkv(self.norm_attention(stream)).unflatten(2, (3, HEADS, -1)).unbind(2)
        q, keys_values = q.transpose(1, 2), torch.stack((k, v)).transpose(2, 3)
        if past is not None:
            keys_values = torch.cat((past, keys_values), dim=3)
        # A single new token sees everything before it; several only come without a past.
        mixed = functional.scaled_dot_product_attention(
            q, keys_values[0], keys_values[1], is_causal=past is None
        )
        stream = stream + self.out(mixed.transpose(1, 2).flatten(2))
        stream = stream + self.down(functional.gelu(self.up(self.norm_mlp(stream))))
        return stream, keys_values


class Policy(nn.Module):
    """About 108,000 parameters; the head shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(len(VOCABULARY), WIDTH)
        self.positions = nn.Embedding(PROMPT_TOKENS + COMPLETION_TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, T, V] of the tokens that follow the ids [B, T]."""
        return self.advance(ids, [None] * LAYERS)[0]

    def advance(self, ids: Tensor, past: list[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
        """Logits of further tokens, and the keys and values up to them, block by block."""
        start = 0 if past[0] is None else past[0].shape[3]
        stream = self.tokens(ids) + self.positions.weight[start : start + ids.shape[1]]
        new_past: list[Tensor | None] = []
        for block, block_past in zip(self.blocks, past, strict=True):
            stream, keys_values = block(stream, block_past)
            new_past.append(keys_values)
        return self.norm(stream) @ self.tokens.weight.T, new_past

    def copy(self) -> Self:
        """A policy of its own with the same weights."""
        return copy.deepcopy(self)

    def trained(self) -> list[Parameter]:
        """All parameters."""
        return list(self.parameters())

    def logps(self, inputs: dict[str, Tensor]) -> Tensor:
        """Log-probabilities of answers, nats, [M], from their ids and those of their prompts."""
        return completion_logps(self, **inputs)

    def pair_loss(self, arm: Arm, pairs: Pairs) -> PairLoss:
        """The arm's loss of a batch, and its margins."""
        both = self.logps(pairs.answers[torch.cat((pairs.chosen, pairs.rejected))].inputs)
        logps = pairs.logps_given(*both.chunk(2))
        return PairLoss(arm.loss(logps, pairs.gap), log_ratio_margin(*logps).detach())


@torch.no_grad()
def sample(policy: Policy, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a completion of each prompt [N, 4] at temperature 1: ids [N, 40], `<end>` repeated.

    Raises:
      FloatingPointError: the policy's logits are not finite.
    """
    completions = torch.full((len(prompts), COMPLETION_TOKENS), END_ID)
    running, ids = torch.arange(len(prompts)), prompts
    past: list[Tensor | None] = [None] * LAYERS
    for step in range(COMPLETION_TOKENS):
        logits, past = policy.advance(ids, past)
        if not torch.isfinite(logits).all():
            raise FloatingPointError("the policy's logits are not finite")
        ids = torch.multinomial(logits[:, -1].softmax(1), 1, generator=generator)
        completions[running, step] = ids[:, 0]
        going = ids[:, 0] != END_ID
        if not going.any():
            break
        running, ids = running[going], ids[going]
        past = [keys_values[:, going] for keys_values in past if keys_values is not None]
    return completions


def completion_logps(policy: Policy, prompts: Tensor, completions: Tensor) -> Tensor:
    """Log-probability of each completion [N, 40] of its prompt [N, 4], nats, [N].

    A completion ends with its first `<end>`; what stands behind it does not count.
    """
    is_end = completions == END_ID
    ended_before = is_end.cumsum(1) > is_end.long()
    longest = int((~ended_before).sum(1).max())
    ids = torch.cat((prompts, completions), 1)[:, : PROMPT_TOKENS + longest]
    labels = torch.cat(
        (torch.full_like(prompts, IGNORED), completions.masked_fill(ended_before, IGNORED)), 1
    )
    return sequence_logps(policy(ids), labels[:, : ids.shape[1]])
