"""Arguments that do not fit are refused before any computation, and the message names them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from typing import Any

import numpy as np
import pytest

import spoloss.jax
import spoloss.torch
from helpers.wings import D, P, T, V, Wing, completions_of, fused, head_of, make_arrays
from spoloss import SPO

FIELDS = {
    "head.weight": "weight",
    "head.bias": "bias",
    "chosen.hidden": "chosen_hidden",
    "chosen.labels": "chosen_labels",
    "chosen.token_weights": "chosen_token_weights",
    "rejected.hidden": "rejected_hidden",
    "rejected.labels": "rejected_labels",
    "reference_chosen_logps": "reference_chosen",
    "reference_rejected_logps": "reference_rejected",
    "beta": "beta",
    "reward_gap": "reward_gap",
    "weights": "weights",
}


class Output:
    """A model's output, from which the user forgot to take the array."""


OTHERS = {
    "list": lambda array: array.tolist(),
    "tuple": lambda array: (array,),
    "Output": lambda _: Output(),
    "NoneType": lambda _: None,
    "bool": lambda _: True,
}
OPTIONAL = ("head.bias", "chosen.token_weights", "reward_gap", "weights")


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", FIELDS)
def test_what_is_no_array(wing: Wing, name: str, kind: str) -> None:
    if kind == "NoneType" and name in OPTIONAL:
        return  # their default
    arrays = make_arrays(wing)
    arrays[FIELDS[name]] = OTHERS[kind](arrays[FIELDS[name]])
    with pytest.raises(TypeError, match=rf"^{name} must be .*, got .*{kind}"):
        fused(wing, SPO(), arrays)


@pytest.mark.parametrize("name", FIELDS)
def test_a_dtype_that_does_not_fit(wing: Wing, name: str) -> None:
    arrays = make_arrays(wing)
    wrong = "float64" if name.endswith("labels") else "int64"
    arrays[FIELDS[name]] = wing.array(wing.numpy(arrays[FIELDS[name]]).astype(wrong))
    with pytest.raises(TypeError, match=rf"^{name} must"):
        fused(wing, SPO(), arrays)


STATES = "must have shape [B, T, D] with the D = 4 of head.weight, got "
NUMBER = "must be a number or have the log-probabilities' shape (5,), got "


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("head.weight", (V,), "must have shape [V, D], got (13,)"),
        ("head.bias", (V + 1,), "must have shape [V] = (13,), got (14,)"),
        ("chosen.hidden", (P, T), STATES + "(5, 7)"),
        ("chosen.hidden", (P, T, 3), STATES + "(5, 7, 3)"),
        ("chosen.labels", (P, T + 1), "must have the shape [B, T] = (5, 7) of chosen.hidden, got "),
        ("rejected.labels", (P,), "must have the shape [B, T] = (5, 6) of rejected.hidden, got "),
        ("chosen.token_weights", (P, 1), "must have the shape (5, 7) of chosen.labels, got (5, 1)"),
        ("beta", (P + 1,), NUMBER + "(6,)"),
        ("reward_gap", (1,), NUMBER + "(1,)"),
        ("weights", (P, 1), NUMBER + "(5, 1)"),
    ],
)
def test_a_shape_that_does_not_fit(
    wing: Wing, name: str, shape: tuple[int, ...], words: str
) -> None:
    arrays = make_arrays(wing)
    dtype = "int64" if name.endswith("labels") else "float64"
    arrays[FIELDS[name]] = wing.array(np.ones(shape, dtype))
    with pytest.raises(ValueError, match="^" + re.escape(f"{name} {words}")):
        fused(wing, SPO(), arrays)


def test_numbers_of_pairs_that_differ(wing: Wing) -> None:
    arrays = make_arrays(wing)
    for kind in ("hidden", "labels", "token_weights"):
        arrays[f"rejected_{kind}"] = arrays[f"rejected_{kind}"][1:]
    message = "chosen and rejected must have the same number of completions, got 5 and 4"
    with pytest.raises(ValueError, match=message):
        fused(wing, SPO(), arrays)


