"""A head split over the vocabulary against the whole head, on two and three processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from helpers import processes
from helpers.fused import ALL, INPUTS, Case
from spoloss import SPO
from spoloss.torch import (
    _devices,
    _head,
    _vocab_parallel,
    linear_logps,
    linear_pair_loss,
    linear_spo_loss,
)

SIZES = {2: ((7, 6), (1, 12)), 3: ((5, 5, 3),)}  # rows of V = 13 by rank, for 2 and 3 ranks
FROZEN_HEAD = (True, True, False, False)
FROZEN_HIDDEN = (False, False, True, False)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a row at a time": {"chunk_size": 1},
    "pairs longer than a tile": {"chunk_size": 3},
    "one tile": {"chunk_size": 10_000},
    "no shift": {"shift": False, "chunk_size": 3},
    "averages": {"average": True, "chunk_size": 5},
    "NLL": {"nll_weight": 0.7, "chunk_size": 5},
    "sum": {"reduction": "sum"},
    "a loss per pair": {"reduction": "none"},
    "softcap": {"softcap": 2.0, "logit_scale": 0.5, "temperature": 1.7, "chunk_size": 4},
}
NEEDS = {"all": ALL, "frozen head": FROZEN_HEAD, "frozen hidden": FROZEN_HIDDEN}


class Split(Case):
    """The case of the fused head, of which a rank holds some rows of V."""

    def cut(self, sizes: tuple[int, ...], rank: int) -> None:
        for name in ("weight", "bias"):
            whole = self.tensors[name]
            part = whole.detach().split(sizes)[rank].clone()
            self.tensors[name] = part.requires_grad_(whole.requires_grad)


def named_grads(case: Case, loss: Tensor) -> dict[str, Tensor]:
    wanted = [name for name in INPUTS if case.tensors[name].requires_grad]
    return dict(zip(wanted, case.grads(loss), strict=True))


def all_ways(rank: int, sizes: tuple[int, ...]) -> dict[tuple[str, str], tuple[Tensor, Any]]:
    group = dist.group.WORLD
    found = {}
    for need_name, need in NEEDS.items():
        for name, options in OPTIONS.items():
            case = Split(need)
            case.cut(sizes, rank)
            loss = case.fused(SPO(), **options, vocab_parallel_group=group).loss
            found[need_name, name] = (loss.detach(), named_grads(case, loss))
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


def errors(
    ranks: list[dict[tuple[str, str], tuple[Tensor, Any]]],
) -> dict[tuple[str, str], float]:
    """The largest relative error of loss and gradients, by case."""
    worst = {}
    for key in ranks[0]:
        need_name, name = key
        case = Case(NEEDS[need_name])
        loss = case.fused(SPO(), **OPTIONS[name]).loss
        expected = named_grads(case, loss)
        values = [relative(rank[key][0], loss.detach()) for rank in ranks]
        for tensor, grad in expected.items():
            parts = [rank[key][1][tensor] for rank in ranks]
            if "hidden" in tensor:
                values += [relative(part, grad) for part in parts]
            else:
                values.append(relative(torch.cat(parts), grad))
        worst[key] = float(torch.tensor(values).max())  # nan stays nan
    return worst


def three(rank: int) -> dict[str, Any]:
    return {str(sizes): all_ways(rank, sizes) for sizes in SIZES[3]}


def two(rank: int) -> dict[str, Any]:
    _head.LEAST_COLUMNS = _head.ALIGNED = 4  # each shard in blocks
    _devices.CPU = _devices.CPU._replace(block_bytes=1)
    right = {str(sizes): all_ways(rank, sizes) for sizes in SIZES[2]}
    return {**right, "uses": other_uses(rank), "wrong": wrong_ways(rank, SIZES[2][0])}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    return {
        world: processes.run(work, world, tmp_path_factory.mktemp(work.__name__))
        for world, work in ((2, two), (3, three))
    }


@pytest.fixture
def uses(ranks: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [rank["uses"] for rank in ranks[2]]


@pytest.mark.parametrize("sizes", [*SIZES[2], *SIZES[3]], ids=str)
def test_a_split_head_is_the_whole_head(
    sizes: tuple[int, ...], ranks: dict[int, list[dict[str, Any]]]
) -> None:
    results = [rank[str(sizes)] for rank in ranks[len(sizes)]]
    for key, error in errors(results).items():
        assert error < 1e-10, key


def wrong_ways(rank: int, sizes: tuple[int, ...]) -> dict[str, Any]:
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
            return super().join_sums(shift - rank, others, target)

    for wrong in (HiddenUnsummed, FromZero, OwnShift):
        _vocab_parallel.VocabShard = wrong  # type: ignore[misc]
        found[wrong.__name__] = all_ways(rank, sizes)
    return found


def test_a_wrong_split_is_seen(ranks: dict[int, list[dict[str, Any]]]) -> None:
    for name in ranks[2][0]["wrong"]:
        worst = errors([rank["wrong"][name] for rank in ranks[2]])
        assert not worst["frozen head", "plain"] < 1e-3, name


def other_uses(rank: int) -> dict[str, Any]:
    """linear_logps in its forms, a DTensor's rows, half precision, and what is refused."""
    group = dist.group.WORLD
    case = Split()
    hidden, labels = case.tensors["chosen_hidden"], case.labels[0]
    whole = case.tensors["weight"].detach().clone()
    case.cut((7, 6), rank)
    weight = case.tensors["weight"]
    offsets = torch.tensor([0, 4, 4, 11, 35])
    found: dict[str, Any] = {}
    with torch.no_grad():
        for name, options in {"sums": {}, "tokens": {"per_token": True}}.items():
            found[name] = linear_logps(
                hidden, weight, labels, **options, vocab_parallel_group=group
            )
        found["packed"] = linear_logps(
            hidden.reshape(1, -1, hidden.shape[2]),
            weight,
            labels.reshape(1, -1),
            cu_seqlens=offsets,
            vocab_parallel_group=group,
        )
    mesh = init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(whole, mesh, [Shard(0)]).requires_grad_()
    linear_logps(
        hidden.detach(), sharded.to_local(), labels, vocab_parallel_group=mesh.get_group()
    ).sum().backward()
    assert sharded.grad is not None
    found["dtensor"] = sharded.grad.redistribute(mesh, [Replicate()]).to_local()
    half = [tensor.detach().bfloat16() for tensor in (hidden, weight)]
    found["bfloat16"] = linear_logps(*half, labels, vocab_parallel_group=group)
    chosen, rejected, *_ = case.tensors.values()
    found["spelled"] = linear_spo_loss(
        chosen,
        rejected,
        weight,
        *case.labels,
        *case.reference,
        beta=0.2,
        vocab_parallel_group=group,
    ).loss.detach()
    with torch.no_grad():
        compiled = torch.compile(linear_logps, backend="eager")
        found["sums, graph broken"] = compiled(hidden, weight, labels, vocab_parallel_group=group)
    torch.compiler.reset()
    rounded = Split(dtype=torch.bfloat16)
    rounded.cut((7, 6), rank)
    found["bfloat16 grads"] = named_grads(rounded, half_loss(rounded, vocab_parallel_group=group))
    found["errors"] = refusals(rank, case, sharded, group)
    return found


