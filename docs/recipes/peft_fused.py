"""SPO with LoRA: the fused loss with a frozen head, and the bare model as the reference.

Tested with PEFT 0.21, Transformers 5.23 and PyTorch 2.13. To change an existing loop: this class.
There is no second model, no logits, and no gradient of the head's size.

Pitfalls: `head_of` refuses a policy whose logits are not its hidden states times its head's weight:
an adapter on the head, and a prompt (prompt, prefix and P-tuning). Train the head with
`modules_to_save=["lm_head"]`, or use the logits (`sequence_logps`). Then the reference has another
head than the policy.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from spoloss.torch import Completions, head_of, linear_logps, linear_spo_loss


class FusedSPO:
    """The loss of a batch. The reference is the policy without its adapters."""

    def __init__(self, policy: PeftModel, beta: float) -> None:
        self.policy, self.beta = policy, beta
        self.head = head_of(policy)
        with policy.disable_adapter():
            self.ref_head = head_of(policy)

    def __call__(self, batch: Any) -> Tensor:
        decoder = self.policy.get_base_model().get_decoder()
        with torch.no_grad(), self.policy.disable_adapter():
            ref_hidden = decoder(batch.ids, batch.mask).last_hidden_state
            ref_logps = linear_logps(self.ref_head, Completions(ref_hidden, batch.labels))
        hidden = decoder(batch.ids, batch.mask).last_hidden_state
        sides = map(Completions, hidden.chunk(2), batch.labels.chunk(2))
        return linear_spo_loss(self.head, *sides, *ref_logps.chunk(2), beta=self.beta).loss


if __name__ == "__main__":
    import toy
    from peft import LoraConfig, get_peft_model

    model, _ = toy.models()
    policy = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    loss_of, batch = FusedSPO(policy, beta=0.025), toy.collate(toy.pairs(6))
    toy.train(policy, lambda: loss_of(batch))
