"""The fused head against logits -> sequence_logps -> pair_loss, in value and in every gradient."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.pairs import IPO
from helpers.pairwise import pairwise
from helpers.wings import (
    HEAD,
    NUMBERS,
    ORACLE,
    OTHER_T,
    STATES,
    TOKENS,
    APODown,
    P,
    T,
    Wing,
    check_same,
    completions_of,
    fused,
    head_of,
    make_arrays,
    packed,
    unfused,
    unfused_logps,
)
from spoloss import DPO, SPO, Squared

LOSSES = [SPO(), SPO(linear_below=-1.0), DPO(label_smoothing=0.1), Squared(), APODown()]
ROWS = pairwise(
    {
        "loss": LOSSES,
        "chunk_size": [1, 3, 20, None],  # 20 holds one pair and some two, so pairs of both kinds
        "need": [(*STATES, *HEAD), STATES, HEAD, ("weight",), (STATES[0], "bias"), ()],
        "numbers": [NUMBERS, ()],
        "token_weights": [TOKENS, TOKENS[:1], ()],  # the sides may differ
        "bias": [True, False],
        "reduction": ["mean", "sum", "none"],
        "nll_weight": [0.0, 0.4],
        "average": [False, True],
        "shift": [True, False],
        "softcap": [None, 3.0],
        "logit_scale": [1.0, 0.5],
        "temperature": [1.0, 2.0],
    }
)


def case_of(wing: Wing, row: dict[str, Any]) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """The arrays of a row, those that require a gradient, and the options."""
    arrays, options = make_arrays(wing), dict(row)
    tokens = options.pop("token_weights")
    left_out = [] if options.pop("bias") else ["bias"]
    left_out += [name for name in TOKENS if name not in tokens]
    arrays = {name: array for name, array in arrays.items() if name not in left_out}
    need = [*options.pop("need"), *options.pop("numbers")]
    if "beta" in need:
        need += tokens
    return arrays, [name for name in need if name in arrays], options


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row.values())))
def test_fused_is_unfused(wing: Wing, row: dict[str, Any]) -> None:
    arrays, need, options = case_of(wing, row)
    loss = options.pop("loss")
    plain = {name: value for name, value in options.items() if name != "chunk_size"}
    check_same(
        wing,
        lambda a: fused(wing, loss, a, **options).loss,
        lambda a: unfused(ORACLE, loss, a, **plain),
        arrays,
        need,
        oracle=ORACLE,
    )


@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("need", [(STATES[0],), (STATES[0], *HEAD), ()])
def test_linear_logps(
    wing: Wing, need: tuple[str, ...], chunk_size: int | None, *, average: bool
) -> None:
    options = {"softcap": 2.0, "logit_scale": 0.5, "chunk_size": chunk_size}

    def mine(arrays: Any, **how: bool) -> Any:
        head = head_of(wing, arrays, options)
        return wing.api.linear_logps(head, completions_of(wing, arrays, "chosen", {}), **how)

    def theirs(arrays: Any) -> Any:
        return unfused_logps(ORACLE, arrays, "chosen", average=average, **options)

    arrays = make_arrays(wing)
    need = (*need, TOKENS[0]) if need else need
    check_same(wing, lambda a: mine(a, average=average), theirs, arrays, need, oracle=ORACLE)
    if not average:
        each = lambda a: mine(a, per_token=True).sum(1)  # noqa: E731
        check_same(wing, each, theirs, arrays, need, oracle=ORACLE)
    tokens = wing.numpy(mine(arrays, per_token=True))
    assert (tokens[0, :2] == 0).all()  # the labels of the prompt
    assert (tokens[:, -1] == 0).all()


@pytest.mark.parametrize(
    ("in_one_row", "need"),
    [(("chosen",), (*STATES, *HEAD)), (("rejected",), STATES), (("chosen", "rejected"), HEAD)],
)
def test_the_two_sides_may_differ(
    wing: Wing, in_one_row: tuple[str, ...], need: tuple[str, ...]
) -> None:
    """In packing, in the label that does not count, and in the shift."""
    arrays = make_arrays(wing)
    arrays["rejected_labels"] = wing.array(wing.numpy(arrays["rejected_labels"]).clip(0))
    sides = {"chosen": {"shift": True}, "rejected": {"shift": False, "ignore_index": 2}}
    length = {"chosen": T, "rejected": OTHER_T}
    # One of the sequences is empty in the middle, and one at the end.
    offsets = {side: [length[side] * i for i in (0, 1, 1, 3, P, P)] for side in in_one_row}
    check_same(
        wing,
        lambda a: fused(wing, APODown(), a, chunk_size=20, **sides).loss,
        lambda a: unfused(ORACLE, APODown(), a, **sides),
        packed(wing, arrays, **offsets),
        need,
        oracle=ORACLE,
    )


NAMED = {
    "spo": (SPO(linear_below=-1.0), {"linear_below": -1.0}),
    "dpo": (DPO(label_smoothing=0.1), {"label_smoothing": 0.1}),
    "squared": (Squared(), {}),
    "ipo": (IPO(), {}),
}


@pytest.mark.parametrize("name", NAMED)
def test_the_named_losses(wing: Wing, name: str) -> None:
    """They are `linear_pair_loss` with an object, and pass every option on."""
    loss, own = NAMED[name]
    options = {"nll_weight": 0.3, "average": True, "reduction": "sum"}
    arrays = make_arrays(wing)
    if name in ("dpo", "ipo"):
        del arrays["reward_gap"]

    def mine(a: Any) -> Any:
        sides = (completions_of(wing, a, side, {}) for side in ("chosen", "rejected"))
        references = a["reference_chosen"], a["reference_rejected"]
        numbers = {each: a[each] for each in ("beta", "reward_gap", "weights") if each in a}
        function = getattr(wing.api, f"linear_{name}_loss")
        return function(head_of(wing, a, {}), *sides, *references, **numbers, **own, **options).loss

    theirs = lambda a: unfused(ORACLE, loss, a, **options)  # noqa: E731
    check_same(wing, mine, theirs, arrays, (*STATES, *HEAD), oracle=ORACLE)
