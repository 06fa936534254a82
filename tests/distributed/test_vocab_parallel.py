"""A head split over the vocabulary against the whole head, and DDP, on three processes.

The processes are started once and run everything; the tests read what each rank found.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from helpers import processes, steps
from helpers.fused import ALL, INPUTS, Case, cut_blocks
from helpers.steps import Exact
from spoloss import SPO
from spoloss.torch import _vocab_parallel, linear_logps

WORLD = 3
SIZES = {3: (5, 5, 3), 2: (1, 12)}  # rows of V = 13 by rank, in a group of 3 and one of 2
FROZEN_HEAD = (True, True, False, False)
NEEDS = {"all": ALL, "frozen head": FROZEN_HEAD, "frozen hidden": (False, False, True, False)}
OPTIONS: dict[str, dict[str, Any]] = {
    "a row at a time": {"chunk_size": 1},
    "pairs longer than a tile": {"chunk_size": 3},
    "one tile": {"chunk_size": 10_000},
    "no shift": {"shift": False, "chunk_size": 3},
    "averages and NLL": {"average": True, "nll_weight": 0.7, "chunk_size": 5},
    "sum": {"reduction": "sum"},
    "a loss per pair": {"reduction": "none"},
    "softcap": {"softcap": 2.0, "logit_scale": 0.5, "temperature": 1.7, "chunk_size": 4},
}
OFFSETS = torch.tensor([0, 4, 4, 11, 35])


# ------------------------------------------------------------------------------- on each process


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


def mine(tensor: Tensor, group: Any) -> Tensor:
    """This rank's rows of a whole weight or bias."""
    return tensor.detach().split(SIZES[group.size()])[group.rank()].clone()


def split(case: Case, group: Any) -> Case:
    for name in ("weight", "bias"):
        tensor = case.tensors[name]
        case.tensors[name] = mine(tensor, group).requires_grad_(tensor.requires_grad)
    return case


def named_grads(case: Case, loss: Tensor) -> dict[str, Tensor]:
    wanted = [name for name in INPUTS if case.tensors[name].requires_grad]
    return dict(zip(wanted, case.grads(loss), strict=True))


def error(group: Any, need: tuple[bool, ...] = FROZEN_HEAD, **options: Any) -> float:
    """The largest relative error of loss and gradients on this rank."""
    whole, part = Case(need), split(Case(need), group)
    expected = whole.fused(SPO(), **options).loss
    found = part.fused(SPO(), **options, vocab_parallel_group=group).loss
    values = [relative(found.detach(), expected.detach())]
    grads = named_grads(part, found)
    for name, grad in named_grads(whole, expected).items():
        own = grad if "hidden" in name else mine(grad, group)
        values.append(relative(grads[name], own))
    return float(torch.tensor(values).max())  # nan stays nan


def all_ways(group: Any) -> dict[str, float]:
    return {
        f"{need}, {name}": error(group, NEEDS[need], **options)
        for need in NEEDS
        for name, options in OPTIONS.items()
    }


def wrong_ways(group: Any) -> dict[str, float]:
    right = _vocab_parallel.VocabShard
    found = {}

    class HiddenUnsummed(right):
        def sum_(self, partial: Tensor) -> None:
            if partial.ndim == 1:
                super().sum_(partial)

    class FromZero(right):
        def __init__(self, group: Any, start: int, *sizes: int) -> None:
            super().__init__(group, 0 * start, *sizes)

    class OwnShift(right):
        def join_sums(self, shift: Tensor, others: Tensor, target: Tensor) -> Any:
            return super().join_sums(shift - dist.get_rank(), others, target)

    for wrong in (HiddenUnsummed, FromZero, OwnShift):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_vocab_parallel, "VocabShard", wrong)
            found[wrong.__name__] = error(group)
    return found


