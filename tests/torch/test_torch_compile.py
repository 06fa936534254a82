"""torch.compile: how many graphs serve a training run, the operators, CUDA graphs, autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import spoloss
from helpers.fused import flat_dpo, flat_logps, flat_spo
from helpers.wings import D, P, V
from spoloss.torch import _exponentials, _operator, sequence_logps

# Dynamo instantiates any autograd.Function and so warns of itself (torch 2.13).
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

GENERATOR = torch.Generator().manual_seed(0)
LOGPS = torch.randn(4, 3, generator=GENERATOR, dtype=torch.float64)
HIDDEN = [torch.randn(2, 5, 8, generator=GENERATOR, requires_grad=True) for _ in range(2)]
WEIGHT = torch.randn(30, 8, generator=GENERATOR, requires_grad=True)
LABELS = torch.randint(0, 30, (2, 2, 5), generator=GENERATOR)


def counted(
    function: Callable[..., Tensor], backend: str, **options: Any
) -> tuple[Callable[..., Tensor], CompileCounterWithBackend]:
    """The function as one graph, and the count of graphs that are made for its calls."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def check_gradients(got: Tensor, want: Tensor, leaves: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(got, want)
    grads = (torch.autograd.grad(x, leaves, allow_unused=True) for x in (got, want))
    torch.testing.assert_close(*grads)


def core(function: Callable[..., Any], **numbers: float) -> Tensor:
    result = function(*LOGPS, **{"beta": 0.1, **numbers})
    if isinstance(result, dict):
        return torch.stack(list(result.values()))
    return result if isinstance(result, Tensor) else result[0]


def fused(function: Callable[..., Any], **numbers: float) -> Tensor:
    return function(*HIDDEN, WEIGHT, *LABELS, 0.0, 0.0, **{"beta": 0.01, **numbers}).loss


def head(function: Callable[..., Any], **numbers: float) -> Tensor:
    return function(HIDDEN[0], WEIGHT, LABELS[0], **numbers).sum()


OF_THE_HEAD = ["softcap", "logit_scale", "temperature"]
NUMBERS: list[tuple[Callable[..., Tensor], Callable[..., Any], list[str]]] = [
    (core, spoloss.spo_loss, ["beta", "weights", "reward_gap", "linear_below"]),
    (core, spoloss.spo_grad, ["beta", "weights", "reward_gap", "linear_below"]),
    (core, spoloss.dpo_grad, ["beta", "label_smoothing"]),
    (core, spoloss.squared_loss, ["beta", "reward_gap"]),
    (core, spoloss.preference_metrics, ["beta", "weights"]),
    (head, flat_logps, OF_THE_HEAD),
    (fused, flat_dpo, ["beta", "label_smoothing"]),
    (fused, flat_spo, ["weights", "reward_gap", "linear_below", "nll_weight", *OF_THE_HEAD]),
]


@pytest.mark.parametrize(("call", "function", "names"), NUMBERS)
def test_two_graphs_serve_any_number_of_values(
    call: Callable[..., Tensor], function: Callable[..., Any], names: list[str]
) -> None:
    """A schedule changes beta, weights or the temperature in each step."""
    step = lambda *values: call(function, **dict(zip(names, values, strict=True)))  # noqa: E731
    # The backend "eager" keeps numbers that the others turn into constants.
    compiled, counter = counted(step, "aot_eager")
    for value in (0.1, 0.2, 0.3):
        # Numbers that are equal in one step would be one number in the graph.
        values = [value + 0.01 * i for i in range(len(names))]
        if call is core:
            torch.testing.assert_close(compiled(*values), step(*values))
        else:
            check_gradients(compiled(*values), step(*values), (*HIDDEN, WEIGHT))
    assert counter.frame_count == 2


def by_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    sides = zip(hidden, labels, strict=True)
    logps = (sequence_logps(states @ weight.t(), targets) for states, targets in sides)
    return spoloss.spo_loss(*logps, 0.0, 0.0, beta=0.1)


def by_fused_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return flat_spo(*hidden, weight, *labels, 0.0, 0.0, nll_weight=0.1).loss


