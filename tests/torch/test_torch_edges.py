"""The edges of the fused head: kinds of weights and options, pairs of weight 0, dtypes, memory."""

from __future__ import annotations

import gc
import inspect
import typing
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import spoloss
import spoloss.torch
from helpers.fused import ALL, OTHER_T, Case, D, P, T, V, check_fused
from spoloss import DPO, SPO, Squared, pair_loss, spo_loss
from spoloss.torch import (
    _autograd,
    linear_dpo_loss,
    linear_ipo_loss,
    linear_logps,
    linear_pair_loss,
    linear_spo_loss,
    linear_squared_loss,
    sequence_logps,
)

CHUNKS = [3, None]


def inputs(case: Case) -> tuple[Any, ...]:
    chosen, rejected, weight, _ = case.tensors.values()
    return (chosen, rejected, weight, *case.labels, *case.reference)


def logps_of(case: Case, **options: Any) -> list[Tensor]:
    chosen, rejected, weight, bias = case.tensors.values()
    return [
        sequence_logps(hidden @ weight.t() + bias, labels, **options)
        for hidden, labels in zip((chosen, rejected), case.labels, strict=True)
    ]


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("nll_weight", [0.0, 0.7])
@pytest.mark.parametrize("weights", [2.0, 0, torch.tensor(0.5, dtype=torch.float64)], ids=str)
def test_weights_of_every_kind(weights: Any, nll_weight: float, chunk_size: int | None) -> None:
    case = Case()
    got = case.fused(SPO(), weights=weights, nll_weight=nll_weight, chunk_size=chunk_size).loss
    case.weights = torch.full((P,), float(weights), dtype=torch.float64)
    want = case.unfused(SPO(), nll_weight=nll_weight)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(case.grads(got), case.grads(want), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("nll_weight", [0.0, 0.5])
@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("poison", ["forbidden target", "nan hidden states", "nan reference"])
def test_a_pair_of_weight_0_is_left_out_whatever_it_holds(
    poison: str, chunk_size: int | None, nll_weight: float, reduction: str
) -> None:
    """The case's pair 3 has weight 0."""
    clean, case = Case(), Case()
    for either in (clean, case):  # words 0 and 1 belong to pair 3 alone
        either.labels = tuple(
            labels.clamp(min=2).where(labels >= 0, labels) for labels in either.labels
        )  # type: ignore[assignment]
        either.labels[0][3] = 0
    if poison == "forbidden target":
        for either in (clean, case):
            either.tensors["bias"].data[0] = -torch.inf
        clean.labels[0][3] = 2
    elif poison == "nan hidden states":
        case.tensors["chosen_hidden"].data[3] = torch.nan
        case.tensors["rejected_hidden"].data[3, 0] = torch.inf
    else:
        case.reference[0][3] = torch.nan
    options = {"nll_weight": nll_weight, "chunk_size": chunk_size, "reduction": reduction}
    got, want = (either.fused(SPO(), **options).loss for either in (case, clean))
    torch.testing.assert_close(got, want)
    for mine, theirs in zip(case.grads(got), clean.grads(want), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs)


def test_a_tied_pair_under_weights_that_are_the_squared_gap() -> None:
    case = Case()
    gap = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    weight, bias = case.tensors["weight"], case.tensors["bias"]
    out = linear_spo_loss(*inputs(case), bias=bias, reward_gap=gap, weights=gap**2)
    want = spo_loss(*logps_of(case), *case.reference, reward_gap=gap, weights=gap**2)
    torch.testing.assert_close(out.loss, want)
    (got,) = torch.autograd.grad(out.loss, weight)
    torch.testing.assert_close(got, torch.autograd.grad(want, weight)[0])
    assert got.isfinite().all()


@pytest.mark.parametrize("name", ["temperature", "logit_scale", "softcap", "nll_weight"])
def test_options_that_are_tensors_are_refused(name: str) -> None:
    for value in (torch.tensor(2.0, requires_grad=True), torch.tensor(2.0)):
        with pytest.raises(TypeError, match=f"{name} must be a number, got Tensor"):
            linear_spo_loss(*inputs(Case()), **{name: value})
        if name != "nll_weight":
            case = Case()
            hidden, weight = case.tensors["chosen_hidden"], case.tensors["weight"]
            with pytest.raises(TypeError, match=f"{name} must be a number, got Tensor"):
                linear_logps(hidden, weight, case.labels[0], **{name: value})


def test_a_logit_scale_of_0_is_refused() -> None:
    with pytest.raises(ValueError, match="logit_scale must be finite and not 0, got 0"):
        linear_spo_loss(*inputs(Case()), logit_scale=0.0)


def test_float64_stays_float64_under_autocast() -> None:
    case = Case()
    want = case.fused(SPO()).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.fused(SPO()).loss
        logps = linear_logps(case.tensors["chosen_hidden"], case.tensors["weight"], case.labels[0])
    assert got.dtype == logps.dtype == torch.float64
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(case.grads(got), case.grads(want))


def test_autocast_equals_inputs_that_are_rounded_beforehand() -> None:
    case, rounded = Case(dtype=torch.float32), Case(dtype=torch.float32)
    for name, tensor in case.tensors.items():
        rounded.tensors[name] = tensor.detach().bfloat16().requires_grad_()
    case.tensors["bias"] = rounded.tensors["bias"].float()  # autocast does not round what is added
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.fused(SPO())
    want = rounded.fused(SPO())
    torch.testing.assert_close(got.chosen_logps, want.chosen_logps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_the_nll_is_exact_in_float64_without_weights(
    chunk_size: int | None, *, average: bool
) -> None:
    case = Case()
    got = case.fused(
        SPO(), weights=None, nll_weight=0.3, chunk_size=chunk_size, average=average
    ).loss
    logps = logps_of(case, average=average)
    nll = -logps_of(case, average=True)[0].mean()
    want = pair_loss(SPO(), *logps, *case.reference, beta=case.beta) + 0.3 * nll
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(case.grads(got), case.grads(want), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_small_integers(dtype: torch.dtype) -> None:
    """uint8 would read the ignored label -100 as token 156."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 200, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[3, 156, 7], [156, 1, 156]])
    want = sequence_logps(logits, labels)
    narrow = labels.to(dtype)
    torch.testing.assert_close(sequence_logps(logits, narrow), want)
    eye = torch.eye(200, dtype=torch.float64)
    torch.testing.assert_close(linear_logps(logits, eye, narrow), want)


PUBLIC = [
    getattr(module, name)
    for module in (spoloss, spoloss.torch)
    for name in module.__all__
    if inspect.isfunction(getattr(module, name))
]


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__name__)
def test_signatures_resolve_and_list_their_keywords(function: Any) -> None:
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    assert {parameter.name for parameter in parameters} <= set(hints)
    assert all(p.kind != inspect.Parameter.VAR_KEYWORD for p in parameters)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_a_frozen_head_may_change_before_the_backward(chunk_size: int | None) -> None:
    case = Case((True, True, False, False))
    want = case.grads(case.fused(SPO(), chunk_size=chunk_size).loss)
    loss = case.fused(SPO(), chunk_size=chunk_size).loss
    case.tensors["weight"].mul_(3.0)
    torch.testing.assert_close(case.grads(loss), want)


def test_hidden_states_are_not_kept_alive() -> None:
    case = Case()
    chosen, rejected, weight, _ = case.tensors.values()
    copies = [states.detach().clone() for states in (chosen, rejected)]
    freed: list[weakref.ref[Tensor]] = []

    def last_layer(states: Tensor) -> Tensor:
        out = Identity.apply(states)
        freed.append(weakref.ref(out))
        return out

    loss = linear_spo_loss(
        *(last_layer(states.requires_grad_()) for states in copies),
        weight,
        *case.labels,
        *case.reference,
    ).loss
    gc.collect()
    assert all(reference() is None for reference in freed)
    loss.backward()
    assert all(states.grad is not None for states in copies)


class Identity(torch.autograd.Function):
    """A layer that keeps nothing."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:  # noqa: ARG004
        return states.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:  # noqa: ARG004
        return upstream


def test_a_plain_backward_copies_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    copies = []
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda self, **k: copies.append(self) or clone(self, **k))
    case.fused(SPO()).loss.backward()
    assert not copies


def test_a_scaled_backward_makes_no_second_gradient_of_the_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = []
    put = _autograd.Held.put
    monkeypatch.setattr(_autograd.Held, "put", lambda self, *g: held.extend(g) or put(self, *g))
    case = Case()
    (case.fused(SPO()).loss * 2.0).backward()
    assert case.tensors["weight"].grad.data_ptr() == held[1].data_ptr()


def test_a_head_that_zero_3_has_partitioned() -> None:
    case = Case()
    weight = torch.zeros(0)
    weight.ds_id = 3  # type: ignore[attr-defined]
    for call in (
        lambda: linear_logps(case.tensors["chosen_hidden"], weight, case.labels[0]),
        lambda: linear_spo_loss(*inputs(case)[:2], weight, *inputs(case)[3:]),
    ):
        with pytest.raises(
            ValueError, match=r"ZeRO-3 has partitioned it\. Compute the loss inside"
        ):
            call()


def test_devices_that_differ() -> None:
    case = Case()
    hidden = case.tensors["chosen_hidden"].detach().to("meta")
    with pytest.raises(ValueError, match="hidden must be on the weight's cpu, got meta"):
        linear_logps(hidden, case.tensors["weight"], case.labels[0].to("meta"))


def test_the_default_device_is_another() -> None:
    case = Case()
    chosen, _, weight, _ = case.tensors.values()
    calls = (
        lambda: case.fused(SPO(), nll_weight=0.5, weights=0.5).loss,
        lambda: case.fused(SPO(), reduction="none").loss.sum(),
        lambda: linear_logps(chosen, weight, case.labels[0], average=True).sum(),
    )
    for call in calls:
        want = call()
        with torch.device("meta"):  # stands for "cuda" where there is none
            got = call()
            grads = case.grads(got)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(grads, case.grads(want))


def test_weights_of_another_dtype_do_not_change_that_of_the_loss() -> None:
    case = Case(dtype=torch.float32)
    case.reference, case.beta = (0.0, 0.0), 0.1
    for reduction in ("mean", "none"):
        for nll_weight in (0.0, 0.5):
            got = case.fused(SPO(), nll_weight=nll_weight, reduction=reduction).loss
            assert case.weights.dtype == torch.float64
            assert got.dtype == torch.float32
            assert all(grad.dtype == torch.float32 for grad in case.grads(got))


@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_a_batch_without_any_label(chunk_size: int | None) -> None:
    case = Case()
    case.labels = tuple(torch.full_like(labels, -100) for labels in case.labels)
    for options in ({}, {"reduction": "none"}, {"nll_weight": 1.0}):
        out = case.fused(SPO(), chunk_size=chunk_size, **options)
        assert (out.chosen_logps == 0).all()
        assert all((grad == 0).all() for grad in case.grads(out.loss))


def test_spellings_of_the_squared_loss() -> None:
    case = Case()
    bias, gap = case.tensors["bias"], torch.tensor([0.5, 1.0, 2.0, 1.0, 3.0], dtype=torch.float64)
    calls: list[tuple[Any, Any, dict[str, Any]]] = [
        (linear_squared_loss, spoloss.squared_loss, {"beta": 0.2, "reward_gap": gap}),
        (linear_squared_loss, spoloss.squared_loss, {}),
        (linear_ipo_loss, spoloss.ipo_loss, {"beta": 0.3}),
        (linear_ipo_loss, spoloss.ipo_loss, {}),
        (linear_dpo_loss, spoloss.dpo_loss, {}),
        (linear_spo_loss, spoloss.spo_loss, {}),
    ]
    for fused, unfused, options in calls:
        got = fused(*inputs(case), bias=bias, **options).loss
        want = unfused(*logps_of(case), *case.reference, **options)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=0.0)
        torch.testing.assert_close(case.grads(got), case.grads(want), rtol=1e-10, atol=1e-11)


def test_a_gap_in_float64_is_not_rounded_by_hidden_states_in_float32() -> None:
    case = Case(dtype=torch.float32)
    gap = torch.full((P,), 1.0 / 3.0, dtype=torch.float64)
    out = linear_squared_loss(*inputs(case), reward_gap=gap, beta=0.1, reduction="none")
    margin = spoloss.log_ratio_margin(out.chosen_logps, out.rejected_logps, *case.reference)
    torch.testing.assert_close(out.loss, (margin - gap / 0.1) ** 2, rtol=1e-13, atol=0.0)


# One packed row a side.


def pack(case: Case) -> dict[str, Any]:
    """The case's sequences one after another, lengths 7, 3, 0, 5, 7 and 2, 6, 6, 1, 4."""
    lengths = ([7, 3, 0, 5, 7], [2, 6, 6, 1, 4])
    packed: dict[str, Any] = {}
    for side, name in enumerate(("chosen", "rejected")):
        hidden, labels = case.tensors[f"{name}_hidden"], case.labels[side]
        for kind, rows in (("hidden", hidden), ("labels", labels)):
            parts = [row[:n] for row, n in zip(rows, lengths[side], strict=True)]
            packed[f"{name}_{kind}"] = torch.cat(parts)[None]
        packed[f"{name}_cu_seqlens"] = torch.tensor([0, *lengths[side]]).cumsum(0)
        for row, n in enumerate(lengths[side]):
            labels[row, n:] = -100
    return packed


@pytest.mark.parametrize(
    "options", [{}, {"average": True, "nll_weight": 0.4}, {"reduction": "none"}]
)
@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("need", [ALL, (True, True, False, False)])
def test_packed_rows_equal_padded_ones(
    need: tuple[bool, ...], chunk_size: int | None, options: dict[str, Any]
) -> None:
    case = Case(need)
    packed = pack(case)

    def fused(loss: Any, **options: Any) -> Any:
        return linear_pair_loss(
            loss,
            packed["chosen_hidden"],
            packed["rejected_hidden"],
            case.tensors["weight"],
            packed["chosen_labels"],
            packed["rejected_labels"],
            *case.reference,
            beta=case.beta,
            weights=case.weights,
            bias=case.tensors["bias"],
            chosen_cu_seqlens=packed["chosen_cu_seqlens"],
            rejected_cu_seqlens=packed["rejected_cu_seqlens"],
            **options,
        )

    check_fused(case, SPO(), fused, chunk_size=chunk_size, **options)


def test_packed_rows_that_do_not_fit() -> None:
    case = Case()
    packed = pack(case)
    chosen, rejected = packed.pop("chosen_cu_seqlens"), packed.pop("rejected_cu_seqlens")
    call = {"weight": case.tensors["weight"], "reference_chosen_logps": 0.0} | packed
    call |= {"reference_rejected_logps": 0.0}
    with pytest.raises(ValueError, match="both be given or neither, got chosen_cu_seqlens alone"):
        linear_spo_loss(**call, chosen_cu_seqlens=chosen)
    with pytest.raises(ValueError, match="chosen_cu_seqlens and rejected_cu_seqlens must have the"):
        linear_spo_loss(
            **call, chosen_cu_seqlens=chosen, rejected_cu_seqlens=rejected[[0, 2, 3, 4, 5]]
        )
    backwards = chosen.flip(0)
    with pytest.raises(ValueError, match="chosen_cu_seqlens must rise from 0 to T"):
        linear_spo_loss(**call, chosen_cu_seqlens=backwards, rejected_cu_seqlens=rejected)


# Compiled graphs for any number of lengths.


def lengths_compiled(function: Any, *, dynamic: bool | None) -> int:
    """How many graphs serve eleven lengths, each checked against the eager function."""
    graphs = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    generator = torch.Generator().manual_seed(0)
    for length in range(5, 16):
        hidden = torch.randn(2, P, length, D, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, V, (2, P, length), generator=generator)
        labels[:, 1, :3] = -100
        leaves = (hidden.requires_grad_(), Case().tensors["weight"])
        got, want = compiled(*leaves, labels), function(*leaves, labels)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves)
        )
    return graphs


