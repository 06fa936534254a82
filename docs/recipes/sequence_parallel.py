"""SPO with every sequence split over the ranks (Ulysses: attention exchanges slices for heads).

In a checkout: torchrun --standalone --nproc_per_node 2 docs/recipes/sequence_parallel.py

Each rank computes its tokens' part of each log-probability. The parts are summed over the ranks
before the margin. Tested with PyTorch 2.13 and Transformers 5.23, two processes on gloo. Pitfall:
shift the labels before you split them, and not again. Otherwise the label of every slice's last
token is lost.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from spoloss import spo_loss
from spoloss.torch import Completions, head_of, linear_logps

GROUP: dist.ProcessGroup | None = None  # the ranks that share a sequence; None is all of them


def cut(ids: Tensor, labels: Tensor) -> list[Tensor]:
    """Returns this rank's slices [B, T / ranks] of ids, positions and shifted labels."""
    ranks, rank = dist.get_world_size(GROUP), dist.get_rank(GROUP)
    shifted = pad(labels[:, 1:], (0, 1), value=-100)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    missing = (0, -ids.shape[1] % ranks)
    whole = pad(ids, missing), pad(positions, missing), pad(shifted, missing, value=-100)
    return [tensor.chunk(ranks, dim=1)[rank] for tensor in whole]


class SliceLogps(nn.Module):
    """Wraps the model, so that the head's weight is used inside the wrapped forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = replace(head_of(model), weight=None, bias=None)  # read in each forward

    def forward(self, ids: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        """Returns the sum of the log-probabilities of a slice's labels, [B]."""
        hidden = self.model.model(ids, position_ids=positions).last_hidden_state
        lm_head = self.model.lm_head
        head = replace(self.head, weight=lm_head.weight, bias=lm_head.bias)
        return linear_logps(head, Completions(hidden, labels, shift=False))


class SumOverRanks(torch.autograd.Function):
    """A sum over ranks whose backward sums over ranks too.

    Every rank computes the same loss, so this gradient counts the loss once per rank. An engine
    that averages gradients over ranks divides by their number again.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:  # noqa: ARG004
        """Sums the parts."""
        total = part.clone()
        dist.all_reduce(total, group=GROUP)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        """Sums the ranks' gradients with respect to this part."""
        return SumOverRanks.forward(None, grad)


class Exchange(torch.autograd.Function):
    """Splits one axis over the ranks and joins another axis from them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cut_axis: int, join_axis: int) -> Tensor:
        """Sends each rank its part."""
        ctx.back = join_axis, cut_axis
        sent = torch.stack(tensor.chunk(dist.get_world_size(GROUP), cut_axis))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=GROUP)
        return torch.cat(received.unbind(), join_axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Sends the parts back."""
        return Exchange.apply(grad, *ctx.back), None, None


def ulysses(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, **options: Any
) -> tuple[Tensor, None]:
    """Attention over whole sequences with some heads. Ranks must divide the key-value heads."""
    some_heads = [Exchange.apply(states, 1, 2) for states in (q, k, v)]
    output, _ = sdpa_attention_forward(module, *some_heads, mask, is_causal=True, **options)
    return Exchange.apply(output, 1, 2), None


def backward(ddp: nn.Module, ids: Tensor, labels: Tensor, ref: Tensor) -> None:
    """Computes the gradient of an optimizer step. `ref` is for whole sequences."""
    logps = SumOverRanks.apply(ddp(*cut(ids, labels)))
    spo_loss(*logps.chunk(2), *ref.chunk(2), beta=0.1).backward()


AttentionInterface.register("ulysses", ulysses)

if __name__ == "__main__":
    import toy

    dist.init_process_group("gloo")  # "nccl" on GPUs
    policy, reference = toy.models()
    modules = [SliceLogps(model) for model in (policy, reference)]  # with whole sequences
    for model in (policy, reference):
        model.set_attn_implementation("ulysses")
    ids, _, labels = toy.collate(toy.pairs(4))
    with torch.no_grad():
        ref = SumOverRanks.apply(modules[1](*cut(ids, labels)))
    backward(DistributedDataParallel(modules[0]), ids, labels, ref)
    norm = nn.utils.get_total_norm([p.grad for p in policy.parameters()])
    print(f"rank {dist.get_rank()}: |gradient| {norm:.6f}")
    dist.destroy_process_group()
