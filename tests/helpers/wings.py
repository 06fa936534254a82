"""The two wings behind one interface, and a case that both compute: arrays come from NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import spoloss.jax
import spoloss.torch
from spoloss import SPO, pair_loss

Arrays = Mapping[str, Any]


@dataclass(frozen=True)
class Torch:
    """PyTorch on a device: its functions, and what a test needs beside them."""

    device: str = "cpu"
    name = "torch"
    api = spoloss.torch

    def array(self, values: Any, dtype: str | None = None) -> torch.Tensor:
        """An array of the library, in the dtype of that name or that of `values`."""
        tensor = torch.as_tensor(np.array(values), device=self.device)
        return tensor if dtype is None else tensor.to(getattr(torch, dtype))

    def numpy(self, array: Any) -> np.ndarray:
        """The numbers of an array."""
        if array.dtype == torch.bfloat16:  # which NumPy lacks
            return self.numpy(array.view(torch.int16)).view(jnp.bfloat16)
        return np.asarray(array.detach().cpu())

    def grads(
        self, function: Callable[[Arrays], Any], arrays: Arrays, wanted: Sequence[str]
    ) -> tuple[Any, dict[str, np.ndarray]]:
        """The result of a function of arrays, and the gradients of its sum.

        Only the wanted arrays require a gradient, so the others are frozen.
        """
        leaves = {
            name: array.detach().clone().requires_grad_(name in wanted)
            if isinstance(array, torch.Tensor) and array.is_floating_point()
            else array
            for name, array in arrays.items()
        }
        result = function(leaves)
        if not wanted:
            return result, {}
        inputs = [leaves[name] for name in wanted]
        found = torch.autograd.grad(result.sum(), inputs, allow_unused=True, materialize_grads=True)
        return result.detach(), dict(zip(wanted, map(self.numpy, found), strict=True))

    def compiled(self, function: Callable[[Arrays], Any]) -> Callable[[Arrays], Any]:
        """The function as one graph."""
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, backend="aot_eager")


class Jax:
    """The same for JAX."""

    name = "jax"
    api = spoloss.jax

    def array(self, values: Any, dtype: str | None = None) -> jax.Array:
        return jnp.asarray(np.array(values), dtype)

    def numpy(self, array: Any) -> np.ndarray:
        return np.array(array)

    def grads(
        self, function: Callable[[Arrays], Any], arrays: Arrays, wanted: Sequence[str]
    ) -> tuple[Any, dict[str, np.ndarray]]:
        def total(leaves: Arrays) -> tuple[jax.Array, jax.Array]:
            result = function({**arrays, **leaves})
            return result.sum(), result

        if not wanted:
            return function(arrays), {}
        leaves = {name: arrays[name] for name in wanted}
        (_, result), found = jax.value_and_grad(total, has_aux=True)(leaves)
        return result, {name: self.numpy(grad) for name, grad in found.items()}

    def compiled(self, function: Callable[[Arrays], Any]) -> Callable[[Arrays], Any]:
        return jax.jit(function)


Wing = Torch | Jax
WINGS: dict[str, Wing] = {"torch": Torch(), "jax": Jax()}
ORACLE = WINGS["torch"]
"""The wing that computes what both wings are compared with: it compiles nothing."""

P, T, OTHER_T, D, V = 5, 7, 6, 4, 13
IGNORED = -100
STATES = ("chosen_hidden", "rejected_hidden")
HEAD = ("weight", "bias")
NUMBERS = ("reference_chosen", "reference_rejected", "beta", "reward_gap", "weights")
TOKENS = ("chosen_token_weights", "rejected_token_weights")
HEAD_OPTIONS = (
    *("bias", "softcap", "logit_scale", "temperature", "chunk_size"),
    "vocab_parallel_group",  # of the PyTorch wing alone
    *("mesh", "batch_axis", "vocab_axis"),  # of the JAX wing alone
)
SIDE_OPTIONS = ("ignore_index", "shift")


def sigmoid(x: Any) -> Any:
    """In any library."""
    return 1.0 / (1.0 + np.e**-x)


@dataclass(frozen=True)  # its repr, without an address, is part of the names of tests
class APODown:
    """APO-down, arXiv:2408.06266: a loss of the two log-ratios."""

    def value(self, chosen: Any, rejected: Any, beta: Any) -> Any:
        return sigmoid(beta * chosen) + sigmoid(-beta * (chosen - rejected))

    def slopes(self, chosen: Any, rejected: Any, beta: Any) -> tuple[Any, Any]:
        up, down = sigmoid(beta * chosen), sigmoid(beta * (chosen - rejected))
        of_margin = beta * down * (1.0 - down)
        return beta * up * (1.0 - up) - of_margin, of_margin


class Margin:
    """l(h) = h, so that the gradient of the loss is that of the log-probability."""

    def value(self, margin: Any, beta: Any) -> Any:  # noqa: ARG002
        return margin

    def slope(self, margin: Any, beta: Any) -> Any:  # noqa: ARG002
        return 0.0 * margin + 1.0


def make_arrays(wing: Wing, dtype: str = "float64") -> dict[str, Any]:
    """Five ragged pairs: a prompt, padding, a chosen completion without any token.

    Pair 3 has weight 0, and some tokens have weight 0.
    """
    random = np.random.default_rng(1)
    floating = {
        "chosen_hidden": random.normal(size=(P, T, D)),
        "rejected_hidden": random.normal(size=(P, OTHER_T, D)),
        "weight": random.normal(size=(V, D)),
        "bias": random.normal(size=V),
        "reference_chosen": -5.0 * random.random(P) - 3.0,
        "reference_rejected": -5.0 * random.random(P) - 3.0,
        "beta": np.array([0.1, 0.2, 0.3, 0.1, 0.5]),
        "reward_gap": np.array([1.0, 0.5, 2.0, 1.0, 1.5]),
        "weights": np.array([1.0, 0.5, 2.0, 0.0, -1.0]),
        "chosen_token_weights": random.random((P, T)),
        "rejected_token_weights": random.random((P, OTHER_T)),
    }
    for name in TOKENS:
        floating[name][1, 2:4] = floating[name][4, 1] = 0.0
    labels = {
        "chosen_labels": random.integers(0, V, (P, T)),
        "rejected_labels": random.integers(0, V, (P, OTHER_T)),
    }
    labels["chosen_labels"][0, :3] = labels["rejected_labels"][1, 4:] = IGNORED
    labels["chosen_labels"][2] = IGNORED
    kept = {name: wing.array(values) for name, values in (floating | labels).items()}
    return kept | {name: wing.array(floating[name], dtype) for name in (*STATES, *HEAD)}


def packed(wing: Wing, arrays: Arrays, **offsets: Sequence[int]) -> dict[str, Any]:
    """The arrays with the sides that `offsets` names as one row of sequences each."""
    found = dict(arrays)
    for side, cu_seqlens in offsets.items():
        for name in (f"{side}_hidden", f"{side}_labels", f"{side}_token_weights"):
            found[name] = arrays[name].reshape(1, -1, *arrays[name].shape[2:])
        found[f"{side}_cu_seqlens"] = wing.array(cu_seqlens)
    return found


def chosen_from(names: tuple[str, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of these names."""
    return {name: options[name] for name in names if name in options}


