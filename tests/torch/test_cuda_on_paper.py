"""The CUDA path at real sizes without a card: operators, synchronisations, memory and products.

Tensors on "cuda:0" have shapes and devices but no numbers (FakeTensor), so a head of a billion
weights costs nothing. Integers and booleans keep their numbers beside them on the CPU, because the
host reads the labels. A read is counted as a synchronisation. Tensors on the CPU are real.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary
from torchgen import gen
from torchgen.model import DispatchKey

from helpers.fused import flat_logps, flat_pair, flat_spo
from spoloss.torch import _autograd, _devices, _exponentials

TRIED = ("2.13",)
GIB = 2**30
aten = torch.ops.aten
PRODUCTS = {aten.mm: 0, aten.addmm: 1, aten.addmm_: 1}
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}


class Paper(TorchDispatchMode):
    """Runs operators on CUDA tensors by their shapes, and keeps count."""

    def __init__(self) -> None:
        super().__init__()
        self.fake, self.shadow = FakeTensorMode(), WeakIdKeyDictionary()
        self.syncs: list[int] = []  # the FLOPs before each, which the host waits for
        self.flops, self.live, self.peak = 0, 0, 0
        self.operators: Counter[Any] = Counter()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_card = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        device = torch.device(kwargs.get("device") or "cpu")
        if func.namespace == "prim" or not (on_card or device.type == "cuda"):
            return func(*args, **kwargs)
        to_host = func is aten._to_copy.default and kwargs.get("device") and device.type == "cpu"
        if to_host or func in READS:
            self.syncs.append(self.flops)
            return func(*map(self.numbers, args), **kwargs)
        if func in (aten.index.Tensor, aten.index_put_.default):
            assert all(i is None or i.dtype == torch.int64 for i in args[1]), (
                "a mask: nonzero waits"
            )
        if on_card:
            strangers = [t for t in tensors if not isinstance(t, FakeTensor) and t.ndim]
            assert not strangers, f"{func} mixes CUDA with {strangers}"
        with self.fake:
            found = func(*tree_map(self.lowered, args), **tree_map(self.lowered, kwargs))
        outputs = [leaf for leaf in tree_leaves(found) if isinstance(leaf, FakeTensor)]
        if not any(t.is_floating_point() for t in [*tensors, *outputs]):
            self.follow(func, args, kwargs, outputs)
        if func._overloadpacket in PRODUCTS:
            a = args[PRODUCTS[func._overloadpacket]]
            self.flops += 2 * a.numel() * outputs[0].shape[1]
        if not func.is_view:
            self.operators[func] += 1
        for output in outputs:
            self.track(output)
        return found

    def numbers(self, value: Any) -> Any:
        if isinstance(value, FakeTensor):
            assert value in self.shadow, f"the host reads numbers of {value}"
            return self.shadow[value]
        return value

    def lowered(self, value: Any) -> Any:
        real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
        return self.fake.from_tensor(value) if real else value

    def follow(self, func: Any, args: Any, kwargs: Any, outputs: list[FakeTensor]) -> None:
        """Compute integers and booleans on the CPU as well."""
        if all(t in self.shadow for t in tree_leaves((args, kwargs)) if isinstance(t, FakeTensor)):
            kwargs = kwargs | ({"device": "cpu"} if kwargs.get("device") else {})
            with _disable_current_modes():
                real = func(*tree_map(self.numbers, args), **tree_map(self.numbers, kwargs))
            self.shadow.update(zip(outputs, tree_leaves(real), strict=True))

    def track(self, tensor: FakeTensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.freed, storage._cdata)

    def freed(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def backward(root: Tensor) -> None:
    """`root.backward()`. The engine asks for a CUDA stream, which a CPU build does not have."""
    order: list[Any] = []

    def visit(node: Any) -> None:
        if node is not None and node not in order:
            for following, _ in node.next_functions:
                visit(following)
            order.append(node)

    visit(root.grad_fn)
    grads: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    grads[root.grad_fn][root.output_nr] = torch.ones_like(root)
    with torch.no_grad():
        while order:
            node = order.pop()
            got = grads.pop(node, {})
            if hasattr(node, "variable"):
                node.variable.grad = got.get(0)
                continue
            inputs = [got.get(index) for index in range(len(node._input_metadata))]
            del got
            found = (node.apply if isinstance(node, torch._C._FunctionBase) else node)(*inputs)
            del inputs
            found = found if isinstance(found, tuple) else (found,)
            for (following, index), grad in zip(node.next_functions, found, strict=False):
                if following is not None and grad is not None:
                    before = grads[following].get(index)
                    grads[following][index] = grad if before is None else before + grad
            del found


def exponentials(
    products: Tensor,
    transform: Any,  # noqa: ARG001
    column: Tensor,  # noqa: ARG001
    sums: _exponentials.Sums,
    dtype: torch.dtype,
) -> _exponentials.Exponentials:
    """What the compiled block allocates."""
    exps, shift = torch.empty_like(products, dtype=dtype), torch.empty_like(sums.peak)
    return _exponentials.Exponentials(exps, shift, sums_alone(products, None, None, sums))


def sums_alone(
    products: Tensor,  # noqa: ARG001
    transform: Any,  # noqa: ARG001
    column: Any,  # noqa: ARG001
    sums: _exponentials.Sums,
) -> _exponentials.Sums:
    """What the compiled sums allocate."""
    return _exponentials.Sums(*map(torch.empty_like, sums))


KERNELS = {_exponentials.exponentials: exponentials, _exponentials.sums_alone: sums_alone}


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Paper]:
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    if torch.backends.cuda.is_built() or not library.exists():
        pytest.skip("needs a CPU build of PyTorch on Linux")
    if not torch.__version__.startswith(TRIED):
        pytest.skip(f"uses a private symbol of PyTorch, and was tried on {', '.join(TRIED)} alone")
    # A CPU build has no guard for CUDA devices. The meta device's guard does nothing.
    registry = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * 22).in_dll(ctypes.CDLL(str(library)), registry)
    guards[1] = guards[14]
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=9))
    monkeypatch.setattr(_devices, "CUDA", _devices.CUDA._replace(compiles=True))
    monkeypatch.setattr(_exponentials, "compiled", KERNELS.__getitem__)
    monkeypatch.setattr(_autograd, "_last_use", lambda _: True)
    with Paper() as mode:
        yield mode
    guards[1] = None


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


LIMITS = {  # GiB beside the inputs, gradients included; operators
    ("0.5B", False): (2.0, 850),
    ("0.5B", True): (1.0, 500),
    ("7B", False): (3.5, 750),
    ("7B", True): (1.3, 450),
    ("Gemma", False): (3.6, 1400),
    ("Gemma", True): (1.2, 650),
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
    before, paper.peak = paper.live, paper.live
    paper.operators.clear()
    backward(spo(given, **({"softcap": 30.0} if model == "Gemma" else {})))
    counted = 2 * pairs * (tokens - tokens // 4)
    assert paper.syncs == [0]
    assert paper.flops == (4 if frozen else 6) * counted * width * vocab
    most, operators = LIMITS[model, frozen]
    assert (paper.peak - before) / GIB < most
    assert paper.operators.total() < operators
    for name in ("chosen_hidden", "rejected_hidden", *([] if frozen else ["weight"])):
        assert given[name].grad.dtype == torch.bfloat16
        assert given[name].grad.device.type == "cuda"


def test_log_probabilities_on_cuda(paper: Paper) -> None:
    given = batch(8, 1024, 896, 151_936, frozen=False)
    before, paper.peak = paper.live, paper.live
    backward(logps(given).sum())
    assert paper.syncs == [0]
    assert paper.flops == 8 * 8 * 768 * 896 * 151_936
    assert (paper.peak - before) / GIB < 2.0


def test_labels_are_read_before_the_first_product(paper: Paper) -> None:
    """Or the second read waits for the whole forward of the chosen side."""
    given = batch(8, 1024, 896, 151_936, frozen=False)
    backward(spo(given, reduction="none").sum())
    assert paper.syncs == [0]
    assert paper.flops == 8 * 2 * 8 * 768 * 896 * 151_936


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


class Apart:
    """A loss of the two log-ratios: each has a slope of its own."""

    def value(self, chosen: Tensor, rejected: Tensor, beta: Any) -> Tensor:
        return F.softplus(-beta * chosen) + F.softplus(beta * rejected)

    def slopes(self, chosen: Tensor, rejected: Tensor, beta: Any) -> tuple[Tensor, Tensor]:
        return -beta * torch.sigmoid(-beta * chosen), beta * torch.sigmoid(beta * rejected)


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
      loss: a `PairLoss`, or None for SPO.
      products: how often a trained head multiplies, in units of 2NDV.
    """

    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    autocast: torch.dtype | None = None
    shape: tuple[int, int] = (PAIRS, TOKENS)
    counts: bool = True
    loss: Any = None
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
    "a loss of two log-ratios": Way(loss=Apart()),
    "a long pair of two log-ratios": Way(shape=(1, 40_000), loss=Apart()),
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
    """Fails on a mask, on a read beside the labels, and on tensors of the CPU in an operator."""
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
    call = flat_spo if how.loss is None else functools.partial(flat_pair, how.loss)
    paper.syncs.clear()
    with autocast(how.autocast):
        loss = call(*given.values(), 0.0, 0.0, shift=False, **options).loss
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
    before, paper.peak = paper.live, paper.live
    with torch.set_grad_enabled(not requires_grad):
        function(given)
    sides = 2 if function is spo else 1
    assert paper.syncs == [0]
    assert paper.flops == 2 * sides * 8 * 768 * 896 * 151_936
    assert (paper.peak - before) / GIB < 1.1