def test_a_head_and_completions_of_other_types(wing: Wing) -> None:
    arrays = make_arrays(wing)
    head, side = head_of(wing, arrays, {}), completions_of(wing, arrays, "chosen", {})
    with pytest.raises(TypeError, match=r"^head must be a Head, got "):
        wing.api.linear_logps(arrays["weight"], side)
    with pytest.raises(TypeError, match=r"^completions must be Completions, got "):
        wing.api.linear_logps(head, arrays["chosen_hidden"])
    with pytest.raises(TypeError, match=r"^rejected must be Completions, got "):
        wing.api.linear_pair_loss(SPO(), head, side, None, 0.0, 0.0, beta=0.1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chunk_size": 0}, ValueError, "chunk_size must be a positive number of tokens"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
        ({"average": "no"}, TypeError, "average must be True or False, got str"),
        ({"shift": None}, TypeError, r"chosen\.shift must be True or False, got NoneType"),
        ({"ignore_index": 1.5}, TypeError, r"chosen\.ignore_index must be an integer, got float"),
    ],
)
def test_options_that_do_not_fit(
    wing: Wing, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fused(wing, SPO(), make_arrays(wing), **options)


@pytest.mark.parametrize("name", ["temperature", "logit_scale", "softcap", "nll_weight"])
def test_an_option_that_is_an_array(wing: Wing, name: str) -> None:
    """The wings do not differentiate with respect to it."""
    with pytest.raises(TypeError, match=f"{name} must be a number, got"):
        fused(wing, SPO(), make_arrays(wing), **{name: wing.array(2.0)})


@pytest.mark.parametrize("name", ["beta", "reward_gap"])
def test_a_number_that_is_not_positive(wing: Wing, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be positive and finite, got 0.0"):
        fused(wing, SPO(), {**make_arrays(wing), name: 0.0})


@pytest.mark.parametrize(
    "loss", [SPO, "spo", object(), None], ids=["class", "name", "object", "None"]
)
def test_what_is_no_loss(wing: Wing, loss: Any) -> None:
    with pytest.raises(TypeError, match=r"^loss must be an object"):
        fused(wing, loss, make_arrays(wing))


def test_the_objects_are_frozen(wing: Wing) -> None:
    arrays = make_arrays(wing)
    objects = (head_of(wing, arrays, {}), completions_of(wing, arrays, "chosen", {}))
    for each, name in zip(objects, ("softcap", "shift"), strict=True):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(each, name, None)


def test_options_of_log_probabilities_that_do_not_fit(wing: Wing) -> None:
    arrays = make_arrays(wing)
    head, side = head_of(wing, arrays, {}), completions_of(wing, arrays, "chosen", {})
    with pytest.raises(TypeError, match=r"^per_token must be True or False, got str"):
        wing.api.linear_logps(head, side, per_token="no")
    with pytest.raises(ValueError, match="average and per_token exclude each other"):
        wing.api.linear_logps(head, side, average=True, per_token=True)
    logits, labels = arrays["chosen_hidden"], arrays["chosen_labels"]
    for name in ("shift", "average"):
        with pytest.raises(TypeError, match=rf"^{name} must be True or False, got int"):
            wing.api.sequence_logps(logits, labels, **{name: 1})
    with pytest.raises(TypeError, match=r"^ignore_index must be an integer, got NoneType"):
        wing.api.sequence_logps(logits, labels, ignore_index=None)


def test_offsets_that_do_not_fit(wing: Wing) -> None:
    arrays = make_arrays(wing)
    row = {
        "chosen_hidden": wing.array(np.zeros((1, P * T, D))),
        "chosen_labels": wing.array(np.zeros((1, P * T), int)),
    }
    del arrays["chosen_token_weights"]
    for rows, offsets, message in (
        ({}, wing.array([0, 3]), "chosen.cu_seqlens cuts one row into sequences"),
        (row, wing.array([0]), "chosen.cu_seqlens must have shape [S + 1] with S >= 1"),
        (row, wing.array(np.zeros((2, 2), int)), "chosen.cu_seqlens must have shape [S + 1]"),
        (row, wing.array([0.0, 1.0]), "chosen.cu_seqlens must be integer, got "),
        (row, [0, 3], "chosen.cu_seqlens must be a "),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
            fused(wing, SPO(), {**arrays, **rows, "chosen_cu_seqlens": offsets})


def test_logits_that_do_not_fit(wing: Wing) -> None:
    arrays = make_arrays(wing)
    right = {"logits": wing.array(np.zeros((P, T, 3))), "labels": arrays["chosen_labels"]}
    labels = right["labels"]
    for name, wrong, message in (
        ("logits", right["logits"][0], "logits must have shape [B, T, V]"),
        ("logits", wing.array(np.zeros((P, T, 3), int)), "logits must be real floating, got "),
        ("labels", labels[:, 1:], "labels must have the shape [B, T]"),
        ("labels", wing.array(np.zeros((P, T))), "labels must be integer, got "),
        ("labels", wing.array(np.zeros((P, T), bool)), "labels must be integer, got "),
        ("token_weights", labels, "token_weights must be real floating, got "),
        ("logits", [1.0], "logits must be a "),
        ("labels", [1], "labels must be a "),
        ("token_weights", [1.0], "token_weights must be a "),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
            wing.api.sequence_logps(**{**right, name: wrong})


ONLY = ("vocab_parallel_group", "mesh", "batch_axis", "vocab_axis")


@pytest.mark.parametrize("name", [*filter(str.islower, spoloss.jax.__all__), "Head", "Completions"])
def test_both_wings_have_the_same_signatures(name: str) -> None:
    both = []
    for wing in (spoloss.torch, spoloss.jax):
        thing = getattr(wing, name)
        parameters = inspect.signature(thing).parameters.values()
        assert {p.name for p in parameters} <= set(typing.get_type_hints(thing))
        for parameter in parameters:
            assert parameter.name != "beta" or parameter.default is inspect.Parameter.empty
            assert re.search(rf"^ +{parameter.name}: ", inspect.getdoc(thing) or "", re.M)
        assert all(p.kind != inspect.Parameter.VAR_KEYWORD for p in parameters)
        both.append([(p.name, p.kind, p.default) for p in parameters if p.name not in ONLY])
    assert both[0] == both[1]
