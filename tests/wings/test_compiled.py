"""The fused head as part of one graph: the values and gradients of the eager call."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.wings import (
    HEAD,
    NUMBERS,
    STATES,
    TOKENS,
    APODown,
    Wing,
    check_same,
    completions_of,
    fused,
    head_of,
    make_arrays,
    packed,
    unfused,
)
from spoloss import SPO

# Dynamo instantiates any autograd.Function and so warns of itself (torch 2.13).
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def test_a_loss_and_a_trained_head(wing: Wing) -> None:
    options: dict[str, Any] = {"nll_weight": 0.3, "softcap": 3.0}
    call = lambda a: fused(wing, APODown(), a, **options).loss  # noqa: E731
    need = (*STATES, *HEAD, *NUMBERS, *TOKENS)
    check_same(wing, wing.compiled(call), call, make_arrays(wing), need)


def test_packed_log_probabilities_and_a_frozen_head(wing: Wing) -> None:
    arrays = packed(wing, make_arrays(wing), chosen=[0, 4, 4, 30, 35])

    def call(a: Any) -> Any:
        side = completions_of(wing, a, "chosen", {})
        return wing.api.linear_logps(head_of(wing, a, {}), side, average=True)

    check_same(wing, wing.compiled(call), call, arrays, (STATES[0], TOKENS[0]))


def test_logits_and_the_loss(wing: Wing) -> None:
    call = lambda a: unfused(wing, SPO(), a)  # noqa: E731
    check_same(wing, wing.compiled(call), call, make_arrays(wing), (*STATES, "weight"))
