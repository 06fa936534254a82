"""The trainers that bench_trainers.py compares: TRL's DPOTrainer with one loss or another."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOTrainer

RECIPES = Path(__file__).parents[1] / "docs" / "recipes"
IGNORED = -100


def recipe(name: str) -> ModuleType:
    """A file of docs/recipes as a module."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class HeadTrainer(DPOTrainer):
    """Calls a function of both models' hidden states and heads, inside the forward."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for model in (self.model, self.ref_model):
            recipe("trl_fused").add_head_call(model)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Any:
        """The loss of a batch whose rows are all chosen, then all rejected."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
        tokens = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            reference = self.ref_model(**tokens, use_cache=False, head_call=lambda *both: both)
        return model(
            **tokens,
            use_cache=False,
            head_call=lambda *policy: self.pair_loss(*policy, *reference, labels),
        )

    def pair_loss(
        self, hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor
    ) -> Tensor:
        """The loss from hidden states and heads."""
        raise NotImplementedError


def without_head() -> type[DPOTrainer]:
    """Both models without their heads, which any loss pays for: the least that a step can take."""

    class NoHead(HeadTrainer):
        def pair_loss(self, hidden: Tensor, *_: Tensor) -> Tensor:
            return hidden.square().mean()

    return NoHead


def liger() -> type[DPOTrainer]:
    """Liger's fused linear DPO, as TRL's `use_liger_kernel` ran it up to TRL 1.12."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    class Liger(HeadTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.liger = LigerFusedLinearDPOLoss(ignore_index=IGNORED, beta=self.beta)

        def pair_loss(
            self,
            hidden: Tensor,
            weight: Tensor,
            ref_hidden: Tensor,
            ref_weight: Tensor,
            labels: Tensor,
        ) -> Tensor:
            states = hidden[:, :-1].contiguous(), labels[:, 1:].contiguous()
            reference = ref_hidden[:, :-1].contiguous()
            return self.liger(weight, *states, ref_input=reference, ref_weight=ref_weight)[0]

    return Liger


@dataclass(frozen=True)
class Way:
    """A trainer class, made when it is needed, and what its row is called."""

    load: Callable[[], type[DPOTrainer]]
    title: str


WAYS = {
    "no_head": Way(without_head, "both models without their heads"),
    "trl": Way(lambda: DPOTrainer, "TRL's own DPO loss"),
    "liger": Way(liger, "Liger's fused DPO loss, compiled"),
    "logits": Way(lambda: recipe("trl_dpo").SPOTrainer, "SPO by logits"),
    "fused": Way(lambda: recipe("trl_fused").SPOTrainer, "SPO by the fused head"),
}
