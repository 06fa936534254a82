"""`head_of` on every causal language model of Transformers and every method of PEFT."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import LlamaConfig, PreTrainedModel

from helpers.tiny_models import causal_models, check_head, llama, tiny_model
from spoloss.torch import head_of

# What Transformers and PEFT warn of concerns their own sizes and names.
pytestmark = pytest.mark.filterwarnings("ignore")

LARGE = "its vision, audio or byte parts have sizes of their own, which are not tiny"
LAYERS = "its kinds of layers do not fit in two layers of these sizes"
SKIPPED = {
    "BailingHybridForCausalLM": LAYERS,
    "BltForCausalLM": LARGE,
    "CohereCompassForCausalLM": LAYERS,
    "FuyuForCausalLM": LARGE,
    "Gemma3ForConditionalGeneration": LARGE,
    "Gemma3nForConditionalGeneration": "it needs timm",
    "Gemma4AssistantForCausalLM": LAYERS,
    "Gemma4UnifiedAssistantForCausalLM": LAYERS,
    "GitForCausalLM": LARGE,
    "GotOcr2ForConditionalGeneration": LARGE,
    "MiMoV2FlashForCausalLM": LAYERS,
    "MossTranscribeDiarizeForConditionalGeneration": LARGE,
    "Phi4MultimodalForCausalLM": LARGE,
    "Zamba2ForCausalLM": LAYERS,
    "ZambaForCausalLM": LAYERS,
}
"""Models that are not built here, and why."""

TRANSFORM = "the model's logits are not those of its head"  # a layer before the head, as in BERT
DECODER = "get_decoder.. must return last hidden states|cannot be called with input_ids"
REFUSED = {
    **dict.fromkeys(
        (
            *("BertLMHeadModel", "BigBirdForCausalLM", "CamembertForCausalLM"),
            *("Data2VecTextForCausalLM", "ElectraForCausalLM", "ErnieForCausalLM"),
            *("MegatronBertForCausalLM", "RemBertForCausalLM", "RoCBertForCausalLM"),
            *("RoFormerForCausalLM", "RobertaForCausalLM", "RobertaPreLayerNormForCausalLM"),
            *("XLMRobertaForCausalLM", "XLMRobertaXLForCausalLM", "XmodForCausalLM"),
        ),
        TRANSFORM,
    ),
    "InklingForCausalLM": TRANSFORM,  # it divides by a field of another name
    "ProphetNetForCausalLM": TRANSFORM,
    "Llama4ForCausalLM": DECODER,
    "MllamaForCausalLM": DECODER,
    "ModernBertDecoderForCausalLM": DECODER,
    "MusicgenForCausalLM": "the head must be exactly an nn.Linear",  # a head per codebook
    "MusicgenMelodyForCausalLM": "the head must be exactly an nn.Linear",
}
"""Models whose logits are not those of a `Head` on the decoder's hidden states."""


@pytest.mark.parametrize("kind", causal_models(), ids=lambda kind: kind.__name__)
def test_every_model(kind: type[PreTrainedModel]) -> None:
    name = kind.__name__
    if name in SKIPPED:
        pytest.skip(SKIPPED[name])
    model = tiny_model(kind)
    if name in REFUSED:
        with pytest.raises((TypeError, ValueError), match=REFUSED[name]):
            head_of(model)
    else:
        check_head(model, head_of(model))


def test_the_lists_name_models_that_exist() -> None:
    names = {kind.__name__ for kind in causal_models()}
    assert SKIPPED.keys() | REFUSED.keys() <= names
    assert not SKIPPED.keys() & REFUSED.keys()


# Models of text and images, which the list of causal language models leaves out

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def llava() -> PreTrainedModel:
    config = transformers.LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=63,
    )
    return transformers.LlavaForConditionalGeneration(config)


