"""Megatron-core's GPTModel in halves on two processes, against the whole model.

The whole model is made first, without tensor parallelism; each rank then takes its part of every
weight. Gradients of the parts are joined, and compared with those of the whole model by its logits,
each sequence alone.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from helpers.recipes_oracle import BETA, Grads, exact_step, load, relative_error, toy
from helpers.steps import PAIRS, Exact, Found, Wrong, script_in_group

recipe, toy_megatron = load("megatron_core"), load("toy_megatron")


class AsTransformers(nn.Module):
    """A GPTModel called as the oracle calls models; it is in float64 and is not copied."""

    def __init__(self, gpt: nn.Module) -> None:
        super().__init__()
        self.gpt = gpt

    def __deepcopy__(self, _memo: Any) -> AsTransformers:
        return self

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        positions = torch.arange(input_ids.shape[1])[None]
        return SimpleNamespace(logits=self.gpt(input_ids, positions, attention_mask=None))


def models(ranks: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Policy and reference, each rank with its part."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    torch.manual_seed(0)
    policy, reference = (toy_megatron.model(dtype=torch.float64, **options) for _ in range(2))
    return policy, reference


def take_part(model: nn.Module, whole: nn.Module) -> None:
    """Copies this rank's part of each weight."""
    weights = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = weights[name]
            if getattr(parameter, "tensor_model_parallel", False):
                tensor = tensor.chunk(2, parameter.partition_dim)[dist.get_rank()]
            assert tensor.shape == parameter.shape
            parameter.copy_(tensor)


def joined(model: nn.Module) -> Grads:
    """The gradient of the whole model from those of its parts, by the oracle's names."""
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(grad)  # as Megatron's finalize_model_grads does
        if getattr(parameter, "tensor_model_parallel", False):
            halves = [torch.empty_like(grad) for _ in range(2)]
            dist.all_gather(halves, grad.contiguous())
            grad = torch.cat(halves, parameter.partition_dim)
        grads[f"gpt.{name}"] = grad
    return grads


def errors(*, tied: bool = False, sequence_parallel: bool = False) -> Found:
    """|g - exact| / |exact| of the gradient, and the same of the loss."""
    whole = models(1, tied=tied)
    loss, exact = exact_step(*map(AsTransformers, whole), PAIRS)
    parts = models(2, tied=tied, sequence_parallel=sequence_parallel)
    for part, model in zip(parts, whole, strict=True):
        take_part(part, model)
    assert len(recipe.head_weight(parts[0])) == toy.VOCABULARY // 2
    batch = toy.collate(PAIRS)
    assert batch.ids.shape[1] % 2 == 0  # for sequence parallelism
    value = recipe.spo_step(*parts, batch, BETA)
    value.backward()
    return [relative_error(joined(parts[0]), exact), abs(value.item() / loss - 1.0)]


def errors_of_the_default_gather() -> Found:
    """With the gradient that Megatron's gather has unless told otherwise."""
    gather = recipe.gather_from_sequence_parallel_region
    with mock.patch.object(recipe, gather.__name__, lambda hidden, **_: gather(hidden)):
        return errors(sequence_parallel=True)


def run_all() -> dict[str, Any]:
    """By way what is expected, and its errors."""
    warnings.filterwarnings("error", module="spoloss")
    losses = script_in_group("megatron_core")
    assert losses == sorted(losses, reverse=True), losses
    exact = Exact(1e-10)
    # Under sequence parallelism Megatron keeps its buffers on a GPU, whatever the model is on.
    with mock.patch.object(torch.cuda, "current_device", return_value="cpu"):
        return {
            "untied": (exact, errors()),
            "tied": (exact, errors(tied=True)),
            "sequence parallel": (exact, errors(sequence_parallel=True)),
            "sequence parallel, tied": (exact, errors(tied=True, sequence_parallel=True)),
            "gathered with the default gradient": (Wrong(0.89), errors_of_the_default_gather()),
        }
