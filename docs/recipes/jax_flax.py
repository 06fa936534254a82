"""SPO in JAX with Optax: a jitted step over plain parameters, and one over Flax NNX modules.

Tested with JAX 0.10, Optax 0.2.8 and Flax 0.12. To change an existing train step: the lines of
`mean_loss`. It uses the model's last hidden states and its head instead of the logits, and
`linear_spo_loss` computes loss and gradients in one pass without the logits.

Pitfalls: the reference must be an argument of the jitted step, because weights that the step closes
over become constants of the compiled program. Optax's losses of logits treat the label -100 as an
index: replace it, and mask with `where`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from spoloss.jax import Completions, Head, linear_logps, linear_spo_loss


def mean_loss(policy: Callable, reference: Callable, batch: Any, beta: float) -> jax.Array:
    """The loss of a batch of ids, mask and labels: all chosen rows, then all rejected ones.

    The models are (ids, mask) -> hidden states [2B, T, D] and the head's kernel [D, V].
    """
    hidden, kernel = reference(batch.ids, batch.mask)
    ref_logps = linear_logps(Head(kernel.T), Completions(hidden, batch.labels))
    hidden, kernel = policy(batch.ids, batch.mask)
    sides = map(Completions, jnp.split(hidden, 2), jnp.split(batch.labels, 2))
    return linear_spo_loss(Head(kernel.T), *sides, *jnp.split(ref_logps, 2), beta=beta).loss


def make_train_step(
    apply: Callable[..., tuple[jax.Array, jax.Array]],
    optimizer: optax.GradientTransformation,
    beta: float,
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
    """Flax NNX: one step, which changes policy and optimizer in place. Returns the mean loss."""
    loss, grads = nnx.value_and_grad(mean_loss)(policy, reference, batch, beta)
    optimizer.update(policy, grads)
    return loss


if __name__ == "__main__":
    import toy_jax

    params = reference = toy_jax.params()
    batch = toy_jax.batch(6)
    optimizer = optax.adamw(1e-2)
    state = optimizer.init(params)
    train_step = make_train_step(toy_jax.apply, optimizer, beta=0.025)
    for _ in range(3):
        params, state, loss = train_step(params, reference, state, batch)
        print("optax", loss)

    policy, reference = toy_jax.Model(reference), toy_jax.Model(reference)
    nnx_optimizer = nnx.Optimizer(policy, optimizer, wrt=nnx.Param)
    for _ in range(3):
        print("nnx", nnx_train_step(policy, reference, nnx_optimizer, batch, 0.025))
