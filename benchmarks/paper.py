"""A CUDA card on paper: the real path at real sizes, counted operator by operator.

Tensors on "cuda:0" have shapes and devices but no numbers (FakeTensor), so a head of a billion
weights costs nothing. Integers and booleans keep their numbers beside them on the CPU, because the
host reads the labels. Each read is counted as a synchronisation. Tensors on the CPU are real.

    with on_paper(H200) as paper:
        backward(loss_on("cuda:0"))
    paper.flops, paper.peak, paper.syncs, paper.kernels
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from spoloss.torch import _autograd, _devices, _exponentials

GIB = 2**30
TRIED = ("2.13",)
"""The versions of PyTorch whose private symbols this was tried with."""

aten = torch.ops.aten
PRODUCTS = {aten.mm: 0, aten.addmm: 1, aten.addmm_: 1}
"""Each product, and which argument its left factor is."""
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}

# What an operator reads, if not its tensors once each.
UNTOUCHED = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten._unsafe_view}
ONLY_WRITE = {
    *(aten.zeros, aten.zeros_like, aten.new_zeros, aten.zero_, aten.ones, aten.ones_like),
    *(aten.new_ones, aten.full, aten.full_like, aten.new_full, aten.fill_, aten.arange),
    *(aten.scalar_tensor, aten.nll_loss_backward),
}
GATHERS = {aten.index, aten.gather, aten.index_select, aten.nll_loss_forward}
SCATTERS = {aten.index_put, aten.index_put_, aten.scatter_add_, aten.scatter_, aten.index_add_}


class Card(NamedTuple):
    """What a program can ask about a card.

    Attributes:
      major: the major compute capability.
      total_memory: bytes.
    """

    major: int
    total_memory: int


H100, H200 = Card(9, 80 * GIB), Card(9, 141 * GIB)


class Kernel(NamedTuple):
    """One launch.

    Attributes:
      name: of the operator.
      flops: of a matrix product, else 0.
      bytes: read and written, 0 for a product, whose traffic overlaps with its arithmetic.
    """

    name: str
    flops: int
    bytes: int


class Paper(TorchDispatchMode):
    """Runs operators on CUDA tensors by their shapes, and keeps count.

    Attributes:
      syncs: the FLOPs before each read by the host, which waits for them.
      flops: of matrix products.
      live: bytes of all CUDA tensors now.
      peak: the most bytes so far.
      operators: how often each operator was called, without views.
      kernels: the launches in order.
    """

    def __init__(self) -> None:
        """Nothing has run."""
        super().__init__()
        self.syncs: list[int] = []
        self.flops, self.live, self.peak = 0, 0, 0
        self.operators: Counter[Any] = Counter()
        self.kernels: list[Kernel] = []
        self._fake, self._shadow = FakeTensorMode(), WeakIdKeyDictionary()
        self._sizes: dict[int, int] = {}

    def forget(self) -> int:
        """Count from here on; memory stays. Returns the bytes that are live."""
        self.syncs.clear()
        self.operators.clear()
        self.kernels.clear()
        self.flops, self.peak = 0, self.live
        return self.live

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
            return func(*map(self._numbers, args), **kwargs)
        if func in INDEXED:
            args = (args[0], self._without_masks(args[1]), *args[2:])
        strangers = [t for t in tensors if not isinstance(t, FakeTensor) and t.ndim]
        assert not (on_card and strangers), f"{func} mixes CUDA with {strangers}"
        with self._fake:
            found = func(*tree_map(self._lowered, args), **tree_map(self._lowered, kwargs))
        outputs = [leaf for leaf in tree_leaves(found) if isinstance(leaf, FakeTensor)]
        self._follow(func, args, kwargs, outputs)
        if not func.is_view:
            self.operators[func] += 1
            self._count(func, args, outputs)
        for output in outputs:
            self._track(output)
        return found

    # ------------------------------------------------------------- numbers that the host may read

    def _numbers(self, value: Any) -> Any:
        if isinstance(value, FakeTensor):
            assert value in self._shadow, f"the host reads numbers of {value}"
            return self._shadow[value]
        return value

    def _lowered(self, value: Any) -> Any:
        real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
        return self._fake.from_tensor(value) if real else value

    def _without_masks(self, indices: Any) -> list[Any]:
        """Indices with each mask as its positions, for which the host waits."""
        found: list[Any] = []
        for index in indices:
            if index is None or index.dtype != torch.bool:
                found.append(index)
                continue
            self.syncs.append(self.flops)
            with _disable_current_modes():
                places = self._numbers(index).nonzero(as_tuple=True)
            with self:
                found += [place.to(index.device) for place in places]
        return found

    def _follow(self, func: Any, args: Any, kwargs: Any, outputs: list[FakeTensor]) -> None:
        """Compute integers, booleans and single numbers on the CPU as well, if all are known."""
        fakes = [t for t in tree_leaves((args, kwargs)) if isinstance(t, FakeTensor)]
        small = all(not t.is_floating_point() or t.ndim == 0 for t in [*fakes, *outputs])
        if small and all(t in self._shadow for t in fakes):
            kwargs = kwargs | ({"device": "cpu"} if kwargs.get("device") else {})
            with _disable_current_modes():
                real = func(*tree_map(self._numbers, args), **tree_map(self._numbers, kwargs))
            self._shadow.update(zip(outputs, tree_leaves(real), strict=True))
        else:
            for output in outputs:
                self._shadow.pop(output, None)

    # ------------------------------------------------------------------------------- what it costs

    def launch(self, name: str, *, flops: int = 0, traffic: int = 0) -> None:
        """Count one kernel."""
        self.kernels.append(Kernel(name, flops, traffic))

    def _count(self, func: Any, args: Any, outputs: list[FakeTensor]) -> None:
        packet = func._overloadpacket
        if packet in PRODUCTS:
            flops = 2 * args[PRODUCTS[packet]].numel() * outputs[0].shape[1]
            self.flops += flops
            self.launch(str(packet), flops=flops)
        elif packet is aten.bmm:
            flops = 2 * args[0].numel() * outputs[0].shape[2]
            self.flops += flops
            self.launch(str(packet), flops=flops)
        elif packet not in UNTOUCHED and any(output.numel() for output in outputs):
            self.launch(str(packet), traffic=_traffic(packet, args, outputs))

    def _track(self, tensor: FakeTensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    # ------------------------------------------------------------------------ the compiled kernels

    def exponentials(
        self, products: _exponentials.Products, sums: _exponentials.Sums, dtype: torch.dtype
    ) -> _exponentials.Exponentials:
        """The compiled block: two reads and one write, as in the code that Inductor writes."""
        exps = torch.empty_like(products.values, dtype=dtype)
        self.launch("exponentials", traffic=2 * _bytes(products.values) + _bytes(exps))
        shift, earlier = torch.empty_like(sums.peak), torch.empty_like(sums.peak)
        found = _exponentials.Sums(*map(torch.empty_like, sums))
        return _exponentials.Exponentials(exps, shift, earlier, found)

    def sums_alone(
        self, products: _exponentials.Products, sums: _exponentials.Sums
    ) -> _exponentials.Sums:
        """The compiled sums: one read."""
        self.launch("sums_alone", traffic=_bytes(products.values))
        return _exponentials.Sums(*map(torch.empty_like, sums))

    def compiled(self, function: Any) -> Any:
        """What stands in for `_exponentials.compiled`."""
        return {
            _exponentials.exponentials: self.exponentials,
            _exponentials.sums_alone: self.sums_alone,
        }[function]


def _bytes(tensor: Tensor) -> int:
    """The bytes of a tensor; a dimension that is expanded is read once."""
    strided = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return tensor.element_size() * torch.Size(strided).numel() if tensor.numel() else 0


def _traffic(packet: Any, args: Any, outputs: list[FakeTensor]) -> int:
    """The bytes that an operator reads and writes: each tensor once, whatever its kernel does."""
    written = sum(map(_bytes, outputs))
    if packet in ONLY_WRITE:
        return written
    if packet is aten.copy_:
        return written + _bytes(args[1])
    inputs = [leaf for leaf in tree_leaves(args) if isinstance(leaf, FakeTensor)]
    if packet in GATHERS:  # as many numbers as come out
        return 2 * written + sum(_bytes(t) for t in inputs[1:] if not t.is_floating_point())
    if packet in SCATTERS:  # the target's rows are read, unless they are overwritten, and written
        accumulates = packet not in (aten.index_put, aten.index_put_) or args[3:4] == (True,)
        return sum(map(_bytes, inputs[1:])) + (1 + accumulates) * _bytes(inputs[-1])
    return written + sum(_bytes(tensor) for tensor in {id(t): t for t in inputs}.values())


# ---------------------------------------------------------------------------- autograd and patches


def backward(root: Tensor) -> None:
    """`root.backward()`. The engine needs a CUDA stream, which a CPU build does not have."""
    order: list[Any] = []

    def visit(node: Any) -> None:
        if node is not None and node not in order:
            for following, _ in node.next_functions:
                visit(following)
            order.append(node)

    visit(root.grad_fn)
    grads: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    grads[root.grad_fn][root.output_nr] = torch.ones((), dtype=root.dtype, device=root.device)
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


def refusal() -> str | None:
    """Why nothing can run on paper here, or None."""
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    if torch.backends.cuda.is_built() or not library.exists() or sys.platform != "linux":
        return "needs a CPU build of PyTorch on Linux"
    if not torch.__version__.startswith(TRIED):
        return f"uses a private symbol of PyTorch, and was tried on {', '.join(TRIED)} alone"
    return None


@contextlib.contextmanager
def on_paper(card: Card = H200) -> Iterator[Paper]:
    """Tensors on "cuda:0" are on this card, inside of the block; `backward` takes gradients."""
    # A CPU build has no guard for CUDA devices. The meta device's guard does nothing.
    registry = "_ZN3c104impl26device_guard_impl_registryE"
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 22).in_dll(library, registry)
    guards[1] = guards[14]
    paper = Paper()
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch("torch.cuda._lazy_init"),
            mock.patch("torch.cuda.get_device_properties", return_value=card),
            mock.patch.object(torch.Tensor, "backward", backward),
            mock.patch.object(_devices, "CUDA", _devices.CUDA._replace(compiles=True)),
            mock.patch.object(_exponentials, "compiled", paper.compiled),
            mock.patch.object(_autograd, "_last_use", return_value=True),
        ):
            stack.enter_context(patch)
        stack.callback(guards.__setitem__, 1, None)
        yield stack.enter_context(paper)
