"""The arms of the experiment: which loss, at which beta, on which labels.

An arm is written FORM:BETA, or FORM:BETA@noisy for labels drawn from Bradley-Terry instead of the
sign of the reward difference. The forms:

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
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.alignment.errors import InputError
from spoloss import dpo_loss, spo_loss, squared_loss
from torch import Tensor

GAP_FLOOR = 0.5
NOISY = "noisy"

Logps = tuple[Tensor, Tensor, Tensor, Tensor]
"""Policy chosen, policy rejected, reference chosen, reference rejected; nats, [B] each."""


def _unaware(gap: Tensor) -> dict[str, Tensor]:  # noqa: ARG001
    return {}


def _known_gap(gap: Tensor) -> dict[str, Tensor]:
    return {"reward_gap": gap}


def _floored_gap(gap: Tensor) -> dict[str, Tensor]:
    return {"reward_gap": gap.clamp(min=GAP_FLOOR)}


def _weighted_gap(gap: Tensor) -> dict[str, Tensor]:
    return {"reward_gap": gap, "weights": gap**2}


def soft_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    reward_gap: Tensor,
) -> Tensor:
    """DPO on both orders of each pair, each with the probability that Bradley-Terry gives it."""
    right = reward_gap.sigmoid()
    as_labelled = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    reversed_ = (policy_rejected, policy_chosen, reference_rejected, reference_chosen)
    return dpo_loss(*as_labelled, beta=beta, weights=right) + dpo_loss(
        *reversed_, beta=beta, weights=1.0 - right
    )


@dataclass(frozen=True)
class Form:
    """A loss of the library, and what it is told of the reward difference."""

    loss: Callable[..., Tensor]
    told: Callable[[Tensor], dict[str, Tensor]] = _unaware

    @property
    def needs_gap(self) -> bool:
        """Whether it is for pairs whose reward difference is known."""
        return self.told is not _unaware


FORMS = {
    "dpo": Form(dpo_loss),
    "spo": Form(spo_loss),
    "spo-below0": Form(partial(spo_loss, linear_below=0.0)),
    "spo-below-1": Form(partial(spo_loss, linear_below=-1.0)),
    "spo-below-2": Form(partial(spo_loss, linear_below=-2.0)),
    "squared": Form(squared_loss),
    "dpo-soft": Form(soft_dpo_loss, _known_gap),
    "squared-gap": Form(squared_loss, _known_gap),
    "spo-gap": Form(spo_loss, _known_gap),
    "spo-gap-floor": Form(spo_loss, _floored_gap),
    "spo-gap-weighted": Form(spo_loss, _weighted_gap),
    "spo-gap-weighted-below0": Form(partial(spo_loss, linear_below=0.0), _weighted_gap),
}


@dataclass(frozen=True, order=True)
class Arm:
    """One way to train the policy; `str` gives the way it is written."""

    form: str
    beta: float
    noisy: bool = False

    def __str__(self) -> str:
        return f"{self.form}:{self.beta:.12g}" + (f"@{NOISY}" if self.noisy else "")

    @property
    def title(self) -> str:
        """How a table names it, such as SPO(0.1); a table is of one kind of labels."""
        head, *rest = self.form.split("-", 1)
        name = head.upper() if head in ("dpo", "spo") else head
        return "-".join((name, *rest)) + f"({self.beta:.12g})"

    def loss(self, logps: Logps, gap: Tensor) -> Tensor:
        """The mean loss of a batch of pairs, whose reward differences are `gap`."""
        form = FORMS[self.form]
        return form.loss(*logps, beta=self.beta, **form.told(gap))


def parse_arm(text: str) -> Arm:
    """Reads an arm.

    Raises:
      InputError: there is no such form, beta or kind of labels.
    """
    form, colon, rest = text.partition(":")
    number, at, labels = rest.partition("@")
    if form not in FORMS:
        raise InputError(f"{text}: expected an arm FORM:BETA with FORM one of {', '.join(FORMS)}")
    try:
        beta = float(number)
    except ValueError:
        beta = float("nan")
    if not (colon and 0.0 < beta < float("inf")):
        raise InputError(f"{text}: expected a finite beta above 0 behind the colon")
    if at and labels != NOISY:
        raise InputError(f"{text}: expected @{NOISY} or nothing behind beta")
    if at and FORMS[form].needs_gap:
        raise InputError(f"{text}: expected clean labels, for {form} knows the reward difference")
    return Arm(form, beta, noisy=bool(at))
