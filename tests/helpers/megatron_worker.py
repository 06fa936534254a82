"""Megatron-core's GPTModel in halves on two processes, against the whole model.

The whole model is made first, without tensor parallelism; each rank then takes its part of every
weight. Gradients of the parts are joined, and compared with those of the whole model by its logits,
each sequence alone.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from helpers.recipes_oracle import BETA, Grads, exact_step, load, relative_error, toy
from helpers.steps import Exact, Found, Refused, Wrong, script_in_group

recipe, toy_megatron = load("megatron_core"), load("toy_megatron")

PAIRS = toy.pairs(5)

Weights = dict[str, Tensor]


# ---------------------------------------------------------------------------------- the whole model


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


def tensor_parallel(ranks: int) -> None:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)


@functools.cache
def whole(tied: bool) -> tuple[Weights, Weights, float, Grads]:
    """Weights of policy and reference; the loss and the gradient that a step must make."""
    tensor_parallel(1)
    torch.manual_seed(0)
    policy = AsTransformers(toy_megatron.model(tied=tied, dtype=torch.float64))
    reference = AsTransformers(toy_megatron.model(tied=tied, dtype=torch.float64))
    loss, grads = exact_step(policy, reference, PAIRS)
    weights = [
        {name: p.detach().clone() for name, p in model.gpt.named_parameters()}
        for model in (policy, reference)
    ]
    return *weights, loss, {name.removeprefix("gpt."): grad for name, grad in grads.items()}


# --------------------------------------------------------------------------------------- its halves


def part(weights: Weights, **options: Any) -> nn.Module:
    """This rank's part of the model."""
    model = toy_megatron.model(dtype=torch.float64, **options)
    rank = dist.get_rank()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = weights[name]
            if getattr(parameter, "tensor_model_parallel", False):
                tensor = tensor.chunk(2, parameter.partition_dim)[rank]
            assert tensor.shape == parameter.shape
            parameter.copy_(tensor)
    return model


def joined(model: nn.Module) -> Grads:
    """The gradient of the whole model from those of its parts."""
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(grad)  # as Megatron's finalize_model_grads does
        if getattr(parameter, "tensor_model_parallel", False):
            halves = [torch.empty_like(grad) for _ in range(2)]
            dist.all_gather(halves, grad.contiguous())
            grad = torch.cat(halves, parameter.partition_dim)
        grads[name] = grad
    return grads


def even(batch: Any) -> Any:
    """The batch with its sequences padded to an even length."""
    missing = (0, batch.ids.shape[1] % 2)
    pad = nn.functional.pad
    return toy.Batch(
        pad(batch.ids, missing, value=2),
        pad(batch.mask, missing),
        pad(batch.labels, missing, value=-100),
    )


Ways = Callable[[nn.Module, nn.Module, Any, float], Tensor]


def error(
    step: Ways = recipe.spo_step, *, tied: bool = False, sequence_parallel: bool = False
) -> Found:
    """|g - exact| / |exact| of the gradient, and the same of the loss; or what was raised."""
    policy_weights, reference_weights, loss, exact = whole(tied)
    tensor_parallel(2)
    options = {"tied": tied, "sequence_parallel": sequence_parallel}
    policy, reference = part(policy_weights, **options), part(reference_weights, **options)
    assert len(recipe.head_weight(policy)) == toy.VOCABULARY // 2
    try:
        value = step(policy, reference, even(toy.collate(PAIRS)), BETA)
    except ValueError as raised:
        return f"ValueError: {raised}"
    value.backward()
    return [relative_error(joined(policy), exact), abs(value.item() / loss - 1.0)]


def times_ranks(*arguments: Any) -> Tensor:
    return 2 * recipe.spo_step(*arguments)


def swapped(*arguments: Any) -> Tensor:
    """Each rank with the rows of the other."""

    def other(model: nn.Module) -> Tensor:
        mine = model.output_layer.weight
        halves = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(halves, mine.detach())
        return mine + (halves[1 - dist.get_rank()] - mine.detach())

    with mock.patch.object(recipe, "head_weight", other):
        return recipe.spo_step(*arguments)


def gathered_by_default(*arguments: Any) -> Tensor:
    gather = recipe.gather_from_sequence_parallel_region
    with mock.patch.object(
        recipe, "gather_from_sequence_parallel_region", lambda hidden, **_: gather(hidden)
    ):
        return recipe.spo_step(*arguments)


def without_group(*arguments: Any) -> Tensor:
    nothing = SimpleNamespace(get_tensor_model_parallel_group=lambda: None)
    with mock.patch.object(recipe, "parallel_state", nothing):
        return recipe.spo_step(*arguments)


def run_all() -> dict[str, Any]:
    """By way what is expected, and its errors."""
    warnings.filterwarnings("error", module="spoloss")
    losses = script_in_group("megatron_core")
    assert losses == sorted(losses, reverse=True), losses
    exact, refused = Exact(1e-10), Refused("ValueError: completions.labels must be in [0, V = 32)")
    # Under sequence parallelism Megatron keeps its buffers on a GPU, whatever the model is on.
    with mock.patch.object(torch.cuda, "current_device", return_value="cpu"):
        return {
            "untied": (exact, error()),
            "tied": (exact, error(tied=True)),
            "sequence parallel": (exact, error(sequence_parallel=True)),
            "sequence parallel, tied": (exact, error(tied=True, sequence_parallel=True)),
            "loss * ranks": (Wrong(1.00), error(times_ranks)),
            "shards swapped": (Wrong(1.35), error(swapped)),
            "gathered with the default gradient": (
                Wrong(0.89),
                error(gathered_by_default, sequence_parallel=True),
            ),
            "without the group": (refused, error(without_group)),
        }
