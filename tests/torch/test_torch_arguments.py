"""Arguments that do not fit are refused before any computation, and the message names them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import spoloss
from spoloss._inputs import LOGPS
from spoloss.torch import Completions, Head, _devices, linear_spo_loss, sequence_logps

HIDDEN, WEIGHT, LABELS = torch.randn(2, 5, 8), torch.randn(30, 8), torch.randint(0, 30, (2, 5))
OF_LOGITS = {"logits": torch.randn(2, 5, 30), "labels": LABELS, "token_weights": torch.ones(2, 5)}
NUMBERS = dict.fromkeys(("beta", "reward_gap", "weights"), torch.ones(2))
OF_THE_CORE = dict.fromkeys(LOGPS, torch.zeros(2)) | NUMBERS
OF_THE_LOSS = {
    "head.weight": WEIGHT,
    "head.bias": torch.randn(30),
    "chosen.hidden": HIDDEN,
    "chosen.labels": LABELS,
    "chosen.token_weights": torch.ones(2, 5),
    "rejected.hidden": HIDDEN,
    "rejected.labels": LABELS,
    **dict.fromkeys(LOGPS[2:], torch.zeros(2)),
    **NUMBERS,
}


def fused(**arguments: Any) -> Any:
    """`linear_spo_loss` from the fields of its objects."""
    fields: dict[str, dict[str, Any]] = {"head": {}, "chosen": {}, "rejected": {}}
    numbers = {}
    for name, value in arguments.items():
        owner, _, field = name.partition(".")
        (fields[owner] if field else numbers)[field or name] = value
    sides = {side: Completions(**fields[side]) for side in ("chosen", "rejected")}
    return linear_spo_loss(Head(**fields["head"]), **sides, **numbers)


CALLS = [
    (fused, OF_THE_LOSS),
    (sequence_logps, OF_LOGITS),
    (spoloss.spo_loss, OF_THE_CORE),
    (spoloss.preference_metrics, OF_THE_CORE),
]


@pytest.mark.parametrize(("function", "arguments"), CALLS[:2])
def test_an_array_of_numpy(function: Callable[..., Any], arguments: dict[str, Tensor]) -> None:
    for name, tensor in arguments.items():
        with pytest.raises(TypeError, match=rf"^{name} must be .*, got (ndarray|numpy)"):
            function(**{**arguments, name: tensor.numpy()})


@pytest.mark.parametrize(("function", "arguments"), CALLS)
def test_a_tensor_on_another_device(
    function: Callable[..., Any], arguments: dict[str, Tensor]
) -> None:
    """Where it is the first tensor, the next one is blamed, which must be where the first is."""
    leaders = {
        "head.weight": "head.bias",
        "logits": "labels",
        "policy_chosen_logps": "policy_rejected_logps",
    }
    for name, tensor in arguments.items():
        blamed = leaders.get(name, name)
        with pytest.raises(ValueError, match=rf"^{blamed} must be on the .*, got (meta|cpu)$"):
            function(**{**arguments, name: tensor.to("meta")})


def test_a_head_that_zero_3_has_partitioned() -> None:
    weight = torch.zeros(0)
    weight.ds_id = 3  # type: ignore[attr-defined]
    message = r"^head.weight has shape \(0,\) because .* partitioned it\. Compute the loss inside"
    with pytest.raises(ValueError, match=message):
        fused(**{**OF_THE_LOSS, "head.weight": weight})


def test_a_sharded_head() -> None:
    class Sharded(torch.Tensor):
        """Stands for a DTensor, which is told by this method."""

        def full_tensor(self) -> Tensor:
            raise AssertionError("gathered without being asked")

    message = "^head.weight is a sharded DTensor. Call this inside the forward of the FSDP module"
    with pytest.raises(TypeError, match=message):
        fused(**{**OF_THE_LOSS, "head.weight": WEIGHT.as_subclass(Sharded)})


def test_a_number_of_pytorch_on_the_cpu_is_a_number_on_any_device() -> None:
    logps = [torch.zeros(2, device="meta")] * 4
    number = torch.tensor(0.1)
    assert spoloss.spo_loss(*logps, beta=number, weights=number).device.type == "meta"


@pytest.mark.parametrize("kind", ["mps", "npu", "xpu"])
def test_a_gpu_of_another_kind_has_larger_tiles_than_a_cpu(kind: str) -> None:
    there = SimpleNamespace(is_cuda=False, device=SimpleNamespace(type=kind))
    found = _devices.device_of(there)  # type: ignore[arg-type]
    assert found.memory.block_bytes > _devices.CPU.memory.block_bytes
    assert not found.wide_sums
    assert not found.compiles


def test_no_copy_is_asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source is a temporary, which may be freed before the device has read it."""
    copies = []
    to = Tensor.to

    def spy(self: Tensor, *args: Any, **options: Any) -> Tensor:
        copies.append(options)
        return to(self, *args, **options)

    monkeypatch.setattr(Tensor, "to", spy)
    fused(**OF_THE_LOSS)
    assert copies
    assert not any(options.get("non_blocking") for options in copies)
