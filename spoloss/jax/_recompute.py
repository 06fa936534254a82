"""The derivative rules of token log-probabilities, which recompute every tile in the backward.

They work for any function of the log-probabilities. A loss of the margin needs no recomputation:
see `_one_pass.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from spoloss.jax._labels import Labels, Reading
from spoloss.jax._mesh import Split, vary_alike
from spoloss.jax._plan import on_platform
from spoloss.jax._residuals import Kinds, marks_of, or_empty, or_none, or_zero, wanted_of
from spoloss.jax._softmax import Head, HeadOptions, HeadSums, Wanted
from spoloss.jax._tokens import Table, Tile, rows_for_tokens


@dataclass(frozen=True)
class TokenCall:
    """The static part of a call, known before tracing."""

    head: HeadOptions
    reading: Reading
    split: Split

    def on_platform(
        self, run: Callable[..., Any], labels: Labels, weight: Array, *args: Any
    ) -> Any:
        """`run(table of the call's tokens on this device, *args)`."""

        def with_tiles(rows: int, *args: Any) -> Any:
            return run(Table((labels,), self.reading, rows, whole_pairs=False), *args)

        rows = functools.partial(rows_for_tokens, (labels,), self.reading)
        return on_platform(with_tiles, rows, len(weight), self.head.chunk_size, *args)

    @property
    def specs(self) -> tuple[Any, ...]:
        """The layouts of hidden states, weight, bias and labels on the mesh."""
        pairs, words = self.split.of_pairs, self.split.of_words
        return pairs, words, words, Labels(pairs, self.split.whole)


@functools.partial(jax.jit, static_argnums=0)
def token_logps(
    call: TokenCall, hidden: Array, weight: Array, bias: Array | None, labels: Labels
) -> Array:
    """The log-probabilities [B, T] of the labels that the positions predict."""
    return _token_logps(call, *vary_alike((hidden, weight, bias, labels)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logps(
    call: TokenCall, hidden: Array, weight: Array, bias: Array | None, labels: Labels
) -> Array:
    logps, _ = _look(call, hidden, weight, bias, labels, directions=False)
    return logps


def _look(
    call: TokenCall,
    hidden: Array,
    weight: Array,
    bias: Array | None,
    labels: Labels,
    *,
    directions: bool,
) -> tuple[Array, Array | None]:
    """Log-probabilities and, with `directions`, their derivatives by the hidden states."""

    def on_device(
        hidden: Array, weight: Array, bias: Array | None, labels: Labels
    ) -> tuple[Array, Array | None]:
        head = Head.of(weight, bias, call.head)
        flat = hidden.reshape(-1, hidden.shape[2])

        def visit(table: Table) -> tuple[Array, Array | None]:
            def step(tile: Tile, carry: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
                logps, by_hidden = carry
                softmax = head.softmax(table.take((flat,), tile), tile.targets, tile.filled)
                logps = table.put(logps, softmax.logps, tile)
                if by_hidden is not None:
                    by_hidden = table.put(by_hidden, head.by_hidden(softmax), tile)
                return logps, by_hidden

            zeros = jnp.broadcast_to(labels.zero(head.dtype), labels.ids.size)
            start = zeros, jnp.zeros_like(flat) if directions else None
            return table.visit_all(step, start)

        logps, by_hidden = call.on_platform(visit, labels, weight)
        return (
            logps.reshape(labels.ids.shape),
            None if by_hidden is None else by_hidden.reshape(hidden.shape),
        )

    pairs = call.split.of_pairs
    run = call.split.run(on_device, call.specs, (pairs, pairs))
    logps, by_hidden = run(hidden, weight, bias, labels)
    return logps, by_hidden


def _forward(call: TokenCall, *primals: Any) -> tuple[Array, Any]:
    hidden, weight, bias, _ = primals
    wanted = Wanted(
        (hidden.perturbed,),
        weight=weight.perturbed,
        bias=bias is not None and bias.perturbed,
    )
    values = custom_vjp_primal_tree_values(primals)  # type: ignore[no-untyped-call]
    # A frozen head needs no recomputation, because the forward computes the directions.
    at_once = any(wanted.hidden) and not wanted.head
    logps, directions = _look(call, *values, directions=at_once)
    read = values if wanted.head else jax.tree.map(lambda a: or_empty(None, a.dtype), values)
    kept = marks_of(wanted), or_empty(directions, values[0].dtype), read
    return logps, (*kept, Kinds.of(values[:3]))


def _backward(call: TokenCall, residual: Any, upstream: Array | SymbolicZero) -> tuple[Any, ...]:
    marks, directions, inputs, kinds = residual
    wanted = wanted_of(marks)
    gradients: tuple[Array | None, ...] = (None, None, None)
    if not isinstance(upstream, SymbolicZero):
        if wanted.head:
            by_hidden, by_head = _look_again(call, wanted, inputs, upstream)
            gradients = (by_hidden, *by_head)
        else:
            gradients = (scaled(or_none(directions), upstream), None, None)
    return *map(or_zero, gradients, kinds.each), None


def scaled(directions: Array | None, factor: Array) -> Array | None:
    """Directions [B, T, D] times a factor [B, T] or [B, 1]. A factor of 0 gives 0 even for nan."""
    if directions is None:
        return None
    factor = factor[..., None]
    product = directions.astype(factor.dtype) * factor
    return jnp.where(factor == 0.0, 0.0, product).astype(directions.dtype)


def _look_again(
    call: TokenCall,
    wanted: Wanted,
    inputs: tuple[Array, Array, Array | None, Labels],
    upstream: Array,
) -> tuple[Array | None, HeadSums]:
    """The gradients by hidden states and head from the upstream gradient [B, T]."""

    def on_device(
        hidden: Array, weight: Array, bias: Array | None, labels: Labels, upstream: Array
    ) -> tuple[Array | None, HeadSums]:
        head = Head.of(weight, bias, call.head)
        flat, by_token = hidden.reshape(-1, hidden.shape[2]), upstream.reshape(-1)
        Carry = tuple[Array | None, HeadSums]

        def visit(table: Table) -> Carry:
            def step(tile: Tile, carry: Carry) -> Carry:
                by_hidden, by_head = carry
                factor = by_token.at[tile.token].get(mode="fill", fill_value=0)
                states = table.take((flat,), tile)
                softmax = head.softmax(states, tile.targets, factor != 0.0)
                if by_hidden is not None:
                    rows = factor[:, None] * head.by_hidden(softmax)
                    by_hidden = table.put(by_hidden, rows, tile)
                return by_hidden, head.add(by_head, softmax, states, factor)

            zeros = jnp.zeros_like(flat) if wanted.hidden[0] else None
            return table.visit_all(step, (zeros, head.zeros(wanted)))

        by_hidden, by_head = call.on_platform(visit, labels, weight)
        by_hidden = None if by_hidden is None else by_hidden.reshape(hidden.shape)
        return by_hidden, call.split.sum_pairs(by_head).like(weight, bias)

    pairs, words = call.split.of_pairs, call.split.of_words
    run = call.split.run(on_device, (*call.specs, pairs), (pairs, words))
    by_hidden, by_head = run(*inputs, upstream)
    return by_hidden, by_head


_token_logps.defvjp(_forward, _backward, symbolic_zeros=True)