def gemma_3() -> PreTrainedModel:
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**TEXT, head_dim=8),
        vision_config=transformers.SiglipVisionConfig(**VISION),
        image_token_index=63,
        mm_tokens_per_image=1,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen_2_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "patch_size": 4,
        },
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def chameleon() -> PreTrainedModel:
    images = {
        "embed_dim": 8,
        "num_embeddings": 8,
        "latent_channels": 8,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "resolution": 16,
        "num_res_blocks": 1,
    }
    codes = {f"IMGIMG{letter}A": 10 + i for i, letter in enumerate("ABCDEFGH")}
    config = transformers.ChameleonConfig(
        **TEXT, vq_config=images, vocabulary_map={"<image>": 60, **codes}
    )
    return transformers.ChameleonForConditionalGeneration(config)


@pytest.mark.parametrize("make", [llava, gemma_3, qwen_2_vl])
def test_models_of_text_and_images(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    head = head_of(model)
    check_head(model, head)
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        parts = (model.base_model.eval(), model.get_decoder())
        hidden = [part(input_ids=ids, use_cache=False).last_hidden_state for part in parts]
    torch.testing.assert_close(*hidden)


def test_a_model_that_never_writes_its_codes_of_images() -> None:
    with pytest.raises(ValueError, match=r"entry 1[0-7] of the vocabulary has the logit -3.4"):
        head_of(chameleon())


# PEFT

METHODS = {getattr(kind, "value", kind): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
ARGUMENTS: dict[str, Any] = {
    "target_modules": ["q_proj", "v_proj"],
    "feedforward_modules": [],
    "num_virtual_tokens": 4,
    "token_indices": [5, 6],
    "total_step": 10,
    "oft_block_size": 4,
    "boft_block_size": 4,
    "block_size": 8,
    "group_size": 8,
    "vector_length": 8,
    "n_frequency": 10,
    "cpt_token_ids": [1, 2, 3, 4],
    "cpt_tokens_type_mask": [1, 2, 3, 4],
    "cpt_mask": [1, 1, 1, 1],
}
OF_A_METHOD: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"target_modules": "self_attn", "adapter_len": 4, "adapter_layers": 1},
    "MISS": {"r": 4},
    "SHIRA": {"r": 4},
}
NEEDS_MORE = {
    "ADAMSS": "it needs scikit-learn",
    "XLORA": "it mixes saved adapters: see below",
}
PROMPTS = {
    *("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"),
}
OTHER_CALLS = {"POLY", "SHADOW"}
"""Methods whose models need more than input_ids."""


def adapted(method: str, **other: Any) -> Any:
    made = METHODS[method]
    accepted = inspect.signature(made).parameters
    given = {name: value for name, value in ARGUMENTS.items() if name in accepted}
    given |= OF_A_METHOD.get(method, {}) | other
    return peft.get_peft_model(llama(), made(task_type="CAUSAL_LM", **given))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_peft(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if method in NEEDS_MORE:
        pytest.skip(NEEDS_MORE[method])
    monkeypatch.chdir(tmp_path)
    model = adapted(method)
    torch.manual_seed(1)
    for parameter in model.parameters():  # as if it had been trained
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    if method in PROMPTS:
        with pytest.raises(ValueError, match="do not include its virtual tokens"):
            head_of(model)
    elif method in OTHER_CALLS:
        with pytest.raises(ValueError, match="cannot be called with input_ids and use_cache alone"):
            head_of(model)
    else:
        check_head(model, head_of(model))


@pytest.mark.parametrize(
    "method",
    [
        method
        for method, made in METHODS.items()
        if "target_modules" in inspect.signature(made).parameters
        and method not in NEEDS_MORE
        and method != "ADAPTION_PROMPT"
    ],
)
def test_every_new_adapter_on_the_head(method: str) -> None:
    model = adapted(method, target_modules=["q_proj", "lm_head"])
    with pytest.raises(TypeError, match=r"the head must be exactly an nn.Linear.*, got peft\."):
        head_of(model)


def test_x_lora(tmp_path: Path) -> None:
    """Its model runs the decoder twice: first for the factors of the adapters."""
    saved = {}
    for name in ("0", "1"):
        saved[name] = str(tmp_path / name)
        adapted("LORA", init_lora_weights=False).save_pretrained(saved[name])
    model = llama()
    model.config.use_cache = False
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=saved)
    with pytest.raises(ValueError, match=r"must call .* once, got 2 calls"):
        head_of(peft.get_peft_model(model, config))
