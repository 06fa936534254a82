"""Random numbers by name: what two names draw is independent, what one name draws is fixed."""

from __future__ import annotations

import hashlib

import torch


def number(*names: object) -> int:
    """A seed for the thing of these names."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:6], "big")


def generator(*names: object) -> torch.Generator:
    """PyTorch's generator for the thing of these names."""
    return torch.Generator().manual_seed(number(*names))