@pytest.mark.parametrize("function", [by_logits, by_fused_head])
@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.extended)])
def test_two_graphs_serve_any_number_of_lengths(
    function: Callable[..., Tensor], *, dynamic: bool | None
) -> None:
    compiled, counter = counted(function, "eager", dynamic=dynamic)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64, requires_grad=True)
    for length in range(5, 16):
        hidden = torch.randn(2, P, length, D, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, V, (2, P, length), generator=generator)
        labels[:, 1, :3] = -100
        arguments = (hidden.requires_grad_(), weight, labels)
        check_gradients(compiled(*arguments), function(*arguments), (hidden, weight))
    assert counter.frame_count <= 2


@pytest.mark.extended
def test_inductor_compiles_the_fused_head() -> None:
    torch.compiler.reset()
    step = lambda hidden, weight: by_fused_head(hidden.tanh(), weight, LABELS)  # noqa: E731
    numbers = (torch.stack(HIDDEN), WEIGHT)
    leaves = tuple(each.detach().double().requires_grad_() for each in numbers)
    compiled = torch.compile(step, fullgraph=True)
    check_gradients(compiled(*leaves), step(*leaves), leaves)


@pytest.mark.extended
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_compiled_block_is_the_eager_one(dtype: torch.dtype) -> None:
    """What CUDA runs as one fused pass, compiled for the CPU here, two blocks of 300 entries."""
    single = torch.promote_types(dtype, torch.float32)
    block, sums_of = (
        torch.compile(function, dynamic=True)
        for function in (_exponentials.exponentials, _exponentials.sums_alone)
    )
    generator = torch.Generator().manual_seed(3)
    # Exponents reach 40, where half an ulp is 16 eps, and each way rounds up to two of them.
    close = {"rtol": 64.0 * torch.finfo(single).eps, "atol": 0.0}
    for rows, softcap in ((1, None), (5, None), (5, 20.0)):
        products = torch.randn(rows, 300, dtype=single, generator=generator) * 5
        targets = torch.randint(0, 300, (rows,), generator=generator)
        whole = _exponentials.Transform(torch.zeros(300, dtype=single), softcap, 1.0, 1.25)
        logits, bend = whole(products)
        bend = torch.ones_like(logits) if bend is None else bend
        want = logits.softmax(dim=1).scatter_(1, targets[:, None], 0.0)
        lse, found = logits.logsumexp(dim=1), []
        mine = eager = alone = _exponentials.Sums.start(products, single)
        for begin, end in ((0, 170), (170, 300)):
            transform = whole._replace(bias=whole.bias[begin:end])
            part = _exponentials.Products(products[:, begin:end], transform, targets, end)
            exps, shift, _, mine = block(part, mine, dtype)
            assert exps.dtype == dtype
            assert exps.max() <= (2**14 if dtype == torch.float16 else 1)
            found.append(exps * (shift - lse).exp()[:, None])
            copy = part._replace(values=part.values.clone())
            exps, _, _, eager = _exponentials.exponentials_(copy, eager, single)
            normal = exps * (eager.peak - lse).exp()[:, None]
            expected = (want * bend)[:, begin:end]
            torch.testing.assert_close(normal, expected, **close)
            alone = sums_of(part, alone)
        ends = 2e-12 if dtype == torch.float16 else 0.0
        rounded = {"rtol": max(close["rtol"], 20.0 * torch.finfo(dtype).eps), "atol": ends}
        torch.testing.assert_close(torch.cat(found, dim=1), want * bend, **rounded)
        for sums in (mine, eager, alone):
            exps = sums.others * (sums.peak - lse).exp()
            torch.testing.assert_close(exps, want.sum(dim=1), **close)
            torch.testing.assert_close(sums.target, logits.gather(1, targets[:, None])[:, 0])


def strided(name: str, tensor: Tensor) -> Tensor:
    """The same numbers, stored in another order or with gaps."""
    other = {
        "contiguous": lambda: tensor,
        "transposed": lambda: tensor.mT.contiguous().mT,
        "gaps": lambda: torch.stack([tensor, tensor], dim=-1)[..., 0],
    }[name]()
    return other.detach().requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("strides", ["contiguous", "transposed", "gaps"])
