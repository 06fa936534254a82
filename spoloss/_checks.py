"""Layer 0: checks of the arrays of a head and of completions, for both wings.

They read shapes, dtypes and devices but no numbers, so a compiler can trace them. `xp` is the
wing's library, `torch` or `jax.numpy`. Messages name arguments as the caller spells them:
`head.weight`, `chosen.labels`.
"""

from __future__ import annotations

from typing import Any

from spoloss._arrays import check_device, check_real
from spoloss._options import check_token_options


def check_floating(xp: Any, name: str, value: Any) -> None:
    """Raise an error for anything but a real floating array of the wing's library."""
    _check_array(xp, name, value)
    check_real(xp, name, value)


def check_tokens(xp: Any, prefix: str, tokens: Any, of: str) -> None:
    """Raise an error for `Completions` whose fields do not fit to their `hidden`.

    Args:
      xp: the wing's library.
      prefix: what comes before the names of the fields in messages.
      tokens: the completions. Their `hidden` has been checked: hidden states or logits, [B, T, .].
      of: the name of `hidden` in messages.
    """
    name, labels, states = f"{prefix}labels", tokens.labels, tokens.hidden
    check_token_options(prefix, tokens.ignore_index, tokens.shift)
    _check_integer(xp, name, labels)
    if labels.shape != states.shape[:2]:
        raise ValueError(
            f"{name} must have the shape [B, T] = {tuple(states.shape[:2])} of {of}, "
            f"got {tuple(labels.shape)}"
        )
    check_device(xp, name, labels, of, states)
    if tokens.token_weights is not None:
        _check_token_weights(xp, f"{prefix}token_weights", tokens.token_weights, name, labels)
    if tokens.cu_seqlens is not None:
        _check_cu_seqlens(xp, f"{prefix}cu_seqlens", tokens.cu_seqlens, name, labels)


def check_pairs(chosen: int, rejected: int) -> None:
    """Raise an error for different numbers of chosen and rejected completions."""
    if chosen != rejected:
        raise ValueError(
            "chosen and rejected must have the same number of completions, "
            f"got {chosen} and {rejected}"
        )


def _check_token_weights(xp: Any, name: str, weights: Any, of: str, labels: Any) -> None:
    check_floating(xp, name, weights)
    if weights.shape != labels.shape:
        raise ValueError(
            f"{name} must have the shape {tuple(labels.shape)} of {of}, got {tuple(weights.shape)}"
        )
    check_device(xp, name, weights, of, labels)


def _check_cu_seqlens(xp: Any, name: str, cu_seqlens: Any, of: str, labels: Any) -> None:
    _check_integer(xp, name, cu_seqlens)
    if len(labels) != 1:
        raise ValueError(
            f"{name} cuts one row into sequences: {of} must have shape [1, T], "
            f"got {tuple(labels.shape)}"
        )
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"{name} must have shape [S + 1] with S >= 1, got {tuple(cu_seqlens.shape)}"
        )
    check_device(xp, name, cu_seqlens, of, labels)


def _check_integer(xp: Any, name: str, value: Any) -> None:
    _check_array(xp, name, value)
    dtype = value.dtype
    if xp.__name__ == "torch":
        integer = not (dtype.is_floating_point or dtype.is_complex or dtype == xp.bool)
    else:
        integer = xp.isdtype(dtype, "integral")
    if not integer:
        raise TypeError(f"{name} must be integer, got {dtype}")


def _check_array(xp: Any, name: str, value: Any) -> None:
    torch = xp.__name__ == "torch"
    if not isinstance(value, xp.Tensor if torch else xp.ndarray):
        kind = "PyTorch tensor" if torch else "JAX array"
        raise TypeError(f"{name} must be a {kind}, got {type(value).__name__}")
