"""SPO without autograd: NumPy trains a bigram model with the analytic gradient.

Tested with NumPy 2.4, without PyTorch or JAX. In your own code without autograd, `spo_grad` gives
d loss / d log-probability of each completion. You continue with the chain rule, here to the table
of logits.

Pitfall: `spo_grad` differentiates its own `reduction`. Use the reduction of the loss you report.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spoloss import spo_grad, spo_loss

Table = NDArray[np.float64]


def log_softmax(table: Table) -> Table:
    """Log-probabilities [V, V] of the next token, with one row for each previous token."""
    table = table - table.max(axis=1, keepdims=True)
    return table - np.log(np.exp(table).sum(axis=1, keepdims=True))


def sequence_logps(logps: Table, prompts: Sequence[list], completions: Sequence[list]) -> NDArray:
    """Summed log-probabilities of the completions [B]. Every prompt has at least one token."""
    return np.array(
        [logps[before(p, c), c].sum() for p, c in zip(prompts, completions, strict=True)]
    )


def before(prompt: list[int], completion: list[int]) -> list[int]:
    """The previous token of each token of the completion."""
    return [prompt[-1], *completion[:-1]]


def loss_and_grad(
    table: Table, reference: Table, pairs: Sequence[tuple], beta: float
) -> tuple[float, Table]:
    """The mean loss of pairs (prompt, chosen, rejected), and its gradient in the table."""
    prompts, *sides = zip(*pairs, strict=True)
    logps, ref_logps = log_softmax(table), log_softmax(reference)
    four = [sequence_logps(side_of, prompts, s) for side_of in (logps, ref_logps) for s in sides]
    by_logp = spo_grad(*four, beta=beta)
    grad = np.zeros_like(table)
    for completions, slopes in zip(
        sides, (by_logp.policy_chosen, by_logp.policy_rejected), strict=True
    ):
        for prompt, completion, slope in zip(prompts, completions, slopes, strict=True):
            rows = before(prompt, completion)
            # d log softmax(row)[token] / d row = onehot(token) - softmax(row)
            np.add.at(grad, (rows, completion), slope)
            np.subtract.at(grad, rows, slope * np.exp(logps[rows]))
    return float(spo_loss(*four, beta=beta)), grad


if __name__ == "__main__":
    random = np.random.default_rng(0)
    reference = random.normal(size=(20, 20))
    table = reference.copy()
    pairs = [tuple(random.integers(20, size=n).tolist() for n in (3, 5, 7)) for _ in range(8)]
    for _ in range(5):
        loss, grad = loss_and_grad(table, reference, pairs, beta=0.1)
        table -= 20.0 * grad
        print(loss)
