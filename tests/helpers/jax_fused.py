"""The JAX wing against logits -> log_softmax -> pair_loss: the case, the oracle and the checks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spoloss import pair_loss
from spoloss.jax import linear_pair_loss

P, T, OTHER_T, D, V = 5, 7, 6, 4, 21
IGNORED = -100
INPUTS = (
    "chosen_hidden",
    "rejected_hidden",
    "weight",
    "bias",
    "reference_chosen",
    "reference_rejected",
    "beta",
    "weights",
)


QUICK = {"xla_cpu_use_fusion_emitters": False}
"""Options of the compiler for programs that take a second to compile and no time to run."""


def quick_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit`, with half the time of compilation."""
    return jax.jit(function, compiler_options=QUICK)


def make_inputs(dtype: Any = jnp.float64) -> dict[str, Array]:
    """What a fused loss may be differentiated by, by name."""
    random = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)  # noqa: E731
    return {
        "chosen_hidden": normal(P, T, D),
        "rejected_hidden": normal(P, OTHER_T, D),
        "weight": normal(V, D),
        "bias": normal(V),
        "reference_chosen": jnp.asarray(-5.0 * random.random(P) - 3.0),
        "reference_rejected": jnp.asarray(-5.0 * random.random(P) - 3.0),
        "beta": jnp.array([0.1, 0.2, 0.3, 0.1, 0.5]),
        "weights": jnp.array([1.0, 0.5, 2.0, 0.0, -1.0]),
    }


def make_labels() -> tuple[Array, Array]:
    """Ragged rows: prompts, padding, and a chosen answer without any token."""
    random = np.random.default_rng(2)
    chosen, rejected = random.integers(0, V, (P, T)), random.integers(0, V, (P, OTHER_T))
    chosen[0, :3] = rejected[1, 4:] = chosen[2] = IGNORED
    return jnp.asarray(chosen), jnp.asarray(rejected)


def pack(hidden: Array, labels: Array) -> tuple[Array, Array, Array]:
    """The rows of a batch, one behind the other: hidden states, labels and offsets."""
    offsets = jnp.arange(len(labels) + 1) * labels.shape[1]
    return hidden.reshape(1, -1, hidden.shape[2]), labels.reshape(1, -1), offsets


def fused(loss: Any, inputs: dict[str, Array], *, packed: bool = False, **options: Any) -> Array:
    """The loss of the case by `linear_pair_loss`."""
    sides = [inputs["chosen_hidden"], inputs["rejected_hidden"]]
    labels = list(make_labels())
    if packed:
        for i, name in enumerate(("chosen", "rejected")):
            sides[i], labels[i], offsets = pack(sides[i], labels[i])
            options[f"{name}_cu_seqlens"] = offsets
    return linear_pair_loss(
        loss,
        *sides,
        inputs["weight"],
        *labels,
        inputs["reference_chosen"],
        inputs["reference_rejected"],
        beta=inputs["beta"],
        bias=inputs.get("bias"),
        weights=inputs.get("weights"),
        **options,
    ).loss


def plain_logps(
    hidden: Array,
    labels: Array,
    inputs: dict[str, Array],
    *,
    shift: bool = True,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> tuple[Array, Array]:
    """Summed log-probabilities by all logits, and the number of tokens that count."""
    logits = jnp.einsum("btd,vd->btv", hidden, inputs["weight"])
    logits = (logits + inputs.get("bias", 0.0)).astype(jnp.promote_types(hidden.dtype, "float32"))
    logits = logits * logit_scale
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    logps = jax.nn.log_softmax(logits / temperature)
    if shift:
        logps, labels = logps[:, :-1], labels[:, 1:]
    counts = labels != IGNORED
    found = jnp.take_along_axis(logps, jnp.where(counts, labels, 0)[..., None], axis=2)[..., 0]
    return jnp.where(counts, found, 0.0).sum(axis=1), counts.sum(axis=1)


def unfused(
    loss: Any,
    inputs: dict[str, Array],
    *,
    reduction: str = "mean",
    nll_weight: float = 0.0,
    average: bool = False,
    **options: Any,
) -> Array:
    """The same by all logits."""
    chosen, rejected = make_labels()
    chosen_logps, chosen_n = plain_logps(inputs["chosen_hidden"], chosen, inputs, **options)
    rejected_logps, rejected_n = plain_logps(inputs["rejected_hidden"], rejected, inputs, **options)
    per_token = chosen_logps / jnp.maximum(chosen_n, 1)
    if average:
        chosen_logps, rejected_logps = per_token, rejected_logps / jnp.maximum(rejected_n, 1)
    value = pair_loss(
        loss,
        chosen_logps,
        rejected_logps,
        inputs["reference_chosen"],
        inputs["reference_rejected"],
        beta=inputs["beta"],
        weights=inputs.get("weights"),
        reduction=reduction,
    )
    nll = -per_token * inputs.get("weights", 1.0)
    return value + nll_weight * {"mean": nll.mean(), "sum": nll.sum(), "none": nll}[reduction]


def value_and_grads(
    function: Callable[..., Array], inputs: dict[str, Array], wanted: Sequence[str]
) -> tuple[Array, dict[str, Array]]:
    """A loss, and the gradients by some inputs of the sum of unequal parts of it."""

    def scalar(by: dict[str, Array], rest: dict[str, Array]) -> tuple[Array, Array]:
        value = function({**rest, **by})
        upstream = 1.5 * jnp.array([1.0, -2.0, 0.5, 3.0, 1.0])[: value.size]
        return (value.reshape(-1) * upstream).sum(), value

    by = {name: inputs[name] for name in wanted}
    (_, value), grads = quick_jit(jax.value_and_grad(scalar, has_aux=True))(by, inputs)
    return value, grads


def check_fused(
    loss: Any,
    inputs: dict[str, Array],
    wanted: Sequence[str],
    *,
    chunk_size: int | None = None,
    packed: bool = False,
    **options: Any,
) -> None:
    """Loss and gradients to 1e-10 of the way by all logits."""
    call = functools.partial(fused, loss, packed=packed, chunk_size=chunk_size, **options)
    got, got_grads = value_and_grads(call, inputs, wanted)
    want, want_grads = value_and_grads(functools.partial(unfused, loss, **options), inputs, wanted)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
    for name in wanted:
        np.testing.assert_allclose(
            got_grads[name], want_grads[name], rtol=1e-10, atol=1e-12, err_msg=name
        )
