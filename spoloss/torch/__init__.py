"""Floor 3: what only PyTorch can do. From a language model's logits to the loss."""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError('spoloss.torch needs PyTorch: pip install "spoloss[torch]"') from error

from spoloss.torch.fused import (
    LinearPairLoss,
    linear_dpo_loss,
    linear_pair_loss,
    linear_spo_loss,
)
from spoloss.torch.logps import linear_logps, sequence_logps
from spoloss.torch.modules import DPOLoss, PreferenceOutput, SPOLoss, SquaredLoss

__all__ = [
    "DPOLoss",
    "LinearPairLoss",
    "PreferenceOutput",
    "SPOLoss",
    "SquaredLoss",
    "linear_dpo_loss",
    "linear_logps",
    "linear_pair_loss",
    "linear_spo_loss",
    "sequence_logps",
]
