"""The CUDA path at real sizes without a card: operators, synchronisations, memory and products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchgen import gen
from torchgen.model import DispatchKey

from benchmarks.paper import GIB, Paper, backward, on_paper, refusal
from helpers.fused import flat_logps, flat_pair, flat_spo
from helpers.wings import APODown
from spoloss import SPO
from spoloss.torch import _fused, _one_pass


@pytest.fixture
def paper() -> Iterator[Paper]:
    if (reason := refusal()) is not None:
        pytest.skip(reason)
    with on_paper() as mode:
        yield mode


def batch(
    pairs: int,
    tokens: int,
    width: int,
    vocab: int,
    *,
    frozen: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda:0")

    labels = [torch.randint(vocab, (pairs, tokens)) for _ in range(2)]
    for side in labels:
        side[:, : tokens // 4] = -100
    return {
        "chosen_hidden": empty(pairs, tokens, width).requires_grad_(),
        "rejected_hidden": empty(pairs, tokens, width).requires_grad_(),
        "weight": empty(vocab, width).requires_grad_(not frozen),
        "chosen_labels": labels[0].to("cuda:0"),
        "rejected_labels": labels[1].to("cuda:0"),
    }


def spo(given: dict[str, Tensor], **options: Any) -> Tensor:
    return flat_spo(*given.values(), 0.0, 0.0, shift=False, **options).loss


def logps(given: dict[str, Tensor]) -> Tensor:
    return flat_logps(given["chosen_hidden"], given["weight"], given["chosen_labels"], shift=False)


LIMITS = {  # GiB beside the inputs, gradients included; launches
    ("0.5B", False): (1.9, 480),
    ("0.5B", True): (1.0, 230),
    ("7B", False): (3.4, 445),
    ("7B", True): (1.2, 215),
    ("Gemma", False): (3.6, 870),
    ("Gemma", True): (1.2, 280),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("model", "width", "vocab"),
    [("0.5B", 896, 151_936), ("7B", 4096, 128_256), ("Gemma", 2304, 256_000)],
)
def test_one_pass_on_cuda(
    paper: Paper, model: str, width: int, vocab: int, *, frozen: bool
) -> None:
    pairs, tokens = 8, 1024
    given = batch(pairs, tokens, width, vocab, frozen=frozen)
    before = paper.forget()
    backward(spo(given, **({"softcap": 30.0} if model == "Gemma" else {})))
    counted = 2 * pairs * (tokens - tokens // 4)
    assert paper.syncs == [0]
    assert paper.flops == (4 if frozen else 6) * counted * width * vocab
    most, launches = LIMITS[model, frozen]
    assert (paper.peak - before) / GIB < most
    assert len(paper.kernels) < launches
    for name in ("chosen_hidden", "rejected_hidden", *([] if frozen else ["weight"])):
        assert given[name].grad.dtype == torch.bfloat16
        assert given[name].grad.device.type == "cuda"


def test_a_small_call_is_bound_by_launches(paper: Paper) -> None:
    given = batch(4, 64, 896, 151_936, frozen=False)
    paper.forget()
    backward(spo(given))
    assert len(paper.kernels) < 140


def test_log_probabilities_on_cuda(paper: Paper) -> None:
    given = batch(8, 1024, 896, 151_936, frozen=False)
    before = paper.forget()
    backward(logps(given).sum())
    assert paper.syncs == [0]
    assert paper.flops == 8 * 8 * 768 * 896 * 151_936
    assert (paper.peak - before) / GIB < 2.0


@pytest.fixture(scope="module")
def has_kernel() -> Callable[[str], bool]:
    """Whether an operator has a CUDA kernel, or is made of operators that have one."""
    folder = Path(gen.__file__).parent / "packaged" / "ATen" / "native"
    parsed = gen.parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    names = ("", "ExplicitAutograd", "ExplicitAutogradNonFunctional", "ImplicitAutograd")
    keys = [DispatchKey["CUDA" if not name else f"Composite{name}"] for name in names]
    by_name = {f"aten::{f.func.name}": f for f in parsed.native_functions}

    def has_kernel(name: str) -> bool:
        found, delegate = by_name[name], by_name[name].structured_delegate
        if any(parsed.backend_indices[key].has_kernel(found) for key in keys):
            return True
        return delegate is not None and has_kernel(f"aten::{delegate}")

    return has_kernel


PAIRS, TOKENS, WIDTH, VOCAB = 4, 512, 64, 50_257
PACKED = torch.arange(0, PAIRS * TOKENS + 1, TOKENS)


def on_card(tensor: Tensor) -> Tensor:
    return tensor.to("cuda:0")


@dataclass(frozen=True)
class Way:
    """A way to call the loss, and what differs from the plain one.

    Attributes:
      options: arguments of the loss, tensors still on the CPU.
      dtype: of hidden states, weight and bias.
      autocast: the dtype of autocast, or None.
      shape: pairs and tokens of the batch.
      counts: whether labels count.
      loss: a `MarginLoss` or `PairLoss`.
      products: how often a trained head multiplies, in units of 2NDV.
    """

    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    autocast: torch.dtype | None = None
    shape: tuple[int, int] = (PAIRS, TOKENS)
    counts: bool = True
    loss: Any = field(default_factory=SPO)
    products: int = 3


WAYS = {
    "float16": Way(dtype=torch.float16),
    "float32": Way(dtype=torch.float32),
    "float64": Way(dtype=torch.float64),
    "autocast to bfloat16": Way(dtype=torch.float32, autocast=torch.bfloat16),
    "autocast to float16": Way(dtype=torch.float32, autocast=torch.float16),
    "soft-cap": Way({"softcap": 30.0, "logit_scale": 0.5, "temperature": 0.7}),
    "bias": Way({"bias": torch.zeros(VOCAB)}),
    "soft-cap and bias": Way({"softcap": 30.0, "bias": torch.zeros(VOCAB)}),
    "NLL": Way({"nll_weight": 0.5}),
    "average": Way({"average": True}),
    "weights": Way({"weights": torch.ones(PAIRS), "nll_weight": 0.5}),
    "a weight of 0": Way({"weights": 0.0}),
    "reward gaps": Way({"reward_gap": torch.ones(PAIRS)}),
    "sum": Way({"reduction": "sum"}),
    "none": Way({"reduction": "none"}, products=4),
    "small tiles": Way({"chunk_size": 500}),
    "packed, int32": Way({"cu_seqlens": PACKED.int()}, shape=(1, PAIRS * TOKENS)),
    "packed, int64": Way({"cu_seqlens": PACKED}, shape=(1, PAIRS * TOKENS)),
    "a long pair": Way({"nll_weight": 0.5}, shape=(1, 40_000)),
    "a loss of two log-ratios": Way(loss=APODown()),
    "a long pair of two log-ratios": Way(shape=(1, 40_000), loss=APODown()),
    "no labels": Way(counts=False),
    "no labels, float16": Way(dtype=torch.float16, counts=False),
    "no pairs": Way(shape=(0, TOKENS)),
}


@contextlib.contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """`torch.autocast("cuda")`, which a CPU build turns off."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", before)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_on_cuda(
    paper: Paper, has_kernel: Callable[[str], bool], way: str, *, frozen: bool
) -> None:
    """Fails on a mask, on a read beside the labels, and on tensors of the CPU in an operator.

    All labels are read before the first product, or a read would wait for the forward of a side.
    """
    how = WAYS[way]
    given = batch(*how.shape, WIDTH, VOCAB, frozen=frozen, dtype=how.dtype)
    if not how.counts:
        given |= {name: on_card(torch.full(how.shape, -100)) for name in given if "labels" in name}
    options = {
        name: on_card(value) if isinstance(value, Tensor) else value
        for name, value in how.options.items()
    }
    if "bias" in options:
        options["bias"] = options["bias"].to(how.dtype).requires_grad_(not frozen)
    paper.syncs.clear()
    with autocast(how.autocast):
        loss = flat_pair(how.loss, *given.values(), 0.0, 0.0, shift=False, **options).loss
    assert loss.dtype == torch.promote_types(how.dtype, torch.float32)
    backward(loss.sum())
    counted = how.counts * 2 * how.shape[0] * (how.shape[1] - how.shape[1] // 4)
    assert paper.syncs == [0]
    columns = 2 * WIDTH if frozen else how.products * WIDTH + ("bias" in options)
    assert paper.flops == 2 * columns * counted * VOCAB
    assert len(paper.operators) > 20
    assert not [op for op in paper.operators if not has_kernel(op.name())]
    leaves = [x for x in (*given.values(), options.get("bias")) if x is not None]
    for leaf in leaves:
        if leaf.requires_grad:
            assert (leaf.grad.dtype, leaf.grad.device) == (leaf.dtype, leaf.device)


@pytest.mark.parametrize("function", [spo, logps])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_without_gradients_there_is_one_product(
    paper: Paper, function: Callable[..., Tensor], *, requires_grad: bool
) -> None:
    """Under no_grad, and where nothing requires a gradient."""
    given = batch(8, 1024, 896, 151_936, frozen=not requires_grad)
    for name in ("chosen_hidden", "rejected_hidden"):
        given[name].requires_grad_(requires_grad)
    before = paper.forget()
    with torch.set_grad_enabled(not requires_grad):
        function(given)
    sides = 2 if function is spo else 1
    assert paper.syncs == [0]
    assert paper.flops == 2 * sides * 8 * 768 * 896 * 151_936
    assert (paper.peak - before) / GIB < 0.05


def test_the_peak_sees_all_logits(paper: Paper, monkeypatch: pytest.MonkeyPatch) -> None:
    original = _one_pass.OnePass

    def wasteful(head: Any, batch: Any, *others: Any) -> Any:
        extra = head.weight.new_empty(len(batch.table), len(head.weight))
        found = original(head, batch, *others)
        del extra
        return found

    monkeypatch.setattr(_fused, "OnePass", wasteful)
    with pytest.raises(AssertionError):
        test_one_pass_on_cuda(paper, "0.5B", 896, 151_936, frozen=False)