def head_of(wing: Wing, arrays: Arrays, options: Mapping[str, Any]) -> Any:
    """The head of the case, with its options among `options`."""
    head = {"bias": arrays.get("bias"), **chosen_from(HEAD_OPTIONS, options)}
    return wing.api.Head(arrays["weight"], **head)


def completions_of(wing: Wing, arrays: Arrays, side: str, options: Mapping[str, Any]) -> Any:
    """The completions of one side, with their options among `options` or `options[side]`."""
    options = {**options, **options.get(side, {})}
    fields = {name: arrays.get(f"{side}_{name}") for name in ("token_weights", "cu_seqlens")}
    hidden, labels = arrays[f"{side}_hidden"], arrays[f"{side}_labels"]
    return wing.api.Completions(hidden, labels, **fields, **chosen_from(SIDE_OPTIONS, options))


def fused(wing: Wing, loss: Any, arrays: Arrays, **options: Any) -> Any:
    """`linear_pair_loss` of the case."""
    return wing.api.linear_pair_loss(
        loss,
        head_of(wing, arrays, options),
        completions_of(wing, arrays, "chosen", options),
        completions_of(wing, arrays, "rejected", options),
        arrays.get("reference_chosen", 0.0),
        arrays.get("reference_rejected", 0.0),
        beta=arrays["beta"],
        reward_gap=arrays.get("reward_gap"),
        weights=arrays.get("weights"),
        **chosen_from(("nll_weight", "average", "reduction"), options),
    )


def logits_of(arrays: Arrays, side: str, options: Mapping[str, Any]) -> Any:
    """All logits of one side."""
    logits = arrays[f"{side}_hidden"] @ arrays["weight"].T
    if arrays.get("bias") is not None:
        logits = logits + arrays["bias"]
    logits = logits * options.get("logit_scale", 1.0)
    softcap = options.get("softcap")
    if softcap is not None:  # tanh(x) = 2 * sigmoid(2 x) - 1, in any library
        logits = softcap * (2.0 * sigmoid(2.0 * logits / softcap) - 1.0)
    return logits / options.get("temperature", 1.0)


def unfused_logps(wing: Wing, arrays: Arrays, side: str, **options: Any) -> Any:
    """`sequence_logps` of all logits of one side; options as for `completions_of`."""
    options = {**options, **options.get(side, {})}
    fields = {name: arrays.get(f"{side}_{name}") for name in ("token_weights", "cu_seqlens")}
    fields |= chosen_from(("average", *SIDE_OPTIONS), options)
    logits, labels = logits_of(arrays, side, options), arrays[f"{side}_labels"]
    return wing.api.sequence_logps(logits, labels, **fields)


