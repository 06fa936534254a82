"""The fused head as it works on CUDA: on a card where there is one, and on a stand-in everywhere.

The stand-in is the CPU with CUDA's ways: its tiles, tiles of half precision, the compiled block,
and the two products of half precision that are summed in float32, which no CPU has.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from helpers import wings
from helpers.fused import ALL, Case, cut_blocks, flat_logps, largest, with_memory
from helpers.wings import (
    HEAD,
    STATES,
    Torch,
    check_half_precision,
    check_same,
    completions_of,
    fused,
    head_of,
    make_arrays,
    unfused,
    unfused_logps,
)
from spoloss import SPO
from spoloss.torch import (
    Completions,
    _devices,
    _exponentials,
    _fused,
    _head,
    _labels,
    _products,
    _recompute,
    _tokens,
    linear_logps,
)


@dataclass(frozen=True)
class Place:
    """Where a test runs, and whether its blocks are compiled."""

    device: str
    compiles: bool


PLACES = [
    Place("cpu", compiles=False),
    pytest.param(Place("cpu", compiles=True), marks=pytest.mark.extended),
]
if torch.cuda.is_available():
    PLACES += [Place("cuda", compiles=False), Place("cuda", compiles=True)]


def mm_dtype(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    return torch.mm(a.to(out_dtype), b.to(out_dtype))


def addmm_dtype_out(
    total: Tensor,
    a: Tensor,
    b: Tensor,
    out_dtype: torch.dtype,
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
    out: Tensor,
) -> Tensor:
    assert alpha == 1.0
    assert out.dtype == out_dtype
    return torch.addmm(total, a.to(out_dtype), b.to(out_dtype), beta=beta, out=out)


@pytest.fixture(params=PLACES, ids=str)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Blocks of 16 of 40 entries, and the eight that are left over."""
    cuda = with_memory(_devices.CUDA, block_bytes=1)._replace(compiles=request.param.compiles)
    monkeypatch.setattr(wings, "V", 40)
    cut_blocks(monkeypatch, 16)
    monkeypatch.setattr(_head, "device_of", lambda _: cuda)
    if request.param.device == "cuda":
        yield request.param
        return
    with torch.library._scoped_library("aten", "IMPL") as library:
        for device in ("CPU", "Meta"):
            # PyTorch 2.8 has them on "Meta", but without out_dtype.
            library.impl("mm.dtype", mm_dtype, device, allow_override=True)
            library.impl("addmm.dtype_out", addmm_dtype_out, device, allow_override=True)
        yield request.param


HALF = ["bfloat16", "float16"]


