"""Any right loss made wrong, one thing at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Method = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Mutant:
    """A loss with something wrong in it."""

    loss: Any
    value_of: Method
    slope_of: Method

    def value(self, margin: Any, beta: Any) -> Any:
        return self.value_of(self.loss, margin, beta)

    def slope(self, margin: Any, beta: Any) -> Any:
        return self.slope_of(self.loss, margin, beta)


def _value(m: Any, h: Any, beta: Any) -> Any:
    return m.value(h, beta)


def _slope(m: Any, h: Any, beta: Any) -> Any:
    return m.slope(h, beta)


CONSISTENT: dict[str, tuple[Method, Method]] = {
    "sign": (lambda m, h, b: -m.value(h, b), lambda m, h, b: -m.slope(h, b)),
    "sign of the margin": (lambda m, h, b: m.value(-h, b), lambda m, h, b: -m.slope(-h, b)),
    "beta lost": (lambda m, h, _: m.value(h, 1.0), lambda m, h, _: m.slope(h, 1.0)),
}
"""Wrong in value and slope alike: no check of the one against the other sees these."""

INCONSISTENT: dict[str, tuple[Method, Method]] = {
    "sign of the slope": (_value, lambda m, h, b: -m.slope(h, b)),
    "beta lost in the slope": (_value, lambda m, h, b: m.slope(h, b) / b),
    "slope cut": (lambda m, h, b: m.value(h.detach(), b) + 0.0 * h, _slope),
}


def mutants(loss: Any) -> dict[str, Any]:
    """All of them, of one loss."""
    return {what: Mutant(loss, *pair) for what, pair in (CONSISTENT | INCONSISTENT).items()}


def passed(check: Callable[..., None], wrong: dict[str, Any], *arguments: Any) -> list[str]:
    """The wrong losses that a check takes for right."""
    names = []
    for name, loss in wrong.items():
        try:
            check(loss, *arguments)
        except AssertionError:
            continue
        names.append(name)
    return names
