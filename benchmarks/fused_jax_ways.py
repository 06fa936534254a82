"""The problem of `benchmarks.fused_jax`, the ways from it to a preference loss, its solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import spoloss.jax as wing
from spoloss import DPO, SPO

BETA = 0.1
ROWS = 512
"""Tokens of a tile of those ways that choose it: 62.5 MiB of float32 logits at V = 32,000."""


class Problem(NamedTuple):
    """What comes out of a language model; position t predicts label t.

    Attributes:
      chosen: [P, T, D].
      rejected: [P, T, D].
      weight: [V, D].
      labels: [2, P, T].
      reference: [2, P].
    """

    chosen: Array
    rejected: Array
    weight: Array
    labels: Array
    reference: Array

    @property
    def hidden(self) -> Array:
        """Chosen, then rejected sequences, [2P, T, D]."""
        return jnp.concatenate([self.chosen, self.rejected])

    @property
    def flat_labels(self) -> Array:
        """Their labels, [2P, T]."""
        return self.labels.reshape(-1, self.labels.shape[2])


def make_problem(pairs: int, tokens: int, width: int, vocab: int) -> Problem:
    """A random problem in float32, whose logits and hidden states have unit variance."""
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    problem = Problem(
        normal(pairs, tokens, width),
        normal(pairs, tokens, width),
        normal(vocab, width) / np.float32(np.sqrt(width)),
        jnp.asarray(random.integers(0, vocab, (2, pairs, tokens)), jnp.int32),
        jnp.zeros((2, pairs)),
    )
    # Margins between 1 and 6 nats: a reference without the policy's own log-probabilities would
    # push the slopes to 0 or, with SPO, to infinity.
    nats = jnp.asarray(0.5 + 2.5 * random.random(pairs), jnp.float32)
    logps = jax.jit(checkpointed_logps)(problem)
    return problem._replace(reference=logps + jnp.stack([-nats, nats]))


# ------------------------------------------------------------------------------------- the losses


def dpo(chosen: Array, rejected: Array) -> Array:
    """DPO eq. 7 of the log-ratios [P] of both sides."""
    return -jax.nn.log_sigmoid(BETA * (chosen - rejected))


def spo(chosen: Array, rejected: Array) -> Array:
    """SPO, paper eq. 6."""
    x = BETA * (chosen - rejected)
    return -x * jnp.exp(-x)


def apo_down(chosen: Array, rejected: Array, beta: float = BETA) -> Array:
    """APO-down, as in TRL: a loss of the two log-ratios, not of their difference alone."""
    return jax.nn.sigmoid(beta * chosen) - jax.nn.sigmoid(beta * (chosen - rejected)) + 1.0


def kto(chosen: Array, rejected: Array) -> Array:
    """KTO eq. 8 with the batch's mean log-ratio as its reference point: a loss of completions."""
    ratios = jnp.stack([chosen, rejected])
    point = lax.stop_gradient(jnp.maximum(ratios.mean(), 0.0))
    return 1.0 - jax.nn.sigmoid(BETA * jnp.stack([ratios[0] - point, point - ratios[1]]))


Formula = Callable[[Array, Array], Array]


def mean_loss(logps: Array, problem: Problem, formula: Formula = dpo) -> Array:
    """The mean loss of log-probabilities [2, P]."""
    return formula(*(logps - problem.reference)).mean()


class _APODown:
    """`apo_down` as a pair loss of the package."""

    value = staticmethod(apo_down)

    @staticmethod
    def slopes(chosen: Array, rejected: Array, beta: float) -> tuple[Array, Array]:
        alone, both = jax.nn.sigmoid(beta * chosen), jax.nn.sigmoid(beta * (chosen - rejected))
        apart = beta * both * (1.0 - both)
        return beta * alone * (1.0 - alone) - apart, apart


# --------------------------------------------------------------------------------------- the ways


def by_pair(logps: Array, problem: Problem) -> Array:
    """Sums over tokens [2P, T] as [2, P]."""
    return logps.sum(axis=1).reshape(problem.reference.shape)


def full_logits(problem: Problem) -> Array:
    """All logits, `jax.nn.log_softmax`, `jnp.take_along_axis`: what is typed first."""
    logps = jax.nn.log_softmax(problem.hidden @ problem.weight.T)
    found = jnp.take_along_axis(logps, problem.flat_labels[..., None], axis=2)[..., 0]
    return mean_loss(by_pair(found, problem), problem)