def logps_error(group: Any, *, dtype: torch.dtype = torch.float64, **options: Any) -> float:
    """The largest error of log-probabilities against those of the whole head."""
    case = Case(dtype=dtype)
    hidden, weight, labels = case.tensors["chosen_hidden"], case.tensors["weight"], case.labels[0]
    if "cu_seqlens" in options:
        hidden, labels = hidden.reshape(1, -1, hidden.shape[2]), labels.reshape(1, -1)
    with torch.no_grad():
        part = mine(weight, group)
        found = linear_logps(hidden, part, labels, vocab_parallel_group=group, **options)
        expected = linear_logps(hidden.double(), weight.double(), labels, **options)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    return float((found - expected).abs().max())


def half_precision(group: Any) -> dict[str, tuple[float, float]]:
    """By gradient its error in bfloat16 against float64, and that of the whole head."""
    half, part, exact = (Case(dtype=torch.bfloat16) for _ in range(3))
    for name, tensor in exact.tensors.items():
        exact.tensors[name] = tensor.detach().double().requires_grad_()
    options: dict[str, Any] = {"beta": 0.2, "weights": None}
    truth, whole = (named_grads(c, c.fused(SPO(), **options).loss) for c in (exact, half))
    split(part, group)
    found = named_grads(part, part.fused(SPO(), **options, vocab_parallel_group=group).loss)
    errors = {}
    for name, grad in truth.items():
        cut = (lambda g: g) if "hidden" in name else (lambda g: mine(g, group))
        errors[name] = (
            relative(found[name].double(), cut(grad)),
            relative(cut(whole[name]).double(), cut(grad)),
        )
    return errors


def dtensor_error() -> float:
    """The gradient of a DTensor, from `to_local()`."""
    case = Case(NEEDS["frozen hidden"])
    hidden, weight, labels = case.tensors["chosen_hidden"], case.tensors["weight"], case.labels[0]
    linear_logps(hidden, weight, labels).sum().backward()
    mesh = init_device_mesh("cpu", (WORLD,))
    sharded = distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_()
    group = mesh.get_group()
    linear_logps(hidden, sharded.to_local(), labels, vocab_parallel_group=group).sum().backward()
    return relative(sharded.grad.redistribute(mesh, [Replicate()]).to_local(), weight.grad)


