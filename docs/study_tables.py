"""The tables of the studies, from the committed CSV files; pages call them as `tables` does."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from statistics import fmean, stdev

from tables import measured, write

MEASURES = ("accuracy", "accuracy_error", "h", "chosen_change", "rejected_change")
SEEDS = 5  # of the tabular study
FORMS = {
    "dpo": "DPO",
    "spo": "SPO",
    "spo-below0": "SPO, `linear_below=0`",
    "spo-below-1": "SPO, `linear_below=-1`",
    "spo-below-2": "SPO, `linear_below=-2`",
}


def best_against_best() -> None:
    """One sentence: SPO against DPO, each at the beta of its greatest mean reward."""
    spo, dpo = _best("spo"), _best("dpo")
    (row,) = (
        row
        for row in measured("alignment/full/win_rates.csv")
        if (row["row"], row["column"]) == (spo, dpo)
    )
    print(
        f"Each at its best beta, {_title(spo)} wins **{_percent(row)} %** of the comparisons with"
        f" {_title(dpo)}."
    )


def _best(loss: str) -> str:
    rewards: dict[str, list[float]] = {}
    for row in measured("alignment/full/policies.csv"):
        plain = row["policy"].startswith(f"{loss}:") and "@" not in row["policy"]
        if row["stage"] == "preference" and plain:
            rewards.setdefault(row["policy"], []).append(float(row["reward"]))
    return max(rewards, key=lambda policy: fmean(rewards[policy]))


def matched_betas(run: str) -> None:
    """Win rates of SPO over DPO at the same beta and at four times that, in %."""
    rows = measured(f"{run}/comparisons.csv")
    marks = {"better": " (better)", "worse": " (worse)", "not distinguishable": ""}
    cells = {(row["spo"], row["dpo"]): _percent(row) + marks[row["verdict"]] for row in rows}
    betas = sorted({float(spo.split(":")[1].split("@")[0]) for spo, _ in cells})

    def line(factor: int, labels: str) -> list[str]:
        suffix = "" if labels == "clean" else f"@{labels}"
        pairs = [(f"spo:{b:g}{suffix}", f"dpo:{factor * b:.12g}{suffix}") for b in betas]
        name = "DPO(beta)" if factor == 1 else f"DPO({factor} beta)"
        return [f"{name}, {labels} labels", *(cells.get(pair, "-") for pair in pairs)]

    found = dict.fromkeys(spo.partition("@")[2] or "clean" for spo, _ in cells)
    header = ["SPO(beta) over", *(f"beta = {beta:g}" for beta in betas)]
    write(header, [line(factor, labels) for labels in found for factor in (1, 4)])


def above_reference(run: str) -> None:
    """How far the reward of DPO and SPO at their best beta is above the reference's."""
    rewards: dict[str, list[float]] = {}
    for row in measured(f"{run}/policies.csv"):
        rewards.setdefault(row["policy"], []).append(float(row["reward"]))
    sentences = []
    for form in ("dpo", "spo"):
        ours = max(
            (p for p in rewards if p.startswith(f"{form}:")), key=lambda p: fmean(rewards[p])
        )
        gains = [a - b for a, b in zip(rewards[ours], rewards["reference"], strict=True)]
        error = stdev(gains) / len(gains) ** 0.5
        sentences.append(
            f"{_title(ours)} gets {fmean(gains):.3f} ± {error:.3f} more reward than the reference: "
            f"{fmean(gains) / error:.1f} standard errors."
        )
    print("", textwrap.fill(" ".join(sentences), 110), "", sep="\n")


def _title(policy: str) -> str:
    return f"{policy.upper().replace(':', '(')})"


def stability() -> None:
    """Runs that a loss or gradient norm that is not finite stopped, and how the others ended."""
    runs = measured("alignment/stability/stability.csv")
    betas = sorted({run["beta"] for run in runs}, key=float)
    header = [
        "",
        *(f"stopped at beta = {beta}" for beta in betas),
        "stopped, clipped",
        "below SFT",
        "largest gradient norm",
    ]

    def row(form: str) -> list[str]:
        ours = [run for run in runs if run["form"] == form]
        return [
            FORMS[form],
            *(_stopped([run for run in ours if run["beta"] == beta]) for beta in betas),
            _stopped([run for run in ours if run["clip"] != "none"]),
            f"{sum(float(run['win_rate']) < 0.5 for run in ours)} of {len(ours)}",
            f"{max(float(run['grad_norm_max']) for run in ours):.2g}",
        ]

    write(header, [row(form) for form in FORMS])


def _stopped(runs: Sequence[dict[str, str]]) -> str:
    return f"{sum(run['stopped_at'] != '' for run in runs)} of {len(runs)}"


def tabular(labels: str) -> None:
    """The distance to the optimal policy, KL(pi* || pi) in nats, by method and beta."""
    rows = [row for row in measured("tabular.csv") if row["labels"] == labels]
    betas = sorted({row["beta"] for row in rows}, key=float)
    cells = {(row["method"], row["beta"]): row for row in rows}

    def cell(method: str, beta: str) -> str:
        row = cells[method, beta]
        if row["diverged"] != "0":
            return f"{row['diverged']} of {SEEDS} diverged"
        return f"{float(row['kl']):.3f} ± {float(row['kl_error']):.3f}"

    methods = dict.fromkeys(row["method"] for row in rows)
    header = [f"{labels} labels", *(f"beta = {beta}" for beta in betas)]
    write(header, ([method, *(cell(method, beta) for beta in betas)] for method in methods))


def real_pairs() -> None:
    """Held-out accuracy, margin and change of log-probability of each arm on real pairs."""
    rows = measured("real_pairs.csv")
    cells = {(row["arm"], row["seed"]): row for row in rows}
    arms, seeds = (dict.fromkeys(row[key] for row in rows) for key in ("arm", "seed"))

    def columns(arm: str, seed: str) -> list[str]:
        row = {name: float(cells[arm, seed][name]) for name in MEASURES}
        return [
            f"{row['accuracy']:.3f} ± {row['accuracy_error']:.3f}",
            f"{row['h']:.2f}",
            f"{row['chosen_change']:.2f} / {row['rejected_change']:.2f}",
        ]

    write(
        ["", "seed", "held-out accuracy", "h", "Δlogp chosen / rejected"],
        [[arm, seed, *columns(arm, seed)] for arm in arms for seed in seeds],
    )


def _percent(row: dict[str, str]) -> str:
    return f"{100 * float(row['win_rate']):.1f} ± {100 * float(row['standard_error']):.1f}"
