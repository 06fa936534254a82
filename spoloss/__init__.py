"""Preference losses for language-model alignment: SPO, DPO and the squared loss.

SPO is Stable Preference Optimization (Y. Tan, "A Stable and Principled Loss Function for Direct
Language Model Alignment", arXiv:2508.07137v1): l = -x * e^(-x), x = beta * h. It is not Smart
Predict-then-Optimize, Soft Preference Optimization or SPPO, which share the letters.
"""

from spoloss.gradients import PairGrad, dpo_grad, ipo_grad, pair_grad, spo_grad, squared_grad
from spoloss.losses import DPO, SPO, MarginLoss, PairLoss, SignedLog, Squared
from spoloss.metrics import preference_metrics
from spoloss.pairs import (
    Rewards,
    dpo_loss,
    implicit_rewards,
    ipo_loss,
    log_ratio_margin,
    pair_loss,
    spo_loss,
    squared_loss,
)
from spoloss.paper import PairProbGrad, dpo_prob_grad, spo_prob_grad

__version__ = "0.3.0"

__all__ = [
    "DPO",
    "SPO",
    "MarginLoss",
    "PairGrad",
    "PairLoss",
    "PairProbGrad",
    "Rewards",
    "SignedLog",
    "Squared",
    "dpo_grad",
    "dpo_loss",
    "dpo_prob_grad",
    "implicit_rewards",
    "ipo_grad",
    "ipo_loss",
    "log_ratio_margin",
    "pair_grad",
    "pair_loss",
    "preference_metrics",
    "spo_grad",
    "spo_loss",
    "spo_prob_grad",
    "squared_grad",
    "squared_loss",
]
