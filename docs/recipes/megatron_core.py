"""SPO on Megatron-core's GPTModel under tensor parallelism, with a split head.

In a checkout: torchrun --standalone --nproc_per_node 2 docs/recipes/megatron_core.py

Each rank has some rows of the output layer, or of the embeddings if they are tied. The fused loss
takes these rows with `vocab_parallel_group`. No rank holds the logits or the whole head.
Tested with Megatron-core 0.16.1 and PyTorch 2.13, tensor parallel 2 on gloo, with and without
sequence parallelism. To change an existing loop: `hidden_states`, `head_weight` and the group.

Pitfalls: under sequence parallelism, gather the hidden states with
`tensor_parallel_output_grad=False`, because the loss gives every rank its whole gradient. With
the default True, all gradients below the head are too large by a factor of the number of ranks.
The first axis of Megatron's hidden states is the token, and the fused loss expects the sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from spoloss.torch import Completions, Head, linear_logps, linear_spo_loss


def hidden_states(model: GPTModel, ids: Tensor) -> Tensor:
    """The last hidden states, [B, T, D], equal on all tensor-parallel ranks. Causal attention."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    model.post_process = False  # the forward then ends before the output layer
    try:
        hidden = model(ids, positions, attention_mask=None)
    finally:
        model.post_process = True
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    return hidden.transpose(0, 1)


def head_weight(model: GPTModel) -> Tensor:
    """This rank's rows of the output layer, or of the embeddings if they are tied."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def spo_step(policy: GPTModel, reference: GPTModel, batch: Any, beta: float) -> Tensor:
    """The mean loss of a batch that all ranks of the group share.

    The rows are all chosen, then all rejected. Sequences are padded on the right, so causal
    attention needs no mask.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    ids, labels = batch.ids, batch.labels
    with torch.no_grad():
        ref_head = Head(head_weight(reference), vocab_parallel_group=group)
        ref_logps = linear_logps(ref_head, Completions(hidden_states(reference, ids), labels))
    hidden = hidden_states(policy, ids)
    head = Head(head_weight(policy), vocab_parallel_group=group)
    sides = map(Completions, hidden.chunk(2), labels.chunk(2))
    return linear_spo_loss(head, *sides, *ref_logps.chunk(2), beta=beta).loss


if __name__ == "__main__":
    import torch.distributed as dist
    import toy
    import toy_megatron

    dist.init_process_group("gloo")  # "nccl" on GPUs
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    policy, reference = toy_megatron.model(), toy_megatron.model()
    reference.load_state_dict(policy.state_dict())
    batch = toy.collate(toy.pairs(4))
    toy.train(policy, lambda: spo_step(policy, reference, batch, beta=0.025))
    dist.destroy_process_group()