@pytest.mark.parametrize("need", [(*STATES, *HEAD), STATES], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("chunk_size", [3, 20, None])
def test_half_precision_is_no_worse_than_the_naive_path(
    place: Place, dtype: str, chunk_size: int | None, need: tuple[str, ...]
) -> None:
    check_half_precision(Torch(place.device), dtype, need, chunk_size)


@pytest.mark.parametrize("chunk_size", [3, None])
def test_a_loss_scale_keeps_small_gradients(place: Place, chunk_size: int | None) -> None:
    scale = {"loss_scale": 2.0**24}
    check_half_precision(Torch(place.device), "float16", (*STATES, *HEAD), chunk_size, **scale)


@pytest.mark.parametrize("place", PLACES[::2], ids=str, indirect=True)
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_where_a_total_is_as_wide_as_its_factors(
    place: Place, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch 2.8 and 2.9."""
    monkeypatch.setattr(_products, "WIDE_TOTALS", False)
    monkeypatch.setattr(torch, "addmm", None)
    check_half_precision(Torch(place.device), dtype, (*STATES, *HEAD), 3)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"average": True, "nll_weight": 0.7},
    {"shift": False, "softcap": 3.0, "logit_scale": 0.5, "temperature": 2.0},
    {"reduction": "sum", "nll_weight": 0.3, "temperature": 0.7},
    {"reduction": "none", "average": True},
]


@pytest.mark.parametrize("chunk_size", [3, None])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("need", [(*STATES, *HEAD), STATES, HEAD])
def test_fused_is_unfused(
    place: Place, need: tuple[str, ...], options: dict[str, Any], chunk_size: int | None
) -> None:
    wing = Torch(place.device)
    check_same(
        wing,
        lambda a: fused(wing, SPO(), a, chunk_size=chunk_size, **options).loss,
        lambda a: unfused(wing, SPO(), a, **options),
        make_arrays(wing),
        need,
    )


@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "logit_scale": 0.5}], ids=str)
def test_linear_logps(place: Place, options: dict[str, Any], chunk_size: int | None) -> None:
    wing = Torch(place.device)

    def mine(a: Any) -> Tensor:
        head = head_of(wing, a, {**options, "chunk_size": chunk_size})
        return linear_logps(head, completions_of(wing, a, "chosen", {}))

    theirs = lambda a: unfused_logps(wing, a, "chosen", **options)  # noqa: E731
    check_same(wing, mine, theirs, make_arrays(wing), (STATES[0], *HEAD))


@pytest.mark.parametrize("place", PLACES[:1], ids=str, indirect=True)
@pytest.mark.parametrize("chunk_size", [3, None])
def test_a_tile_without_tokens(place: Place, chunk_size: int | None) -> None:
    """A pair without labels may have a tile of its own, which has no largest slope."""
    case = Case(dtype=torch.float16, device=place.device)
    for kept in (0, 1):
        for labels in case.labels:
            labels[kept:] = -100
        grads = case.grads(case.fused(SPO(), chunk_size=chunk_size).loss)
        assert all(grad.isfinite().all() for grad in grads)


def test_a_tile_is_not_made_twice(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where exponentials do not replace their logits, the logits need one block's room alone."""
    monkeypatch.setattr(_exponentials, "compiled", lambda function: function)
    block, tile, head = (4 * size for size in (16 * 16, 16 * 64, 64 * 8))
    found = largest(1, 8, frozen=False, chunk_size=16)
    assert found == (head if place.compiles else tile)
    assert block < head < tile


@pytest.mark.parametrize("place", PLACES[:1], ids=str, indirect=True)
@pytest.mark.parametrize("chunk_size", [3, 20, None])
@pytest.mark.parametrize("need", [ALL, (True, True, False, False)])
def test_nothing_waits_for_the_device_but_the_choice_of_rows(
    place: Place,  # noqa: ARG001
    need: tuple[bool, ...],
    chunk_size: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The meta device has no numbers to wait for: what asks for one is an error there."""
    case, known = Case(need, torch.bfloat16, "meta"), Case()
    labels = dict(zip(("chosen", "rejected"), known.labels, strict=True))
    labels["completions"] = known.labels[0]

    def table(sides: list[_labels.Sequences], **options: Any) -> _tokens.TokenTable:
        read = [
            _labels.sequences_of(Completions(torch.empty(0), labels[side.name]), side.name)
            for side in sides
        ]
        found = _tokens.make_table(read, **options)
        names = ("place", "target", "side", "pair")
        columns = {name: getattr(found.tokens, name).to("meta") for name in names}
        tokens = _tokens.Tokens(**columns, weight=None)
        return replace(found, tokens=tokens, left_out=sides[0].left_out)

    for module in (_fused, _recompute):
        monkeypatch.setattr(module, "make_table", table)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    chosen, _, weight, bias = case.tensors.values()
    for value in (
        case.fused(SPO(), chunk_size=chunk_size).loss,
        case.fused(SPO(), chunk_size=chunk_size, nll_weight=0.5).loss,
        flat_logps(chosen, weight, case.labels[0], bias=bias, chunk_size=chunk_size).sum(),
    ):
        value.backward()
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        value.item()


@pytest.mark.parametrize(
    ("dtype", "major", "hip", "wide_totals", "wide"),
    [
        (torch.bfloat16, 8, None, False, True),
        (torch.bfloat16, 9, None, True, True),
        (torch.bfloat16, 7, None, True, False),
        (torch.float16, 9, None, True, True),
        (torch.float16, 7, None, True, True),
        (torch.bfloat16, 9, "7.0", True, True),
        (torch.float16, 9, "7.0", False, False),
    ],
)
def test_cards_that_cannot_sum_half_precision_in_float32(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    major: int,
    hip: str | None,
    *,
    wide_totals: bool,
    wide: bool,
) -> None:
    """They work as a CPU does, with the tiles of a card."""
    card = SimpleNamespace(major=major, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(_devices, "WIDE_TOTALS", wide_totals)
    tensor = SimpleNamespace(is_cuda=True, device="cuda", dtype=dtype)
    found = _devices.device_of(tensor)  # type: ignore[arg-type]
    assert found.memory == _devices.CUDA.memory
    assert found.wide_sums == wide
    flags = SimpleNamespace(allow_fp16_accumulation=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", flags)
    found = _devices.device_of(tensor)  # type: ignore[arg-type]
    # Its products with a float32 result are errors then.
    assert found.wide_sums == (wide and (hip is not None or dtype != torch.float16))


def test_a_small_card_has_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """And without torch.compile, the exponentials are computed in place."""
    card = SimpleNamespace(major=8, total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    with torch._dynamo.config.patch(disable=True):
        tensor = SimpleNamespace(is_cuda=True, device="cuda", dtype=torch.bfloat16)
        found = _devices.device_of(tensor)  # type: ignore[arg-type]
    assert found.memory == (256 * 2**20, 4096, 2 * 2**30, 32 * 2**20)
    assert found.wide_sums
    assert not found.compiles


@pytest.mark.parametrize("form", [_exponentials.exponentials, _exponentials.exponentials_])
def test_small_exponentials_survive_float16(form: Any) -> None:
    """exp(-20) is 2e-9, less than the smallest float16."""
    values, none = torch.tensor([[0.0, -20.0]]), torch.tensor([-1])
    transform = _exponentials.Transform(None, None, 1.0, 1.0)
    sums = _exponentials.Sums.start(values, torch.float32)
    found = form(_exponentials.Products(values, transform, none, 2), sums, torch.float16)
    exact = torch.tensor([0.0, -20.0]).exp() * (-found.shift).exp()
    torch.testing.assert_close(found.exps[0].float(), exact, rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("default", [torch.float16, torch.float32])
def test_the_unit_of_float16_is_a_power_of_two_for_any_default_dtype(default: torch.dtype) -> None:
    rows = torch.tensor([[1.5, -3.0]], dtype=torch.float16)
    torch.set_default_dtype(default)
    try:
        unit = _products.unit_of(rows, torch.tensor([2.0**-40], dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    # The largest product, 3 * 2^-40, is between 2^13 and 2^14 units.
    assert torch.equal(unit, torch.tensor(2.0**-52))


@pytest.mark.parametrize("known", [True, False])
def test_the_compiler_knows_that_a_block_is_aligned(
    monkeypatch: pytest.MonkeyPatch, *, known: bool
) -> None:
    """Of any height and width: one graph for all, in which loads of 16 bytes are allowed."""
    facts = []

    def keep(graph: torch.fx.GraphModule, *_: Any, **_options: Any) -> Any:
        (products,) = graph.graph.find_nodes(op="placeholder", target="L_products_values")
        facts.append(statically_known_true(products.meta["example_value"].shape[1] % 16 == 0))
        return graph.forward

    torch.compiler.reset()
    compile_ = functools.partial(torch.compile, backend=keep)
    monkeypatch.setattr(torch, "compile", compile_)
    block = _exponentials.exponentials
    compiled = _exponentials.compiled.__wrapped__(block) if known else compile_(block, dynamic=True)
    transform = _exponentials.Transform(None, 30.0, 0.5, 1.25)
    for rows, width, stop in ((3, 32, 32), (5, 64, 96), (7, 48, 48)):
        none, sums = torch.full((rows,), -1), _exponentials.Sums.known(torch.zeros(rows))
        products = _exponentials.Products(torch.zeros(rows, width), transform, none, stop)
        compiled(products, sums, torch.float32)
    assert facts == [known]