def optax_cross_entropy(problem: Problem) -> Array:
    """All logits, and Optax's cross-entropy."""
    logits = problem.hidden @ problem.weight.T
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, problem.flat_labels)
    return mean_loss(by_pair(-nll, problem), problem)


def checkpointed_logps(problem: Problem) -> Array:
    """Log-probabilities [2, P] by a scan over tiles of tokens whose backward works again."""

    @jax.checkpoint
    def step(_: None, tile: tuple[Array, Array]) -> tuple[None, Array]:
        hidden, labels = tile
        logits = hidden @ problem.weight.T
        return None, -optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    hidden = problem.hidden.reshape(-1, ROWS, problem.hidden.shape[2])
    _, logps = lax.scan(step, None, (hidden, problem.labels.reshape(-1, ROWS)))
    return by_pair(logps.reshape(problem.flat_labels.shape), problem)


def scan_and_checkpoint(problem: Problem) -> Array:
    """`lax.scan` and `jax.checkpoint` over tiles of tokens, as MaxText and others tile."""
    return mean_loss(checkpointed_logps(problem), problem)


def spoloss(loss: Any, problem: Problem) -> Array:
    """This package in one pass, for a loss of pairs."""
    given = wing.Head(problem.weight), *_completions(problem), *problem.reference
    return wing.linear_pair_loss(loss, *given, beta=BETA).loss


def spoloss_logps(formula: Formula, problem: Problem) -> Array:
    """This package for any loss of log-probabilities."""
    head = wing.Head(problem.weight)
    logps = [wing.linear_logps(head, each) for each in _completions(problem)]
    return mean_loss(jnp.stack(logps), problem, formula)


def _completions(problem: Problem) -> list[wing.Completions]:
    sides = zip((problem.chosen, problem.rejected), problem.labels, strict=True)
    return [wing.Completions(hidden, labels, shift=False) for hidden, labels in sides]


class Way(NamedTuple):
    """A way to the mean loss, and the formula of the loss."""

    loss: Callable[[Problem], Array]
    formula: Formula = dpo


WAYS = {
    "full_logits": Way(full_logits),
    "optax": Way(optax_cross_entropy),
    "scan_checkpoint": Way(scan_and_checkpoint),
    "spoloss": Way(partial(spoloss, DPO())),
    "spoloss_spo": Way(partial(spoloss, SPO()), spo),
    "spoloss_apo_down": Way(partial(spoloss, _APODown()), apo_down),
    "spoloss_kto": Way(partial(spoloss_logps, kto), kto),
}
DEFAULT_WAYS = ("full_logits", "optax", "spoloss_spo", "spoloss_apo_down", "spoloss_kto")


@dataclass(frozen=True)
class Floor:
    """The products of a head that recomputes nothing, in tiles, and nothing else.

    Attributes:
      rows: tokens of a tile.
      blocks: in how many parts the weight's gradient grows.
      frozen: whether it has none.
    """

    rows: int
    blocks: int
    frozen: bool

    def __call__(self, problem: Problem) -> tuple[Array, ...]:
        """The products in the place of the gradients."""
        hidden, weight = problem.hidden.reshape(-1, problem.hidden.shape[2]), problem.weight
        width = len(weight) // self.blocks

        def step(i: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            by_hidden, by_weight = carry
            tile = lax.dynamic_slice_in_dim(hidden, i * self.rows, self.rows)
            logits = tile @ weight.T
            by_hidden = lax.dynamic_update_slice_in_dim(
                by_hidden, logits @ weight, i * self.rows, 0
            )
            if self.frozen:
                return by_hidden, by_weight

            def add(j: Any, by_weight: Array) -> Array:
                block = lax.dynamic_slice_in_dim(logits, j * width, width, axis=1)
                part = lax.dot_general(block, tile, (((0,), (0,)), ((), ())))
                grown = lax.dynamic_slice_in_dim(by_weight, j * width, width) + part
                return lax.dynamic_update_slice_in_dim(by_weight, grown, j * width, 0)

            return by_hidden, lax.fori_loop(0, self.blocks, add, by_weight)

        zeros = jnp.zeros_like(hidden), jnp.zeros((1, 1) if self.frozen else weight.shape)
        return lax.fori_loop(0, len(hidden) // self.rows, step, zeros)


def floors(tokens: int, *, frozen: bool) -> list[Floor]:
    """Tilings that are tried for the floor."""
    return [
        Floor(rows, blocks, frozen)
        for rows in (256, 512, 1024)
        for blocks in ((1,) if frozen else (1, 8))
        if tokens % rows == 0
    ]