def refusals(group: Any) -> dict[str, str]:
    rank, case = dist.get_rank(), Case()
    hidden, labels = case.tensors["chosen_hidden"].detach(), case.labels[0]
    whole = case.tensors["weight"].detach()
    weight = mine(whole, group)
    beyond = labels.clone()
    beyond[4, 4] = 13
    split_group = {"vocab_parallel_group": group}
    sharded = distribute_tensor(whole, init_device_mesh("cpu", (WORLD,)), [Shard(0)])

    def logps(hidden: Tensor, weight: Any, labels: Tensor, **options: Any) -> Tensor:
        return linear_logps(hidden, weight, labels, **{**split_group, **options})

    calls: dict[str, Any] = {
        "sizes": lambda: logps(hidden, weight, beyond),
        "empty": lambda: logps(hidden, weight[: len(weight) * min(rank, 1)], labels),
        "labels": lambda: logps(hidden, weight, (labels + rank).remainder(13)),
        "tokens": lambda: logps(hidden[:, rank:], weight, labels[:, rank:]),
        "chunks": lambda: logps(hidden, weight, labels, chunk_size=rank + 1),
        "grads": lambda: logps(hidden, weight.clone().requires_grad_(rank == 0), labels),
        "group": lambda: logps(hidden, weight, labels, vocab_parallel_group="tp"),
        "dtensor": lambda: logps(hidden, sharded, labels),
        "compile": lambda: torch.compile(linear_logps, backend="eager", fullgraph=True)(
            hidden, weight, labels, **split_group
        ),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
            messages[name] = "no error"
        except (TypeError, ValueError, RuntimeError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


def graph_broken(group: Any) -> float:
    case = Case()
    hidden, weight, labels = case.tensors["chosen_hidden"], case.tensors["weight"], case.labels[0]
    with torch.no_grad():
        compiled = torch.compile(linear_logps, backend="eager")
        found = compiled(hidden, mine(weight, group), labels, vocab_parallel_group=group)
        torch.compiler.reset()
        return relative(found, linear_logps(hidden, weight, labels))


def work(rank: int) -> dict[str, Any]:
    from helpers import distributed_worker

    group, pair = dist.group.WORLD, dist.new_group([0, 1])
    found: dict[str, Any] = {
        "recipes": distributed_worker.case.run_all(
            lambda name, case: (
                name.startswith(("DDP", "vocab")) and isinstance(case.expected, Exact)
            )
        ),
        "scripts": {name: steps.script_in_group(name) for name in ("ddp", "vocab_parallel")},
        "ways": all_ways(group),
        "wrong": wrong_ways(group),
        "logps": {
            "sums": logps_error(group),
            "tokens": logps_error(group, per_token=True),
            "packed": logps_error(group, cu_seqlens=OFFSETS),
            "graph broken": graph_broken(group),
            "DTensor": dtensor_error(),
        },
        "bfloat16": logps_error(group, dtype=torch.bfloat16),
        "bfloat16 gradients": half_precision(group),
        "refused": refusals(group),
    }
    if rank < 2:
        with pytest.MonkeyPatch.context() as patch:
            cut_blocks(patch, 4)  # each shard in blocks
            found["ways of two"] = all_ways(pair)
    return found


# ----------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return processes.run(work, WORLD, tmp_path_factory.mktemp("split"))


def test_a_split_head_is_the_whole_head(ranks) -> None:
    for rank in ranks:
        assert {k: e for k, e in rank["ways"].items() if not e < 1e-10} == {}
        assert {k: e for k, e in rank.get("ways of two", {}).items() if not e < 1e-10} == {}
        assert {k: e for k, e in rank["logps"].items() if not e < 1e-12} == {}
    assert "ways of two" in ranks[1]


def test_a_wrong_split_is_seen(ranks) -> None:
    for name in ranks[0]["wrong"]:
        assert not max(rank["wrong"][name] for rank in ranks) < 1e-3, name


def test_half_precision_is_no_worse_than_the_whole_heads(ranks) -> None:
    case = Case(dtype=torch.bfloat16)
    hidden, weight = case.tensors["chosen_hidden"].detach(), case.tensors["weight"].detach()
    exact = linear_logps(hidden.double(), weight.double(), case.labels[0])
    own = float((linear_logps(hidden, weight, case.labels[0]) - exact).abs().max())
    for rank in ranks:
        assert rank["bfloat16"] <= 1.5 * own + 1e-6
        for name, (found, whole) in rank["bfloat16 gradients"].items():
            assert found < 2.0 * whole + 1e-6, name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sizes", "ValueError: the shards of weight add up to 5 + 5 + 3 = 13 rows"),
        ("empty", "ValueError: every rank of vocab_parallel_group needs at least one row"),
        ("labels", "agree on the labels"),
        ("tokens", "agree on the number of tokens of labels, got [35, 30, 25]"),
        ("chunks", "agree on chunk_size, got [1, 2, 3]"),
        ("grads", "agree on whether weight requires a gradient, got [1, 0, 0]"),
        ("group", "TypeError: vocab_parallel_group must be a torch.distributed ProcessGroup"),
        ("dtensor", "pass weight.to_local()"),
        ("compile", "Unsupported"),
    ],
)
def test_what_does_not_fit_is_refused_on_all_ranks(ranks, name, message) -> None:
    for rank in ranks:
        assert message in rank["refused"][name]


def test_the_recipes_of_ddp_and_of_a_split_head(ranks) -> None:
    for rank in ranks:
        for name, (_, errors) in rank["recipes"].items():
            # DDP multiplies by 1/3 in float32; test_steps.py has 1e-9 on two processes.
            assert max(errors) < (1e-6 if "DDP" in name else 1e-9), (name, errors)
        losses = rank["scripts"]["vocab_parallel"]
        assert losses[0] == pytest.approx(0.0, abs=1e-6)
        assert losses == sorted(losses, reverse=True)
        assert rank["scripts"]["ddp"][-1] == ranks[0]["scripts"]["ddp"][-1] > 0.1
