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

HIDDEN, WEIGHT, BIAS = torch.randn(2, 5, 8), torch.randn(30, 8), torch.randn(30)
LABELS = torch.randint(0, 30, (2, 5))
PAIRS = torch.zeros(2)

OF_LOGITS = {"logits": torch.randn(2, 5, 30), "labels": LABELS, "token_weights": torch.ones(2, 5)}
OF_THE_CORE = dict.fromkeys(LOGPS, PAIRS) | {
    "beta": torch.ones(2),
    "reward_gap": torch.ones(2),
    "weights": torch.ones(2),
}
OF_THE_LOSS: dict[str, Any] = {
    "head.weight": WEIGHT,
    "head.bias": BIAS,
    "chosen.hidden": HIDDEN,
    "chosen.labels": LABELS,
    "chosen.token_weights": torch.ones(2, 5),
    "rejected.hidden": HIDDEN,
    "rejected.labels": LABELS,
    "reference_chosen_logps": PAIRS,
    "reference_rejected_logps": PAIRS,
    "beta": torch.ones(2),
    "reward_gap": torch.ones(2),
    "weights": torch.ones(2),
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
ARGUMENTS = [
    pytest.param(function, arguments, name, id=f"{function.__name__} {name}")
    for function, arguments in CALLS
    for name in arguments
]


OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "ndarray": Tensor.numpy,
    "Linear": lambda _: torch.nn.Linear(8, 30),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize(("function", "arguments", "name"), ARGUMENTS)
def test_what_is_no_tensor(
    function: Callable[..., Any], arguments: dict[str, Any], name: str, kind: str
) -> None:
    other = {**arguments, name: OTHERS[kind](arguments[name])}
    if kind == "ndarray" and name == "policy_chosen_logps":
        name = "policy_rejected_logps"  # the first array says which library it is
    with pytest.raises(TypeError, match=rf"^{name} must be .*, got ({kind}|numpy|torch)"):
        function(**other)


@pytest.mark.parametrize(("function", "arguments", "name"), ARGUMENTS)
def test_a_tensor_on_another_device(
    function: Callable[..., Any], arguments: dict[str, Any], name: str
) -> None:
    elsewhere = {**arguments, name: arguments[name].to("meta")}
    # The others must be where the first tensor is, so they are blamed.
    leaders = {
        "head.weight": "head.bias",
        "logits": "labels",
        "policy_chosen_logps": "policy_rejected",
    }
    blamed = leaders.get(name, name)
    with pytest.raises(ValueError, match=rf"^{blamed}\w* must be on the .*, got (meta|cpu)$"):
        function(**elsewhere)


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