def unfused(wing: Wing, loss: Any, arrays: Arrays, **options: Any) -> Any:
    """The loss of the case by all logits, `sequence_logps` and `pair_loss`."""
    reduction, nll_weight = options.get("reduction", "mean"), options.get("nll_weight", 0.0)
    value = pair_loss(
        loss,
        *(unfused_logps(wing, arrays, side, **options) for side in ("chosen", "rejected")),
        arrays.get("reference_chosen", 0.0),
        arrays.get("reference_rejected", 0.0),
        beta=arrays["beta"],
        reward_gap=arrays.get("reward_gap"),
        weights=arrays.get("weights"),
        reduction=reduction,
    )
    nll = -unfused_logps(wing, arrays, "chosen", **{**options, "average": True})
    nll = nll if arrays.get("weights") is None else nll * arrays["weights"]
    return value + nll_weight * {"mean": nll.mean(), "sum": nll.sum(), "none": nll}[reduction]


def upstream(wing: Wing, values: Any) -> Any:
    """The values of a loss times different factors, so that its sum tests each of them."""
    flat = values.reshape(-1)
    factors = np.resize([1.5, -3.0, 0.75, 4.5, 1.5], flat.shape)
    return flat * wing.array(factors)


def check_same(
    wing: Wing,
    got: Callable[[Arrays], Any],
    want: Callable[[Arrays], Any],
    arrays: Arrays,
    wanted: Sequence[str],
    *,
    oracle: Wing | None = None,
    tolerance: float = 1e-10,
) -> None:
    """Two functions have the same values and gradients, relative to the largest of each array.

    `want` is a function of the oracle's arrays, which are the wing's own by default.
    """
    mine, my_grads = wing.grads(lambda a: upstream(wing, got(a)), arrays, wanted)
    if oracle is None:
        oracle = wing
    else:
        arrays = {name: oracle.array(wing.numpy(array)) for name, array in arrays.items()}
    theirs, their_grads = oracle.grads(lambda a: upstream(oracle, want(a)), arrays, wanted)
    pairs = {"value": (wing.numpy(mine), oracle.numpy(theirs))}
    pairs |= {name: (my_grads[name], their_grads[name]) for name in wanted}
    for name, (a, b) in pairs.items():
        scale = max(1.0, float(np.abs(b).max(initial=0.0)))
        np.testing.assert_allclose(
            a / scale, b / scale, rtol=tolerance, atol=tolerance, err_msg=name
        )


def check_half_precision(
    wing: Wing,
    dtype: str,
    need: Sequence[str],
    chunk_size: int | None,
    *,
    loss_scale: float = 1.0,
) -> None:
    """Against float64, the fused head is no worse than half-precision logits.

    A loss that is as small as the loss scale is large has gradients that float16 can't hold before
    they are scaled.
    """
    half = make_arrays(wing, dtype)
    half["weights"] = half["weights"] / loss_scale
    exact = {name: wing.numpy(array) for name, array in half.items()}
    for name in (*STATES, *HEAD):
        exact[name] = exact[name].astype("float64")
    exact = {name: ORACLE.array(array) for name, array in exact.items()}

    def of(by: Wing, function: Callable[..., Any], arrays: Arrays) -> dict[str, np.ndarray]:
        value, grads = by.grads(lambda a: function(by, a) * loss_scale, arrays, need)
        assert all(str(grad.dtype) in str(arrays[name].dtype) for name, grad in grads.items())
        found = {"value": by.numpy(value), **grads}
        return {name: each.astype("float64") for name, each in found.items()}

    by_logits = lambda by, a: unfused(by, SPO(), a, nll_weight=0.2)  # noqa: E731
    by_tiles = lambda by, a: fused(by, SPO(), a, nll_weight=0.2, chunk_size=chunk_size).loss  # noqa: E731
    truth, naive = of(ORACLE, by_logits, exact), of(wing, by_logits, half)
    got = of(wing, by_tiles, half)

    def error(found: Arrays, name: str, norm: float) -> float:
        size = lambda array: np.linalg.norm(np.ravel(array), norm)  # noqa: E731
        return size(found[name] - truth[name]) / size(truth[name])

    eps = float(jnp.finfo(dtype).eps)
    # A frozen head's directions are rounded once before the slope.
    most = 1.1 if "weight" in need else 1.3
    assert error(got, "value", 2) <= max(1.1 * error(naive, "value", 2), 1e-5)
    for name in need:
        assert error(got, name, np.inf) <= error(naive, name, np.inf) + eps
        assert error(got, name, 2) <= max(most * error(naive, name, 2), eps)
