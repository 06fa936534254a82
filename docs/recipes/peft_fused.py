"""SPO with LoRA: the fused loss with a frozen head, and the bare model as the reference.

Tested with PEFT 0.21, Transformers 5.23 and PyTorch 2.13. To change an existing loop: the 9 lines
of `pair_loss`. There is no second model, no logits, and no gradient of the head's size.

Pitfalls: the fused head reads `lm_head.weight`, which does not include a LoRA adapter on the head.
The decoder's hidden states do not include a prompt (prompt, prefix and P-tuning). A model may scale
or cap its logits. In these cases loss and gradient would silently be wrong, so `check_head` raises
an error. Train the head with `modules_to_save=["lm_head"]`, or use the logits (`sequence_logps`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from spoloss.torch import linear_logps, linear_spo_loss, sequence_logps


@functools.cache  # once for each policy
@torch.no_grad()
def check_head(policy: PeftModel) -> None:
    """Raises a ValueError if the fused log-probabilities are not those of the policy's logits."""
    core = policy.get_base_model()
    head = core.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):  # a new adapter changes no logit yet
        raise ValueError("the head has an adapter, which its weight does not include")
    if policy.active_peft_config.is_prompt_learning:
        raise ValueError("the policy has a prompt, which the hidden states do not include")
    ids = torch.arange(16, device=head.weight.device)[None] % len(head.weight)
    training = policy.training
    policy.eval()
    expected = sequence_logps(policy(ids).logits, ids)
    found = linear_logps(core.get_decoder()(ids).last_hidden_state, head.weight, ids)
    policy.train(training)
    if not torch.allclose(found, expected, rtol=32.0 * torch.finfo(head.weight.dtype).eps):
        raise ValueError(
            f"the model's logits are not its hidden states times its head's weight: "
            f"log-probabilities are {found.item()}, by the model's logits {expected.item()}"
        )


def pair_loss(policy: PeftModel, batch: Any, beta: float = 0.1) -> Tensor:
    """The loss of a batch. The reference is the policy without its adapters."""
    check_head(policy)
    core = policy.get_base_model()
    head = core.get_output_embeddings()

    def hidden_states() -> Tensor:
        return core.get_decoder()(batch.ids, batch.mask).last_hidden_state

    with torch.no_grad(), policy.disable_adapter():
        reference = linear_logps(hidden_states(), head.weight, batch.labels)
    return linear_spo_loss(
        *hidden_states().chunk(2),
        head.weight,
        *batch.labels.chunk(2),
        *reference.chunk(2),
        beta=beta,
    ).loss


if __name__ == "__main__":
    import toy
    from peft import LoraConfig, get_peft_model

    model, _ = toy.models()
    policy = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    batch = toy.collate(toy.pairs(6))
    for _ in range(5):
        loss = pair_loss(policy, batch, beta=0.1)
        print(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
