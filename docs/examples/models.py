"""The model and its tokenizer: a small new one, or a pretrained one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from pairs import InputError


def build_model(texts: Iterable[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Builds a small Qwen2 with random weights and a tokenizer with the vocabulary of the texts."""
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, 2048, show_progress=False)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config), tokenizer


def load_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model and its tokenizer.

    Raises:
      InputError: Transformers cannot load them, or the tokenizer has no end-of-text token.
    """
    try:
        # float32, because an AdamW step of 1e-6 rounds to nothing on bfloat16 weights.
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"--model: expected a causal language model, got: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"--model: expected a tokenizer with an eos_token, got none in {name}")
    return model, tokenizer
