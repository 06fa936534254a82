"""The arms of an experiment: which loss, at which beta and learning rate.

An arm is written FORM:BETA, or FORM:BETA~RATE with a learning rate of its own. The forms:

    dpo                       DPO
    spo                       SPO, equation 6
    spo-below-1               SPO with linear_below=-1
    squared                   (h - 1/beta)^2: squared:0.2 is IPO at 0.1

and with the reward difference of each pair known:

    dpo-soft                  DPO whose labels are the probabilities s(gap)
    squared-gap               (h - gap/beta)^2
    spo-gap-weighted-below0   SPO with reward_gap=gap, weights=gap^2 and linear_below=0
    dpo-weighted              DPO with weights=gap
    spo-weighted-below0       SPO with weights=gap and linear_below=0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from spoloss import DPO, SPO, MarginLoss, Squared


@dataclass(frozen=True)
class Term:
    """One pair loss; an arm's loss is the sum of its terms.

    Attributes:
      beta: a number, or [B] where every pair has its own.
      weights: factors of the pairs, [B]; None is 1.
      order: -1 if chosen and rejected change places; not in an arm's first term.
    """

    beta: Tensor | float
    weights: Tensor | None = None
    order: int = 1


def _both_orders(beta: float, gap: Tensor) -> list[Term]:
    """Both orders of each pair, each with the probability that Bradley-Terry gives it."""
    right = gap.sigmoid()
    return [Term(beta, weights=right), Term(beta, weights=1.0 - right, order=-1)]


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
    "spo-below-1": Form(SPO(linear_below=-1.0)),
    "squared": Form(Squared()),
    "dpo-soft": Form(DPO(), _both_orders),
    "squared-gap": Form(Squared(), lambda beta, gap: [Term(beta / gap)]),
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
      rate: the learning rate; None is that of the stage.
    """

    form: str
    beta: float
    rate: float | None = None

    def __str__(self) -> str:
        rate = "" if self.rate is None else f"~{self.rate:.12g}"
        return f"{self.form}:{self.beta:.12g}{rate}"

    @property
    def title(self) -> str:
        """How a table names it, such as SPO(0.1)."""
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


def arms(form: str, *betas: float) -> tuple[Arm, ...]:
    """Arms of one form."""
    return tuple(Arm(form, beta) for beta in betas)
