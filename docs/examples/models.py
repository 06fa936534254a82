"""The model and its tokenizer, either loaded by name or new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from errors import InputError
from pairs import Pair

MAX_VOCABULARY = 2048


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def build_model(pairs: Sequence[Pair], max_length: int) -> LanguageModel:
    """Builds a small untrained Qwen2, and trains a byte-level BPE tokenizer on the pairs."""
    texts = [text for pair in pairs for text in (pair.prompt, pair.chosen, pair.rejected)]
    # AutoTokenizer chooses the class by model type, so the tokenizer must be a Qwen2Tokenizer.
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, MAX_VOCABULARY, show_progress=False)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LanguageModel(Qwen2ForCausalLM(config), tokenizer)


def load_model(name: str, max_length: int) -> LanguageModel:
    """Loads a model and its tokenizer.

    Args:
      name: a folder or a name on the Hugging Face Hub.
      max_length: the number of tokens of the longest text.

    Raises:
      InputError: there is no causal language model, no tokenizer, or the texts are too long for it.
    """
    where = f"--model {name}"
    try:
        # With bfloat16 weights, an AdamW step of 1e-6 would be rounded away.
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{where}: expected a causal language model, got: {reason}") from error
    # If a folder has no tokenizer, Transformers returns one without words.
    if tokenizer.eos_token_id is None or not tokenizer.encode("text", add_special_tokens=False):
        raise InputError(f"{where}: expected a tokenizer with words and an end of text, got none")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise InputError(f"{where}: expected --max-length of at most {longest}, got {max_length}")
    return LanguageModel(model, tokenizer)
