"""Every causal language model of Transformers, as small as its configuration allows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from spoloss.torch import Completions, Head, linear_logps, sequence_logps

NAMES = {
    64: "vocab_size max_position_embeddings n_positions n_ctx max_seq_len mamba_d_ssm"
    " vocab_size_per_layer_input",
    48: "intermediate_size ffn_dim n_inner d_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size"
    " intermediate_dim",
    32: "hidden_size d_model n_embd dim embedding_size embed_dim hidden_dim word_embed_proj_dim"
    " lru_width attention_hidden_size emb_dim",
    16: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank chunk_size"
    " mamba_d_head mamba_head_dim index_head_dim",
    8: "head_dim global_head_dim d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim o_lora_rank"
    " rotary_dim state_size mamba_d_state ssm_state_size linear_key_head_dim linear_value_head_dim"
    " hidden_size_per_layer_input index_topk",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads"
    " encoder_attention_heads num_key_value_heads num_experts num_local_experts n_routed_experts"
    " moe_num_experts time_step_rank mamba_n_heads mamba_num_heads",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers"
    " num_decoder_layers num_experts_per_tok num_experts_per_token moe_k moe_topk n_kv_heads"
    " num_global_key_value_heads linear_num_key_heads linear_num_value_heads index_n_heads"
    " eos_token_id",
    1: "n_shared_experts n_group topk_group first_k_dense_replace mamba_n_groups n_groups"
    " bos_token_id",
    0: "pad_token_id",
}
SIZES = {name: size for size, names in NAMES.items() for name in names.split()}

OF_THE_HEAD = {
    "logit_scale": 0.25,
    "logits_scaling": 8.0,
    "lm_head_multiplier": 0.5,
    "output_multiplier": 0.25,
    "final_logit_softcapping": 5.0,
    "logits_soft_cap": 5.0,
    "output_logit_soft_cap": 5.0,
    "logits_mup_width_multiplier": 4.0,
}
"""Values that change the logits, where a default would not."""

OTHERS: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.0, 0.0],
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"num_layers": 1, "expert_ffn_hidden_size": 16, "zero_expert_num": 2},
    "mamba2": {"head_dim": 16},
    "prophetnet": {"num_hidden_layers": None, "num_encoder_layers": 1},
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "feed_forward_size": 48,
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "xlnet": {"max_position_embeddings": None},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""What else a model type needs; None leaves an argument out."""

LARGEST = 20_000_000
"""Parameters of the largest model that counts as tiny."""


def causal_models() -> list[type[PreTrainedModel]]:
    """Every class, once."""
    found: dict[str, type[PreTrainedModel]] = {}
    for classes in MODEL_FOR_CAUSAL_LM_MAPPING.values():
        for kind in classes if isinstance(classes, (list, tuple)) else [classes]:
            found[kind.__name__] = kind
    return [found[name] for name in sorted(found)]


def tiny_config(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    default = kind().to_dict()
    own = {
        name: size
        for name, size in SIZES.items()
        if name in default
        and (default[name] is None or type(default[name]) is int)
        and not isinstance(getattr(kind, name, None), property)
    }
    own |= {name: value for name, value in OF_THE_HEAD.items() if name in default}
    own |= {"is_decoder": True} if "is_decoder" in default else {}
    text = kind.sub_configs.get("text_config")
    if text is not None and text.__name__ != "AutoConfig":
        own["text_config"] = tiny_config(text).to_dict()
    own |= OTHERS.get(kind.model_type, {})
    return kind(**{name: value for name, value in own.items() if value is not None})


def tiny_model(kind: type[PreTrainedModel]) -> PreTrainedModel:
    """A model with random numbers in all weights and biases of its head.

    Raises:
      ValueError: it has more than LARGEST parameters.
    """
    config = tiny_config(kind.config_class)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{kind.__name__} has {size:,} parameters")
    torch.manual_seed(0)
    model = kind(config).eval()
    head = model.get_output_embeddings()
    for parameter in head.parameters():
        parameter.data.normal_(std=0.7)
    return model


def llama(kind: type[LlamaForCausalLM] = LlamaForCausalLM, **options: Any) -> LlamaForCausalLM:
    """A Llama, or a class derived from it."""
    torch.manual_seed(0)
    config = tiny_config(LlamaConfig)
    config.update(options)
    return kind(config)


def check_head(model: Any, head: Head) -> None:
    """A head gives the log-probabilities of the model's own logits."""
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    model.eval()
    with torch.no_grad():
        want = sequence_logps(model(input_ids=ids, use_cache=False).logits, ids)
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        found = linear_logps(head, Completions(hidden, ids))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0.0)
