"""The results that each public function must return for a call, in the order of its fields."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.fuzz.calls import Call
from benchmarks.fuzz.reference import Expected, Reference


def expected(call: Call) -> dict[str, Expected]:
    """Each result by name."""
    with np.errstate(all="ignore"):
        reference = Reference(call)
        kind = call.function.partition("_")[2]
        if kind == "loss":
            return {"loss": _loss(reference)}
        if kind == "grad":
            return by_logps(reference)
        if kind == "prob_grad":
            return _by_probabilities(reference)
        if call.function == "log_ratio_margin":
            return {"margin": reference.margin}
        chosen, rejected = _rewards(reference)
        if call.function == "implicit_rewards":
            return {"chosen": chosen, "rejected": rejected}
        return _metrics(reference, chosen, rejected)


def named(call: Call, result: Any) -> dict[str, Any]:
    """What the function returned, under the same names."""
    if isinstance(result, dict):
        return result
    if call.function.endswith("prob_grad"):
        return {f"{side}.{k}": v for side, s in result._asdict().items() for k, v in _items(s)}
    if hasattr(result, "_asdict"):
        return dict(_items(result))
    return {"margin" if call.function == "log_ratio_margin" else "loss": result}


def _items(fields: Any) -> Any:
    return fields._asdict().items()


def _loss(reference: Reference) -> Expected:
    values = reference.weighted(reference.value())
    return reference.reduced(values, reference.options.get("reduction", "mean"))


def by_logps(reference: Reference) -> dict[str, Expected]:
    """The gradient of the reduced loss by the policy's log-probabilities."""
    slope = reference.weighted(reference.slope())
    if reference.options.get("reduction", "mean") == "mean" and slope.exact.size:
        slope = slope.times(np.longdouble(1.0) / slope.exact.size, reference.eps)
    return {"policy_chosen": slope, "policy_rejected": Expected(-slope.exact, slope.error)}


def _by_probabilities(reference: Reference) -> dict[str, Expected]:
    sign, log_abs = reference.log_slope()
    out = {}
    for side, flip, logps in (("chosen", 1, reference.pc), ("rejected", -1, reference.pr)):
        error = log_abs.error + 4.0 * reference.eps * (abs(logps) + abs(log_abs.exact - logps))
        out[f"policy_{side}.sign"] = Expected(flip * sign.exact, sign.error)
        out[f"policy_{side}.log_abs"] = Expected(log_abs.exact - logps, error)
    return out


def _rewards(reference: Reference) -> tuple[Expected, Expected]:
    sides = ((reference.pc, reference.rc), (reference.pr, reference.rr))
    out = []
    for policy, frozen in sides:
        size = 2.0 * reference.eps * (abs(policy) + abs(frozen)) + 2.0 * reference.unread
        out.append(Expected(policy - frozen, size).times(reference.beta, reference.eps))
    return out[0], out[1]


def _metrics(reference: Reference, chosen: Expected, rejected: Expected) -> dict[str, Expected]:
    margin = Expected(
        chosen.exact - rejected.exact,
        chosen.error + rejected.error + reference.eps * abs(chosen.exact - rejected.exact),
    )
    of_pairs = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": margin}
    for key, target, sign in (
        ("accuracies", 0.0, 1),
        ("margins_below_0", 0.0, -1),
        ("margins_above_1", reference.gap, 1),
    ):
        distance = margin.exact - target
        certain = abs(distance) > 2.0 * margin.error + 4.0 * reference.eps * abs(target)
        tie = (distance == 0.0) & (margin.error == 0.0)
        error = np.where(certain | tie, 0.0, np.nan)
        of_pairs[f"rewards/{key}"] = Expected((sign * distance > 0).astype(np.longdouble), error)
    for key, logps in (("chosen", reference.pc), ("rejected", reference.pr)):
        of_pairs[f"logps/{key}"] = Expected(logps, reference.eps * abs(logps))
    return {key: _mean(reference, values) for key, values in of_pairs.items()}


def _mean(reference: Reference, values: Expected) -> Expected:
    """sum(weights * values) / sum(weights)."""
    shape, eps = values.exact.shape, reference.eps
    weights = np.broadcast_to(reference.weights, shape)
    counts = weights != 0.0
    terms = np.where(counts, weights * values.exact, 0.0)
    total, size = np.sum(weights), np.sum(abs(weights))
    if total == 0.0 or abs(total) < 1e-2 * size:
        return Expected(np.full((), np.nan), np.full((), np.nan))
    slack = 4.0 * (weights.size + 4) * eps * (1.0 + size / abs(total))
    error = np.sum(np.where(counts, abs(weights) * values.error, 0.0)) / abs(total)
    error += slack * np.sum(abs(terms)) / abs(total) + 8.0 * reference.tiny
    return Expected(np.sum(terms) / total, error)
