"""A head split over the vocabulary against the whole head, and DDP, on three processes.

The processes are started once and run everything; the tests read what each rank found.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from helpers import processes, steps
from helpers.fused import cut_blocks
from helpers.wings import HEAD, STATES, WINGS, APODown, fused, make_arrays, upstream
from spoloss import SPO
from spoloss.torch import Completions, Head, linear_logps

WING = WINGS["torch"]
WORLD = 3
SIZES = {3: (5, 5, 3), 2: (1, 12)}  # rows of V = 13 by rank, in a group of 3 and one of 2
NEEDS = {"all": (*STATES, *HEAD), "frozen head": STATES, "frozen hidden": ("weight",)}
OPTIONS: dict[str, dict[str, Any]] = {
    "a row at a time": {"chunk_size": 1},
    "pairs longer than a tile": {"chunk_size": 3},
    "one tile": {"chunk_size": 10_000},
    "a loss of two log-ratios": {"loss": APODown()},
    "no shift": {"shift": False, "chunk_size": 3},
    "averages and NLL": {"average": True, "nll_weight": 0.7, "chunk_size": 5},
    "sum": {"reduction": "sum"},
    "a loss per pair": {"reduction": "none"},
    "softcap": {"softcap": 2.0, "logit_scale": 0.5, "temperature": 1.7, "chunk_size": 4},
}
PLAIN = SPO()
OFFSETS = torch.tensor([0, 4, 4, 11, 35])

Arrays = dict[str, Any]


# ------------------------------------------------------------------------------- on each process


def relative(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-300))


def mine(whole: Any, group: Any) -> Any:
    """This rank's rows of a whole weight, bias, or gradient."""
    ends = np.cumsum(SIZES[group.size()])
    return whole[ends[group.rank()] - SIZES[group.size()][group.rank()] : ends[group.rank()]]


def with_part(arrays: Arrays, group: Any) -> Arrays:
    """The arrays with this rank's rows of the head."""
    return arrays | {name: mine(arrays[name], group).clone() for name in HEAD}


