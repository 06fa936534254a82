"""SPO in JAX with Optax: a jitted step over plain parameters, and one over Flax NNX modules.

Tested with JAX 0.10, Optax 0.2.8 and Flax 0.12. In a train step that exists already: the line of
`spo_loss`, and the function `pair_logps`.

The trap: the label -100. Optax reads it as an index: with a vocabulary below 100 its loss is nan,
which a mask by product keeps, and with a larger one that of another token. So ignored labels are
replaced before, and masked by `where`. The reference is an argument of the jitted step: weights
that it closes over become constants of the compiled program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from spoloss import spo_loss

IGNORED = -100


def pair_logps(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Summed log-probabilities, chosen [B] and rejected [B]; rows are all chosen, then rejected."""
    targets = labels[:, 1:]  # position t predicts label t + 1
    counts = targets != IGNORED
    nll = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], jnp.where(counts, targets, 0)
    )
    chosen, rejected = jnp.split(-jnp.where(counts, nll, 0.0).sum(axis=1), 2)
    return chosen, rejected


def mean_loss(policy: Callable, reference: Callable, batch: Any, beta: float) -> jax.Array:
    """The loss of a batch of ids, mask, labels; the models are (ids, mask) -> logits."""
    policy_logps = pair_logps(policy(batch.ids, batch.mask), batch.labels)
    ref_logps = pair_logps(reference(batch.ids, batch.mask), batch.labels)
    return spo_loss(*policy_logps, *ref_logps, beta=beta)


def make_train_step(
    apply: Callable[..., jax.Array], optimizer: optax.GradientTransformation, beta: float = 0.1
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """Optax: (params, reference's, optimizer state, batch) -> (params, optimizer state, loss)."""

    def loss_of(params: Any, reference: Any, batch: Any) -> jax.Array:
        return mean_loss(
            lambda *inputs: apply(params, *inputs),
            lambda *inputs: apply(reference, *inputs),
            batch,
            beta,
        )

    @jax.jit
    def train_step(params: Any, reference: Any, state: Any, batch: Any) -> tuple:
        loss, grads = jax.value_and_grad(loss_of)(params, reference, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return train_step


@nnx.jit
def nnx_train_step(
    policy: nnx.Module, reference: nnx.Module, optimizer: nnx.Optimizer, batch: Any, beta: float
) -> jax.Array:
    """Flax NNX: one step, which changes policy and optimizer in place; returns the mean loss."""
    loss, grads = nnx.value_and_grad(mean_loss)(policy, reference, batch, beta)
    optimizer.update(policy, grads)
    return loss


if __name__ == "__main__":
    import toy_jax

    params, reference = toy_jax.params()
    batch = toy_jax.batch(6)
    optimizer = optax.adamw(1e-2)
    state = optimizer.init(params)
    train_step = make_train_step(toy_jax.apply, optimizer)
    for _ in range(3):
        params, state, loss = train_step(params, reference, state, batch)
        print("optax", loss)

    policy, reference = toy_jax.models()
    nnx_optimizer = nnx.Optimizer(policy, optimizer, wrt=nnx.Param)
    for _ in range(3):
        print("nnx", nnx_train_step(policy, reference, nnx_optimizer, batch, 0.1))