def test_the_operators_are_what_the_compiler_assumes(
    strides: str, softcap: float, *, frozen: bool
) -> None:
    hidden, weight = strided(strides, HIDDEN[0]), strided(strides, WEIGHT)
    weight.requires_grad_(not frozen)
    bias = torch.stack([WEIGHT[:, 0], WEIGHT[:, 1]], dim=1)[:, 1].detach()
    bias.requires_grad_(not frozen)
    numbers = torch.tensor([softcap, 0.5, 2.0], dtype=torch.float64)
    inputs = (hidden, weight, bias, strided(strides, LABELS[0]), None, None, numbers)
    others = ("completions", -100, None, None)
    torch.library.opcheck(_operator._forward_operator, (*inputs, *others, frozen))
    if frozen:
        rows = torch.ones(hidden.numel() // 8, 8)
        upstream = strided(strides, torch.ones(hidden.shape[:2]))
        torch.library.opcheck(_operator._scale_operator, (rows, upstream, torch.float16))
        return
    logps, lse, _ = _operator._forward_operator(*inputs, *others, False)
    found = (logps.detach(), lse, torch.ones_like(logps))
    for wanted in ([True, True, True], [False, True, False]):
        arguments = (wanted, *found, *inputs, *others)
        with torch.no_grad():  # it is a gradient, which has none itself
            torch.library.opcheck(
                _operator._backward_operator,
                [x.detach() if isinstance(x, Tensor) else x for x in arguments],
            )


@pytest.mark.parametrize("frozen", [False, True])
def test_a_second_derivative_is_an_error_in_a_graph_too(*, frozen: bool) -> None:
    hidden, weight = HIDDEN[0].detach().requires_grad_(), WEIGHT.detach()
    weight.requires_grad_(not frozen)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda states: flat_logps(states, weight, LABELS[0]).square().sum(), backend="eager"
    )
    (grad,) = torch.autograd.grad(compiled(hidden), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(grad.sum(), hidden)


def test_cuda_graphs_leave_the_operators_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators read labels on the host. Inductor takes this machine for a GPU."""
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this version of PyTorch has no tag for operators outside of CUDA graphs")
    from torch._inductor import config, scheduler
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setattr(scheduler.BaseSchedulerNode, "is_gpu", lambda node: True)  # noqa: ARG005
    torch.compiler.reset()
    options = {"triton.cudagraphs": True, "graph_partition": True}
    compiled = torch.compile(
        lambda hidden: flat_logps(2 * hidden, WEIGHT, LABELS[0]).exp(), options=options
    )
    with config.patch(fx_graph_cache=False):  # another machine's partition may be there
        _, codes = run_and_get_code(lambda: compiled(HIDDEN[0]).sum().backward())
    for operator, code in zip(("token_logps", "token_logps_backward"), codes, strict=True):
        inside, outside = code.split("def call(")
        call = f"torch.ops.spoloss.{operator}.default("
        assert "def partition_0(" in inside
        assert call not in inside
        assert call in outside


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("trained", [True, False])
def test_compiled_autograd_over_the_eager_loss(*, trained: bool) -> None:
    """Two steps: the second uses what was compiled for the first.

    The filter: Dynamo looks at the gradient of every tensor of a frame, and so warns of itself.
    """
    labels = LABELS  # no global of the compiled frame

    @torch.compiler.disable
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        of_pairs = flat_spo(hidden, hidden, weight, *labels, 0.0, 0.0, beta=0.01).loss
        return of_pairs + flat_logps(hidden, weight, labels[0]).mean()

    def gradients(step: Callable[..., None], factor: float) -> list[Tensor | None]:
        leaves = (HIDDEN[0].detach() * factor, WEIGHT.detach() + factor)
        leaves[0].requires_grad_()
        leaves[1].requires_grad_(trained)
        step(*leaves)
        return [leaf.grad for leaf in leaves]

    def step(hidden: Tensor, weight: Tensor) -> None:
        loss(hidden * 1.0, weight).backward()

    torch.compiler.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        compiled = torch.compile(step, backend="aot_eager")
        found = [gradients(compiled, factor) for factor in (1.0, 2.0)]
    wanted = [gradients(step, factor) for factor in (1.0, 2.0)]
    torch.testing.assert_close(found, wanted)
