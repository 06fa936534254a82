"""SPO in MLX: a compiled train step over an `mlx.nn` module.

Tested with MLX 0.32. To change an existing train step: the line of `spo_loss`, and the function
`pair_logps`. Policy and reference are called as ids -> logits, like the models of mlx-lm. With
padding on the right, a causal model needs no mask.

Pitfalls: a compiled step treats everything that it closes over as a constant. Therefore the
reference's weights are among its `inputs`. Otherwise a reference that is loaded later would have no
effect. MLX treats the label -100 as an index and checks no bounds, so replace ignored labels first,
and mask them with `where`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
from mlx import nn
from mlx.optimizers import Optimizer

from spoloss import spo_loss

IGNORED = -100


def pair_logps(logits: mx.array, labels: mx.array) -> tuple[mx.array, mx.array]:
    """Summed log-probabilities, chosen [B] and rejected [B]. Rows are all chosen, then rejected."""
    targets = labels[:, 1:]  # position t predicts label t + 1
    counts = targets != IGNORED
    nll = nn.losses.cross_entropy(logits[:, :-1], mx.where(counts, targets, 0))
    chosen, rejected = mx.split(-mx.where(counts, nll, 0.0).sum(axis=1), 2)
    return chosen, rejected


def mean_loss(
    policy: nn.Module, reference: nn.Module, ids: mx.array, labels: mx.array, beta: float
) -> mx.array:
    """The loss of a batch of ids and labels, both [2B, T]."""
    policy_logps = pair_logps(policy(ids), labels)
    ref_logps = pair_logps(reference(ids), labels)
    return spo_loss(*policy_logps, *ref_logps, beta=beta)


def make_train_step(
    policy: nn.Module, reference: nn.Module, optimizer: Optimizer, beta: float
) -> Callable[[mx.array, mx.array], mx.array]:
    """(ids, labels) -> the mean loss. Each step changes policy and optimizer in place."""
    optimizer.init(policy.trainable_parameters())
    trained = [policy.state, optimizer.state]
    loss_and_grads = nn.value_and_grad(policy, mean_loss)

    # Compiled again for every new shape: pad batches to a few lengths.
    @partial(mx.compile, inputs=[*trained, reference.state], outputs=trained)
    def update(ids: mx.array, labels: mx.array) -> mx.array:
        loss, grads = loss_and_grads(policy, reference, ids, labels, beta)
        optimizer.update(policy, grads)
        return loss

    def train_step(ids: mx.array, labels: mx.array) -> mx.array:
        loss = update(ids, labels)
        mx.eval(loss, *trained)  # MLX is lazy: without this, the graph grows from step to step
        return loss

    return train_step


if __name__ == "__main__":
    import toy_mlx
    from mlx.optimizers import AdamW

    policy, reference = toy_mlx.model(), toy_mlx.model().freeze()
    batch = toy_mlx.batch(6)
    train_step = make_train_step(policy, reference, AdamW(1e-2), beta=0.025)
    for _ in range(3):
        print(train_step(*batch).item())
