"""The gradient that a recipe must make, written from equation 6 and without the package.

Every sequence runs through the model alone and unpadded, in float64: neither the padding, the
batches nor the processes of a recipe can be in what it is compared with.
"""

from __future__ import annotations

import copy
import importlib
import math
import re
import runpy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.interpreter import RECIPES


def load(name: str) -> ModuleType:
    """A file of docs/recipes, which lies on the path of the tests (pyproject.toml)."""
    return importlib.import_module(name)


toy = load("toy")
Grads = dict[str, Tensor]

BETA = 0.1
PAIRS = toy.pairs(6)
EVEN, UNEVEN = 3, 4  # pairs of a micro-batch: 3 + 3, or 4 + 2


def models(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A policy and a reference with slightly different weights, in float64 unless told otherwise.

    Qwen2 normalises in float32, so a gradient is right to 1e-6 or wrong.
    """
    policy, reference = toy.models(**{"dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return policy, reference


def moved(weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The weights of toy_jax.py or toy_mlx.py, slightly changed, for a reference."""
    random = np.random.default_rng(1)
    return {name: w + 0.05 * random.normal(size=w.shape) for name, w in weights.items()}


class Recorder(torch.optim.SGD):
    """Keeps the gradient of each step and moves nothing."""

    def __init__(self, module: nn.Module) -> None:
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.steps: list[Grads] = []
        super().__init__(self.trained.values(), lr=0.0)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        self.steps.append({name: p.grad.clone() for name, p in self.trained.items()})
        return loss


class MeanOfEmbeddings(nn.Module):
    """The model of toy_jax.py and toy_mlx.py for the oracle."""

    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__()
        for name, array in params.items():
            setattr(self, name, nn.Parameter(torch.tensor(np.asarray(array))))

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        count = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        states = self.embed[input_ids].cumsum(dim=1) / count
        return SimpleNamespace(logits=torch.tanh(states) @ self.head)


def exact_step(
    policy: nn.Module,
    reference: nn.Module,
    pairs: Iterable[Any],
    beta: float | Sequence[float] = BETA,
    *,
    weights: Sequence[float] | None = None,
    linear_below: float = -math.inf,
) -> tuple[float, Grads]:
    """The mean loss of all pairs, and its gradient in each trainable parameter, in float64."""
    policy, reference = copy.deepcopy(policy).double(), copy.deepcopy(reference).double().eval()
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    h = torch.stack(
        [_log_odds(policy, *pair) - _log_odds(reference, *pair).detach() for pair in pairs]
    )
    x = torch.as_tensor(beta, dtype=h.dtype) * h
    x0 = x.detach().clamp(min=linear_below)  # below it the tangent: l(x0) + l'(x0) * (x - x0)
    losses = torch.where(
        x < linear_below, torch.exp(-x0) * ((x0 - 1.0) * (x - x0) - x0), -x * torch.exp(-x)
    )
    loss = (losses if weights is None else torch.tensor(weights, dtype=h.dtype) * losses).mean()
    grads = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
    return loss.item(), dict(zip(trained, grads, strict=True))


def _log_odds(
    model: nn.Module, prompt: list[int], chosen: list[int], rejected: list[int]
) -> Tensor:
    return _log_prob(model, prompt, chosen) - _log_prob(model, prompt, rejected)


def _log_prob(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return -F.cross_entropy(logits, torch.tensor(completion), reduction="sum")


def relative_error(grads: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """|g - exact| / |exact| over the whole gradient; the names must be the same."""
    assert grads.keys() == exact.keys(), grads.keys() ^ exact.keys()
    off = torch.cat([(grads[name].detach().double() - exact[name]).flatten() for name in exact])
    size = torch.cat([exact[name].flatten() for name in exact])
    return (off.norm() / size.norm()).item()


def assert_step(
    loss: Any, grads: Grads, exact: tuple[float, Grads], tolerance: float = 1e-6
) -> None:
    """Loss and gradient of a step are those of `exact_step`."""
    assert float(loss) == pytest.approx(exact[0], rel=tolerance)
    assert relative_error(grads, exact[1]) < tolerance


def grads_of(policy: nn.Module) -> Grads:
    return {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}


def run_script(name: str) -> list[float]:
    """Starts a recipe as a script in this process: the numbers that it printed.

    Frameworks may warn; the recipe and the package may not.
    """
    path = str(RECIPES / f"{name}.py")
    with warnings.catch_warnings(record=True) as caught, redirect_stdout(StringIO()) as printed:
        warnings.simplefilter("always")
        runpy.run_path(path, run_name="__main__")
    ours = [str(w.message) for w in caught if w.filename == path or "spoloss" in w.filename]
    assert not ours, ours
    return [float(number) for number in re.findall(r"-?\d+\.\d+(?:e-\d+)?", printed.getvalue())]
