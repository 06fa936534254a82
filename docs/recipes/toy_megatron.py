"""The model for megatron_core.py when started as a script: a tiny GPTModel, also for CPUs."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.parallel_state import get_tensor_model_parallel_world_size
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F


class PlainAttention(MegatronModule):
    """PyTorch's causal attention, because Megatron's own keeps its buffers on a GPU."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__(config)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Attention on tensors with the axes token, sequence, head, width."""
        q, k, v = (states.permute(1, 2, 0, 3) for states in (query, key, value))
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return output.permute(2, 0, 1, 3).flatten(2).contiguous()


class Norm(nn.LayerNorm):
    """PyTorch's layer norm. With sequence parallelism, Megatron sums its gradients over ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


def model(
    *, tied: bool = False, sequence_parallel: bool = False, dtype: torch.dtype = torch.float32
) -> GPTModel:
    """A GPTModel with random weights, split over the tensor-parallel ranks."""
    # Without a GPU there are no CUDA random states to track, and this model has no dropout.
    initialize_rng_tracker(inference_rng_tracker=True)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        tensor_model_parallel_size=get_tensor_model_parallel_world_size(),
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    layer = get_gpt_layer_local_spec()
    layer.submodules.self_attention.submodules.core_attention = PlainAttention
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    return GPTModel(
        config,
        TransformerBlockSubmodules([layer] * config.num_layers, Norm),
        vocab_size=64,
        max_sequence_length=32,
        share_embeddings_and_output_weights=tied,
    ).to(dtype)
