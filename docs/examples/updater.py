"""The optimizer of a stage: AdamW with warm-up, linear decay and gradient clipping."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from errors import DivergedError

WARM_UP_SHARE = 0.1
MAX_GRAD_NORM = 1.0


class Updater:
    """Updates a model for a number of steps, as long as loss and gradient are finite."""

    def __init__(
        self, model: PreTrainedModel, stage: str, *, steps: int, lr: float, advice: str
    ) -> None:
        """Sets the stage up.

        Args:
          model: the model to train.
          stage: the name of the stage, for the records.
          steps: the number of steps.
          lr: the highest learning rate, at the end of the warm-up.
          advice: what to try if the stage diverges.
        """
        self.stage, self.steps, self.advice = stage, steps, advice
        self.count = 0
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.lr_factor)

    def lr_factor(self, step: int) -> float:
        """Returns the factor of the learning rate at a step: linear warm-up, then linear decay."""
        warm_up = math.ceil(WARM_UP_SHARE * self.steps)
        return min((step + 1) / warm_up, (self.steps - step) / (self.steps - warm_up + 1))

    def step(self, loss: Tensor) -> dict[str, str | float]:
        """Clips the gradients and updates the model.

        Args:
          loss: the loss, after its backward pass.

        Returns:
          The stage, the step, the loss, the learning rate and the gradient norm before clipping.

        Raises:
          DivergedError: the loss or the gradient norm is not finite. The model is then unchanged.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM).item()
        value, lr = loss.item(), self.optimizer.param_groups[0]["lr"]
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise DivergedError(
                f"{self.stage} step {self.count}: expected a finite loss and gradient, got loss "
                f"{value} and gradient norm {norm}; try {self.advice}"
            )
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        counted: dict[str, str | float] = {"stage": self.stage, "step": self.count}
        self.count += 1
        return {**counted, "loss": value, "lr": lr, "grad_norm": norm}
