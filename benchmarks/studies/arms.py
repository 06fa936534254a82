"""The arms of an experiment: which loss, at which beta, on which labels.

An arm is written FORM:BETA for labels by the sign of the reward difference, or FORM:BETA@LABELS:

    noisy                     labels drawn from Bradley-Terry
    flip20, flip40            20 or 40 % of the clean labels exchanged, whatever the difference

With ~RATE behind it, an arm has a learning rate of its own.

The forms:

    dpo                       DPO
    spo                       SPO, equation 6
    spo-below0                SPO with linear_below=0
    spo-below-1               SPO with linear_below=-1
    spo-below-2               SPO with linear_below=-2
    squared                   (h - 1/beta)^2: squared:0.2 is IPO at 0.1

and with the reward difference of each pair known, for clean labels alone:

    dpo-soft                  DPO whose labels are the probabilities s(gap)
    squared-gap               (h - gap/beta)^2
    spo-gap                   SPO with reward_gap=gap
    spo-gap-floor             the same with gaps of at least 0.5
    spo-gap-weighted          spo-gap with weights=gap^2
    spo-gap-weighted-below0   the same with linear_below=0
    dpo-weighted              DPO with weights=gap
    spo-weighted-below0       SPO with weights=gap and linear_below=0
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.studies import InputError
from spoloss import DPO, SPO, MarginLoss, Squared, pair_loss

GAP_FLOOR = 0.5
CLEAN, NOISY = "clean", "noisy"
FLIPPED_SHARES = {"flip20": 0.2, "flip40": 0.4}
LABELS = (CLEAN, NOISY, *FLIPPED_SHARES)


class Logps(NamedTuple):
    """Log-probabilities of B pairs, nats, [B] each."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor

    def reversed(self) -> Logps:
        """The pairs with chosen and rejected exchanged."""
        pc, pr, rc, rr = self
        return Logps(pr, pc, rr, rc)


@dataclass(frozen=True)
class Term:
    """One pair loss; an arm's loss is the sum of its terms.

    Attributes:
      beta: a number, or [B] where every pair has its own.
      weights: factors of the pairs, [B]; None is 1.
      reversed: whether chosen and rejected change places.
    """

    beta: Tensor | float
    weights: Tensor | None = None
    reversed: bool = False


def _both_orders(beta: float, gap: Tensor) -> list[Term]:
    """Both orders of each pair, each with the probability that Bradley-Terry gives it."""
    right = gap.sigmoid()
    return [Term(beta, weights=right), Term(beta, weights=1.0 - right, reversed=True)]


def _weighted_gap(beta: float, gap: Tensor) -> list[Term]:
    return [Term(beta / gap, weights=gap**2)]


def _weighted(beta: float, gap: Tensor) -> list[Term]:
    return [Term(beta, weights=gap)]


@dataclass(frozen=True)
class Form:
    """A loss of the library, and how it is put on pairs of known reward difference.

    Attributes:
      loss: the loss.
      terms: what it becomes with a beta and gaps [B]; None does not look at the gaps.
    """

    loss: MarginLoss
    terms: Callable[[float, Tensor], list[Term]] | None = None


FORMS = {
    "dpo": Form(DPO()),
    "spo": Form(SPO()),
    "spo-below0": Form(SPO(linear_below=0.0)),
    "spo-below-1": Form(SPO(linear_below=-1.0)),
    "spo-below-2": Form(SPO(linear_below=-2.0)),
    "squared": Form(Squared()),
    "dpo-soft": Form(DPO(), _both_orders),
    "squared-gap": Form(Squared(), lambda beta, gap: [Term(beta / gap)]),
    "spo-gap": Form(SPO(), lambda beta, gap: [Term(beta / gap)]),
    "spo-gap-floor": Form(SPO(), lambda beta, gap: [Term(beta / gap.clamp(min=GAP_FLOOR))]),
    "spo-gap-weighted": Form(SPO(), _weighted_gap),
    "spo-gap-weighted-below0": Form(SPO(linear_below=0.0), _weighted_gap),
    "dpo-weighted": Form(DPO(), _weighted),
    "spo-weighted-below0": Form(SPO(linear_below=0.0), _weighted),
}


@dataclass(frozen=True)
class Arm:
    """One way to train the policy; `str` gives the way it is written.

    Attributes:
      form: a key of `FORMS`.
      beta: in the loss.
      labels: one of `LABELS`.
      rate: the learning rate; None is that of the stage.
    """

    form: str
    beta: float
    labels: str = CLEAN
    rate: float | None = None

    def __str__(self) -> str:
        labels = "" if self.labels == CLEAN else f"@{self.labels}"
        rate = "" if self.rate is None else f"~{self.rate:.12g}"
        return f"{self.form}:{self.beta:.12g}{labels}{rate}"

    @property
    def title(self) -> str:
        """How a table names it, such as SPO(0.1); a table is of one kind of labels."""
        head, *rest = self.form.split("-", 1)
        name = head.upper() if head in ("dpo", "spo") else head
        rate = "" if self.rate is None else f", rate {self.rate:.12g}"
        return "-".join((name, *rest)) + f"({self.beta:.12g}{rate})"

    @property
    def margin_loss(self) -> MarginLoss:
        """The loss of the margin that every term is."""
        return FORMS[self.form].loss

    def terms(self, gap: Tensor) -> list[Term]:
        """The terms of the loss of pairs whose reward differences are `gap` [B]."""
        terms = FORMS[self.form].terms
        return [Term(self.beta)] if terms is None else terms(self.beta, gap)

    def loss(self, logps: Logps, gap: Tensor) -> Tensor:
        """The mean loss of a batch of pairs whose reward differences are `gap` [B]."""
        total = torch.zeros(())
        for term in self.terms(gap):
            ordered = logps.reversed() if term.reversed else logps
            total = total + pair_loss(
                self.margin_loss, *ordered, beta=term.beta, weights=term.weights
            )
        return total


def parse_arm(text: str) -> Arm:
    """Reads an arm.

    Raises:
      InputError: there is no such form, beta or kind of labels.
    """
    form, _, rest = text.partition(":")
    rest, _, rate = rest.partition("~")
    number, at, labels = rest.partition("@")
    try:
        arm = Arm(form, float(number), labels if at else CLEAN, float(rate) if rate else None)
    except ValueError:
        arm = Arm(form, math.nan)
    if (
        form not in FORMS
        or arm.labels not in LABELS
        or not 0.0 < arm.beta < math.inf
        or not 0.0 < (arm.rate or 1.0) < math.inf
    ):
        raise InputError(
            f"{text}: expected FORM:BETA, FORM:BETA@LABELS or either with ~RATE, with FORM one of "
            f"{', '.join(FORMS)}, a finite BETA above 0, LABELS one of {', '.join(LABELS)}, and a "
            "finite RATE above 0"
        )
    if arm.labels != CLEAN and FORMS[form].terms is not None:
        raise InputError(f"{text}: expected clean labels, for {form} knows the reward difference")
    return arm


def arms(form: str, *betas: str) -> tuple[Arm, ...]:
    """Arms of one form at betas such as "0.1" and "0.4@noisy"."""
    return tuple(parse_arm(f"{form}:{beta}") for beta in betas)
