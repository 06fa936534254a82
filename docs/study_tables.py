"""The tables of the studies, from the committed CSV files; pages call them as `tables` does."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from statistics import fmean

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
    """Win rates of SPO over DPO at the same beta and at four times that, in %.

    Args:
      run: a folder of results. Its verdicts are those of intervals for all comparisons at once.
    """
    rows = measured(f"{run}/comparisons.csv")
    marks = {"better": " (better)", "worse": " (worse)"}
    cells = {
        (row["spo"], row["dpo"]): _percent(row) + marks.get(row["verdict"], "") for row in rows
    }
    betas = sorted({float(spo.split(":")[1].split("@")[0]) for spo, _ in cells})

    def line(factor: int, labels: str) -> list[str]:
        suffix = "" if labels == "clean" else f"@{labels}"
        pairs = [(f"spo:{b:.12g}{suffix}", f"dpo:{factor * b:.12g}{suffix}") for b in betas]
        name = "DPO(beta)" if factor == 1 else f"DPO({factor} beta)"
        return [f"{name}, {labels} labels", *(cells.get(pair, "-") for pair in pairs)]

    found = dict.fromkeys(spo.partition("@")[2] or "clean" for spo, _ in cells)
    header = ["SPO(beta) over", *(f"beta = {beta:g}" for beta in betas)]
    write(header, [line(factor, labels) for labels in found for factor in (1, 4)])


def decided(part: str, question: str = "") -> None:
    """The comparisons of a part of the real-model study that were fixed before its runs."""
    rows = [row for row in measured(f"sentiment/{part}/decided.csv") if question in row["question"]]
    header = ["comparison", "", "against", "win rate (%)", "95 % interval", "verdict"]
    write(header, ([row["question"], *_decided_cells(row)] for row in rows))


def _decided_cells(row: dict[str, str]) -> list[str]:
    low, high = (f"{100 * float(row[bound]):.1f}" for bound in ("low", "high"))
    policies = [_with_reward(row, "our"), _with_reward(row, "their")]
    return [*policies, _percent(row), f"{low} to {high}", row["verdict"]]


def _with_reward(row: dict[str, str], whose: str) -> str:
    reward, error = (float(row[f"{whose}_{key}"]) for key in ("reward", "reward_error"))
    return f"{row[f'{whose}s']}, reward {reward:.3f} ± {error:.3f}"


def real_model_best() -> None:
    """One sentence: SPO against DPO on the real model, each at its best beta."""
    (row,) = (
        row
        for row in measured("sentiment/sweep/decided.csv")
        if row["question"] == "(a) SPO against DPO, each at its best beta"
    )
    low, high = (f"{100 * float(row[bound]):.1f}" for bound in ("low", "high"))
    print(
        f"On SmolLM2-135M-Instruct, each at its best beta, {row['ours']} wins **{_percent(row)} %**"
        f" of the comparisons with {row['theirs']} (95 % interval {low} to {high})."
    )


def above_reference() -> None:
    """How much more reward than the reference DPO and SPO get on the real model."""
    rows = {row["form"]: row for row in measured("sentiment/sweep/gains.csv")}
    sentences = []
    for form in ("dpo", "spo"):
        row = rows[form]
        gain, error = float(row["gain"]), float(row["standard_error"])
        sentences.append(
            f"{row['best']} gets {gain:.3f} ± {error:.3f} more reward than the reference "
            f"({gain / error:.1f} standard errors)."
        )
    text = textwrap.fill(" ".join(sentences), 110, break_on_hyphens=False)
    print("", text, "", sep="\n")


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