def half_loss(case: Case, **options: Any) -> Tensor:
    return case.fused(SPO(), beta=0.2, weights=None, **options).loss


def refusals(rank: int, case: Case, sharded: Tensor, group: Any) -> dict[str, str]:
    hidden, weight = case.tensors["chosen_hidden"].detach(), case.tensors["weight"].detach()
    labels = case.labels[0]
    beyond = labels.clone()
    beyond[4, 4] = 13
    own_tokens = (labels + rank).remainder(13)
    calls: dict[str, Any] = {
        "sizes": lambda: linear_logps(hidden, weight, beyond, vocab_parallel_group=group),
        "empty": lambda: linear_logps(
            hidden, weight[: len(weight) * rank], labels, vocab_parallel_group=group
        ),
        "labels": lambda: linear_logps(hidden, weight, own_tokens, vocab_parallel_group=group),
        "tokens": lambda: linear_logps(
            hidden[:, rank:], weight, labels[:, rank:], vocab_parallel_group=group
        ),
        "chunks": lambda: linear_logps(
            hidden, weight, labels, chunk_size=rank + 1, vocab_parallel_group=group
        ),
        "grads": lambda: linear_logps(
            hidden, weight.clone().requires_grad_(rank == 0), labels, vocab_parallel_group=group
        ),
        "group": lambda: linear_logps(hidden, weight, labels, vocab_parallel_group="tp"),  # type: ignore[arg-type]
        "dtensor": lambda: linear_logps(hidden, sharded, labels, vocab_parallel_group=group),
        "compile": lambda: torch.compile(linear_logps, backend="eager", fullgraph=True)(
            hidden, weight, labels, vocab_parallel_group=group
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


def test_linear_logps_of_a_split_head(uses: list[dict[str, Any]]) -> None:
    case = Case()
    hidden, weight, labels = case.tensors["chosen_hidden"], case.tensors["weight"], case.labels[0]
    flat, row = hidden.reshape(1, -1, hidden.shape[2]), labels.reshape(1, -1)
    offsets = torch.tensor([0, 4, 4, 11, 35])
    expected = {
        "sums": linear_logps(hidden, weight, labels),
        "sums, graph broken": linear_logps(hidden, weight, labels),
        "tokens": linear_logps(hidden, weight, labels, per_token=True),
        "packed": linear_logps(flat, weight, row, cu_seqlens=offsets),
    }
    for rank in uses:
        for name, value in expected.items():
            torch.testing.assert_close(rank[name], value.detach(), rtol=1e-12, atol=1e-12)


def test_the_spellings_take_the_group(uses: list[dict[str, Any]]) -> None:
    case = Case()
    chosen, rejected, weight, _ = case.tensors.values()
    inputs = (chosen, rejected, weight, *case.labels, *case.reference)
    expected = linear_pair_loss(SPO(), *inputs, beta=0.2).loss.detach()
    for rank in uses:
        torch.testing.assert_close(rank["spelled"], expected, rtol=1e-12, atol=0.0)


def test_a_dtensor_gets_its_gradient(uses: list[dict[str, Any]]) -> None:
    case = Case((False, False, True, False))
    hidden, weight, labels = case.tensors["chosen_hidden"], case.tensors["weight"], case.labels[0]
    linear_logps(hidden, weight, labels).sum().backward()
    for rank in uses:
        torch.testing.assert_close(rank["dtensor"], weight.grad, rtol=1e-12, atol=1e-12)


def test_half_precision_is_gathered_in_float32(uses: list[dict[str, Any]]) -> None:
    case = Case()
    hidden, weight = (case.tensors[n].detach().bfloat16() for n in ("chosen_hidden", "weight"))
    exact = linear_logps(hidden.double(), weight.double(), case.labels[0])
    whole = linear_logps(hidden, weight, case.labels[0])
    for rank in uses:
        assert rank["bfloat16"].dtype == torch.float32
        own = (whole.double() - exact).abs().max()
        assert (rank["bfloat16"].double() - exact).abs().max() <= 1.5 * own + 1e-6


def test_gradients_in_half_precision_are_no_worse_than_the_whole_heads(
    uses: list[dict[str, Any]],
) -> None:
    half = Case(dtype=torch.bfloat16)
    exact = Case()
    for name, tensor in half.tensors.items():
        exact.tensors[name] = tensor.detach().double().requires_grad_()
    whole, truth = (named_grads(case, half_loss(case)) for case in (half, exact))
    for name in INPUTS:
        parts = [rank["bfloat16 grads"][name] for rank in uses]
        found = parts[0] if "hidden" in name else torch.cat(parts)
        own = relative(whole[name].double(), truth[name])
        assert relative(found.double(), truth[name]) < 2.0 * own + 1e-6, name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sizes", "ValueError: the shards of weight add up to 7 + 6 = 13 rows"),
        ("empty", "ValueError: every rank of vocab_parallel_group needs at least one row"),
        ("labels", "agree on the labels"),
        ("tokens", "agree on the number of tokens of labels, got [35, 30]"),
        ("chunks", "agree on chunk_size, got [1, 2]"),
        ("grads", "agree on whether weight requires a gradient, got [1, 0]"),
        ("group", "TypeError: vocab_parallel_group must be a torch.distributed ProcessGroup"),
        ("dtensor", "pass weight.to_local()"),
        ("compile", "Unsupported"),
    ],
)
def test_what_does_not_fit_is_refused_on_all_ranks(
    uses: list[dict[str, Any]], name: str, message: str
) -> None:
    for rank in uses:
        assert message in rank["errors"][name]