# What the check catches.


def mutants() -> dict[str, Callable[[pytest.MonkeyPatch], None]]:
    from spoloss.torch import _fused, _gradients, _head, _one_pass, _softmax

    def item(patch: pytest.MonkeyPatch) -> None:
        original = _softmax.softmax_of

        def reads(*args: Any, **options: Any) -> Any:
            found = original(*args, **options)
            found.logps.sum().item()
            return found

        patch.setattr(_one_pass, "softmax_of", reads)

    def item_of_integers(patch: pytest.MonkeyPatch) -> None:
        original = _gradients.add_rows

        def reads(total: Tensor, index: Tensor, rows: Tensor) -> None:
            assert index.max().item() < len(total)
            original(total, index, rows)

        patch.setattr(_gradients, "add_rows", reads)

    def whole_logits(patch: pytest.MonkeyPatch) -> None:
        original = _one_pass.one_pass

        def wasteful(head: Any, batch: Any, *others: Any) -> Any:
            extra = head.weight.new_empty(len(batch.table), len(head.weight))
            found = original(head, batch, *others)
            del extra
            return found

        patch.setattr(_fused, "one_pass", wasteful)

    def mask(patch: pytest.MonkeyPatch) -> None:
        original = _gradients.add_rows

        def masked(total: Tensor, index: Tensor, rows: Tensor) -> None:
            keep = index >= 0
            original(total, index[keep], rows[keep])

        patch.setattr(_gradients, "add_rows", masked)

    def on_the_host(patch: pytest.MonkeyPatch) -> None:
        original = _gradients.add_rows

        def mixed(total: Tensor, index: Tensor, rows: Tensor) -> None:
            original(total, index, rows * torch.ones(len(rows), 1))

        patch.setattr(_gradients, "add_rows", mixed)

    def twice(patch: pytest.MonkeyPatch) -> None:
        original = _head.product

        def again(*args: Any) -> Tensor:
            original(*args)
            return original(*args)

        patch.setattr(_head, "product", again)

    return {f.__name__: f for f in (item, item_of_integers, whole_logits, mask, on_the_host, twice)}


@pytest.mark.parametrize("mutant", mutants())
def test_the_check_catches(mutant: str, paper: Paper, monkeypatch: pytest.MonkeyPatch) -> None:
    mutants()[mutant](monkeypatch)
    with pytest.raises(AssertionError):
        test_one_pass_on_cuda(paper, "0.5B", 896, 151_936, frozen=False)
