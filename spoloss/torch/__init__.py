"""For PyTorch: log-probabilities, the fused head from hidden states to the loss, and modules.

The functions `linear_..._loss` compute the loss from hidden states and the head's weight in one
pass, without holding the logits. The losses of log-probabilities are in `spoloss` itself.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError('spoloss.torch needs PyTorch: pip install "spoloss[torch]"') from error

from spoloss.torch._arguments import Completions, Head
from spoloss.torch._fused import LinearPairLoss
from spoloss.torch.heads import (
    linear_dpo_loss,
    linear_ipo_loss,
    linear_pair_loss,
    linear_spo_loss,
    linear_squared_loss,
)
from spoloss.torch.logps import linear_logps, sequence_logps
from spoloss.torch.models import head_of
from spoloss.torch.modules import DPOLoss, PreferenceOutput, SPOLoss, SquaredLoss

__all__ = [
    "Completions",
    "DPOLoss",
    "Head",
    "LinearPairLoss",
    "PreferenceOutput",
    "SPOLoss",
    "SquaredLoss",
    "head_of",
    "linear_dpo_loss",
    "linear_ipo_loss",
    "linear_logps",
    "linear_pair_loss",
    "linear_spo_loss",
    "linear_squared_loss",
    "sequence_logps",
]