def computed(
    arrays: Arrays,
    wanted: Sequence[str],
    *,
    loss: Any = PLAIN,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> dict[str, Any]:
    """The loss and its gradients, with hidden states and head in a dtype."""

    def values(leaves: Any) -> Tensor:
        cast = {name: leaves[name].to(dtype) for name in (*STATES, *HEAD)}
        return upstream(WING, fused(WING, loss, {**leaves, **cast}, **options).loss)

    value, grads = WING.grads(values, arrays, wanted)
    return {"loss": WING.numpy(value), **grads}


def error(group: Any, wanted: Sequence[str] = STATES, **options: Any) -> float:
    """The largest relative error of loss and gradients on this rank."""
    arrays = make_arrays(WING)
    whole = computed(arrays, wanted, **options)
    part = computed(with_part(arrays, group), wanted, **options, vocab_parallel_group=group)
    own = {name: mine(x, group) if name in HEAD else x for name, x in whole.items()}
    return float(np.max([relative(part[name], own[name]) for name in own]))  # nan stays nan


def all_ways(group: Any) -> dict[str, float]:
    return {
        f"{need}, {name}": error(group, NEEDS[need], **options)
        for need in NEEDS
        for name, options in OPTIONS.items()
    }


def completions(arrays: Arrays, **options: Any) -> Completions:
    hidden, labels = arrays["chosen_hidden"], arrays["chosen_labels"]
    if "cu_seqlens" in options:
        hidden, labels = hidden.reshape(1, -1, hidden.shape[2]), labels.reshape(1, -1)
    return Completions(hidden, labels, **options)


def logps_errors(group: Any) -> dict[str, float]:
    """The errors of `linear_logps` in its forms, and of the gradient of a DTensor."""
    arrays = make_arrays(WING)
    weight = arrays["weight"]
    whole, part = Head(weight), Head(mine(weight, group), vocab_parallel_group=group)
    sums, packed = completions(arrays), completions(arrays, cu_seqlens=OFFSETS)
    compiled = torch.compile(linear_logps, backend="eager")
    found = {
        "sums": relative(linear_logps(part, sums), linear_logps(whole, sums)),
        "packed": relative(linear_logps(part, packed), linear_logps(whole, packed)),
        "graph broken": relative(compiled(part, sums), linear_logps(whole, sums)),
        "tokens": relative(
            linear_logps(part, sums, per_token=True), linear_logps(whole, sums, per_token=True)
        ),
    }
    torch.compiler.reset()
    mesh = init_device_mesh("cpu", (WORLD,))
    leaf = weight.clone().requires_grad_()
    linear_logps(Head(leaf), sums).sum().backward()
    sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    local = Head(sharded.to_local(), vocab_parallel_group=mesh.get_group())
    linear_logps(local, sums).sum().backward()
    grad = sharded.grad.redistribute(mesh, [Replicate()]).to_local()
    return {**found, "DTensor": relative(grad, leaf.grad)}


def half_precision(group: Any) -> dict[str, tuple[float, float]]:
    """By gradient its error in bfloat16 against float64, and that of the whole head."""
    arrays, wanted, half = make_arrays(WING), NEEDS["all"], {"dtype": torch.bfloat16}
    arrays |= {name: arrays[name].bfloat16().double() for name in wanted}
    truth, whole = computed(arrays, wanted), computed(arrays, wanted, **half)
    part = computed(with_part(arrays, group), wanted, vocab_parallel_group=group, **half)
    found = {}
    for name, exact in truth.items():
        own = partial(mine, group=group) if name in HEAD else np.asarray
        found[name] = relative(part[name], own(exact)), relative(own(whole[name]), own(exact))
    return found


def refusals(group: Any) -> dict[str, str]:
    """What does not fit, by the part that is expected of its message: what came instead."""
    rank, arrays = dist.get_rank(), make_arrays(WING)
    hidden, labels = arrays["chosen_hidden"], arrays["chosen_labels"]
    weight = mine(arrays["weight"], group)
    beyond = labels.clone()
    beyond[4, 4] = 13
    sharded = distribute_tensor(arrays["weight"], init_device_mesh("cpu", (WORLD,)), [Shard(0)])
    wrap = torch.compile(linear_logps, backend="eager", fullgraph=True)

    def logps(
        weight: Any = weight,
        labels: Tensor = labels,
        hidden: Tensor = hidden,
        call: Any = linear_logps,
        **options: Any,
    ) -> Tensor:
        head = Head(weight, **{"vocab_parallel_group": group, **options})
        return call(head, Completions(hidden, labels))

    calls: dict[str, Any] = {
        "ValueError: the shards of weight add up to 5 + 5 + 3 = 13 rows": lambda: logps(
            labels=beyond
        ),
        "ValueError: every rank of vocab_parallel_group needs at least one row": lambda: logps(
            weight[: len(weight) * min(rank, 1)]
        ),
        "agree on the labels": lambda: logps(labels=(labels + rank).remainder(13)),
        "agree on the number of tokens of completions.labels, got [35, 30, 25]": lambda: logps(
            labels=labels[:, rank:], hidden=hidden[:, rank:]
        ),
        "agree on head.chunk_size, got [1, 2, 3]": lambda: logps(chunk_size=rank + 1),
        "agree on whether head.weight requires a gradient, got [1, 0, 0]": lambda: logps(
            weight.clone().requires_grad_(rank == 0)
        ),
        "TypeError: vocab_parallel_group must be a torch.distributed ProcessGroup": lambda: logps(
            vocab_parallel_group="tp"
        ),
        "pass weight.to_local()": lambda: logps(sharded),
        "Unsupported": lambda: logps(call=wrap),
    }
    others = {}
    for message, call in calls.items():
        try:
            others[message] = str(call())
        except (TypeError, ValueError, RuntimeError) as error:
            if message not in (found := f"{type(error).__name__}: {error}"):
                others[message] = found
    return others


def work(rank: int) -> dict[str, Any]:
    from helpers import distributed_worker

    group, pair = dist.group.WORLD, dist.new_group([0, 1])
    found: dict[str, Any] = {
        "recipes": distributed_worker.case.run_all(
            lambda name: name.startswith(("DDP: fused", "DDP: logits", "vocab"))
        ),
        "scripts": {name: steps.script_in_group(name) for name in ("ddp", "vocab_parallel")},
        "ways": all_ways(group),
        "logps": logps_errors(group),
        "bfloat16": half_precision(group),
        "refused": refusals(group),
    }
    if rank < 2:
        with pytest.MonkeyPatch.context() as patch:  # each shard in blocks
            cut_blocks(patch, 4)
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


def test_half_precision_is_no_worse_than_the_whole_heads(ranks) -> None:
    for rank in ranks:
        for name, (found, whole) in rank["bfloat16"].items():
            assert found < 2.0 * whole + 1e-6, name


def test_what_does_not_fit_is_refused_on_all_ranks(ranks) -> None:
    assert [rank["refused"] for rank in ranks] == [{}] * WORLD


def test_the_recipes_of_ddp_and_of_a_split_head(ranks) -> None:
    for rank in ranks:
        for name, (_, errors) in rank["recipes"].items():
            # DDP multiplies by 1/3 in float32; test_steps.py has 1e-9 on two processes.
            assert max(errors) < (1e-6 if "DDP" in name else 1e-9), (name, errors)
        losses = rank["scripts"]["vocab_parallel"]
        assert losses[0] == pytest.approx(0.0, abs=1e-6)
        assert losses == sorted(losses, reverse=True)
        assert rank["scripts"]["ddp"][-1] == ranks[0]["scripts"]["ddp"][-1] > 0.1
