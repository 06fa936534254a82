"""Floor 3: what only PyTorch can do. From a language model's logits to the loss."""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError('spoloss.torch needs PyTorch: pip install "spoloss[torch]"') from error

from spoloss.torch.logps import sequence_logps
from spoloss.torch.modules import DPOLoss, PreferenceOutput, SPOLoss, SquaredLoss

__all__ = ["DPOLoss", "PreferenceOutput", "SPOLoss", "SquaredLoss", "sequence_logps"]