def by_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    sides = zip(hidden, labels, strict=True)
    return spo_loss(*(sequence_logps(h @ weight.t(), y) for h, y in sides), 0.0, 0.0)


def by_fused_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_spo_loss(*hidden, weight, *labels, 0.0, 0.0, nll_weight=0.1).loss


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("function", [by_logits, by_fused_head])
@pytest.mark.parametrize("dynamic", [None, True])
def test_two_graphs_serve_any_number_of_lengths(function: Any, *, dynamic: bool | None) -> None:
    assert lengths_compiled(function, dynamic=dynamic) <= 2


def test_the_head_is_called_by_keyword_too() -> None:
    case = Case()
    names = (
        "chosen_hidden",
        "rejected_hidden",
        "weight",
        "chosen_labels",
        "rejected_labels",
        "reference_chosen_logps",
        "reference_rejected_logps",
    )
    call = SimpleNamespace(**dict(zip(names, inputs(case), strict=True)))
    for function in (linear_spo_loss, linear_dpo_loss, linear_squared_loss, linear_ipo_loss):
        value = function(**vars(call)).loss
        torch.testing.assert_close(value, function(*inputs(case)).loss)
        assert value.isfinite()
    for loss in (SPO(), DPO(), Squared()):
        assert linear_pair_loss(loss, **vars(call), beta=0.1).loss.isfinite()
    assert OTHER_T != T


class NoGradient(torch.autograd.Function):
    """The identity, for which autograd has no gradient at all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:  # noqa: ARG004
        return None


def test_no_gradient_from_above_makes_none_below() -> None:
    hidden, weight = torch.randn(1, 4, 3, requires_grad=True), torch.randn(5, 3)
    logps = NoGradient.apply(linear_logps(hidden, weight, torch.ones(1, 4, dtype=torch.long)))
    assert torch.autograd.grad(logps.sum(), hidden, allow_unused=True) == (None,)
