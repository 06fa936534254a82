"""For JAX: log-probabilities, and the fused head from hidden states to the loss.

The functions `linear_..._loss` compute the loss from hidden states and the head's weight in one
pass, without holding the logits. The losses of log-probabilities are in `spoloss` itself.
"""

try:
    import jax as _jax  # noqa: F401
except ImportError as error:
    raise ImportError('spoloss.jax needs JAX: pip install "spoloss[jax]"') from error

from spoloss.jax._arguments import Completions, Head
from spoloss.jax._fused import LinearPairLoss
from spoloss.jax.heads import (
    linear_dpo_loss,
    linear_ipo_loss,
    linear_pair_loss,
    linear_spo_loss,
    linear_squared_loss,
)
from spoloss.jax.logps import linear_logps, sequence_logps

__all__ = [
    "Completions",
    "Head",
    "LinearPairLoss",
    "linear_dpo_loss",
    "linear_ipo_loss",
    "linear_logps",
    "linear_pair_loss",
    "linear_spo_loss",
    "linear_squared_loss",
    "sequence_logps",
]
