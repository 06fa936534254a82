"""SPO under DeepSpeed ZeRO-2 and ZeRO-3, exact over uneven micro-batches and ranks.

In a checkout, without a GPU:
DS_ACCELERATOR=cpu torchrun --standalone --nproc_per_node 2 docs/recipes/deepspeed_zero.py

Tested with DeepSpeed 0.19.8 and PyTorch 2.13, two processes on gloo. Under ZeRO-3 a parameter is
empty, with shape [0], outside the forward of the engine. Inside it, the attribute access
`self.model.lm_head.weight` gathers the whole head, and frees it after the forward and again after
the backward pass. Pitfalls: with the weight's `.data` the head gets no gradient, without an error;
`GatheredParameters` must not be closed before the backward pass; do not bypass the engine with
`engine.module(...)`; DeepSpeed clips gradients to a norm of 1.0 by default.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from spoloss.torch import Completions, head_of, linear_spo_loss, sequence_logps


class FusedSPO(nn.Module):
    """Wraps the model, so that the head's weight is used inside the engine's forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = replace(head_of(model), weight=None, bias=None)  # read in each forward

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        """Returns the sum of the pairs' losses. The rows are all chosen, then all rejected."""
        hidden = self.model.model(ids, attention_mask=mask).last_hidden_state
        lm_head = self.model.lm_head
        head = replace(self.head, weight=lm_head.weight, bias=lm_head.bias)
        sides = map(Completions, hidden.chunk(2), labels.chunk(2))
        return linear_spo_loss(head, *sides, *ref.chunk(2), beta=0.1, reduction="sum").loss


def settings(stage: int, micro_batches: int) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`, for steps of `micro_batches` micro-batches."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # used only in logs: `train_step` counts the pairs
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,  # without this line, gradients are clipped to a norm of 1.0
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,  # these two allow an optimizer of torch.optim
        "zero_force_ds_cpu_optimizer": False,
    }


def train_step(engine: Any, micro_batches: list[tuple[Tensor, ...]]) -> None:
    """Does one optimizer step. Every rank has `gradient_accumulation_steps` micro-batches."""
    pairs = sum((labels.chunk(2)[0] != -100).any(1).sum() for _, _, labels, _ in micro_batches)
    dist.all_reduce(pairs)
    # DeepSpeed divides the sum of the gradients by the ranks and by the micro-batches.
    scale = dist.get_world_size() * engine.gradient_accumulation_steps() / pairs
    for batch in micro_batches:
        engine.backward(engine(*batch) * scale)
        engine.step()  # updates the weights after the last micro-batch


if __name__ == "__main__":
    import toy

    # On CPUs, DeepSpeed would compile this kernel at its first start, which takes a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")  # on GPUs "nccl", and batches there
    for stage in (2, 3):
        policy, reference = toy.models()
        batch = toy.collate(toy.pairs(count=3 + dist.get_rank(), seed=dist.get_rank()))
        ref = sequence_logps(reference(batch.ids, attention_mask=batch.mask).logits, batch.labels)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        config = settings(stage, micro_batches=1)
        # Parameters with fewer elements than this stay whole. Without 0, this tiny model would.
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        engine, *_ = deepspeed.initialize(
            model=FusedSPO(policy), optimizer=optimizer, config=config
        )
        train_step(engine, [(*batch, ref)])
        norm = engine.get_global_grad_norm()
        print(f"ZeRO-{stage}, rank {dist.get_rank()}: {len(ref) // 2} pairs, |gradient| {norm:.6f}")
    dist.destroy_process_group()
