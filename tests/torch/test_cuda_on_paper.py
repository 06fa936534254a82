"""The CUDA path at real sizes without a card: operators, synchronisations, memory and products.

Tensors on "cuda:0" have shapes and devices but no numbers (FakeTensor), so a head of a billion
weights costs nothing. Integers and booleans keep their numbers beside them on the CPU, because the
host reads the labels. A read is counted as a synchronisation. Tensors on the CPU are real.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from helpers.fused import flat_logps, flat_spo
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


def batch(pairs: int, tokens: int, width: int, vocab: int, *, frozen: bool) -> dict[str, Any]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="cuda:0")

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
    ("0.5B", False): (2.2, 900),
    ("0.5B", True): (1.1, 500),
    ("7B", False): (3.8, 800),
    ("7B", True): (1.4, 650),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("model", "width", "vocab"), [("0.5B", 896, 151_936), ("7B", 4096, 128_256)]
)
def test_one_pass_on_cuda(
    paper: Paper, model: str, width: int, vocab: int, *, frozen: bool
) -> None:
    pairs, tokens = 8, 1024
    given = batch(pairs, tokens, width, vocab, frozen=frozen)
    before, paper.peak = paper.live, paper.live
    paper.operators.clear()
    backward(spo(given))
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


def test_every_operator_has_a_cuda_kernel(paper: Paper) -> None:
    gen = pytest.importorskip("torchgen.gen")
    from torchgen.model import DispatchKey

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

    given = batch(2, 64, 64, 50_257, frozen=False)
    for dtype_ways in ({}, {"softcap": 30.0, "nll_weight": 0.5, "chunk_size": 32}):
        backward(spo(given, **dtype_ways))
        given["chosen_hidden"].grad = given["rejected_hidden"].grad = given["weight"].grad = None
    assert len(paper.operators) > 40
    assert not [op for op in paper.operators if not has_kernel(op.name())]


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
