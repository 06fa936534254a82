"""The tables of the studies, from the committed CSV files; pages call them as `tables` does."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from statistics import fmean, stdev

from scipy.stats import t as student
from tables import measured, write

SEEDS = 5  # of the tabular study
COMPARISONS = 3  # that the intervals of best_against_best hold for jointly, as in part (a)
FORMS = {
    "dpo": "DPO",
    "spo": "SPO",
    "spo-below0": "SPO, `linear_below=0`",
    "spo-below-1": "SPO, `linear_below=-1`",
    "spo-below-2": "SPO, `linear_below=-2`",
}


def best_against_best() -> None:
    """SPO against DPO, each at its best beta, on the pretrained model and the made-up language."""
    (real,) = (
        row
        for row in measured("sentiment/sweep/decided.csv")
        if row["question"] == "(a) SPO against DPO, each at its best beta"
    )
    language = best_on_the_made_up_language()
    header = ["each at its best beta", "SPO", "DPO", "SPO wins (%)", "95 % interval"]
    low, high = (f"{100 * float(real[bound]):.1f}" for bound in ("low", "high"))
    smollm2 = ["SmolLM2-135M-Instruct, judged by VADER", real["ours"], real["theirs"]]
    rows = [[*smollm2, _percent(real), f"{low} to {high}"], language]
    write(header, rows)


def best_on_the_made_up_language() -> list[str]:
    """The made-up language's row: for each seed, the other seeds choose the betas."""
    rewards: dict[str, dict[str, float]] = {}
    for row in measured("alignment/full/policies.csv"):
        if row["stage"] == "preference" and "@" not in row["policy"]:
            rewards.setdefault(row["policy"], {})[row["seed"]] = float(row["reward"])
    rates = {(row["row"], row["column"]): row for row in measured("alignment/full/win_rates.csv")}

    def best(loss: str, seed: str) -> str:
        others = {
            policy: fmean(reward for other, reward in found.items() if other != seed)
            for policy, found in rewards.items()
            if policy.startswith(f"{loss}:")
        }
        return max(others, key=lambda policy: others[policy])

    seeds = sorted(rewards["sft"])
    chosen = [(best("spo", seed), best("dpo", seed)) for seed in seeds]
    wins = [float(rates[pair][f"seed_{seed}"]) for pair, seed in zip(chosen, seeds, strict=True)]
    mean, error = fmean(wins), stdev(wins) / math.sqrt(len(wins))
    half = error * student.ppf(1 - 0.025 / COMPARISONS, len(wins) - 1)
    names = [" or ".join(dict.fromkeys(map(_title, side))) for side in zip(*chosen, strict=True)]
    interval = f"{100 * (mean - half):.1f} to {100 * (mean + half):.1f}"
    title = "108,000 parameters, a made-up language"
    return [title, *names, f"{100 * mean:.1f} ± {100 * error:.1f}", interval]


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


def decided(part: str) -> None:
    """The comparisons of a part of the real-model study that were written down before its runs."""
    rows = measured(f"sentiment/{part}/decided.csv")
    header = ["comparison", "the first", "the second", "wins of the first (%)"]
    header += ["95 % interval", "verdict"]
    write(header, ([row["question"], *_decided_cells(row)] for row in rows))


def _decided_cells(row: dict[str, str]) -> list[str]:
    low, high = (f"{100 * float(row[bound]):.1f}" for bound in ("low", "high"))
    policies = [_with_reward(row, "ours", "our"), _with_reward(row, "theirs", "their")]
    return [*policies, _percent(row), f"{low} to {high}", row["verdict"]]


def _with_reward(row: dict[str, str], policy: str, prefix: str) -> str:
    reward, error = (float(row[f"{prefix}_{key}"]) for key in ("reward", "reward_error"))
    return f"{row[policy]}, reward {reward:.3f} ± {error:.3f}"


def over_training(measure: str, digits: int) -> None:
    """A measure of the answers during over-training, by policy and step; means over seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in measured("sentiment/overtraining/judgements.csv"):
        policy = found.setdefault(_title(row["policy"]), {})
        policy.setdefault(row["step"], []).append(float(row[measure]))
    steps = next(iter(found.values()))
    rows = [
        [title, *(f"{fmean(each[step]):.{digits}f}" for step in steps)]
        for title, each in found.items()
    ]
    write([measure, *(f"step {step}" for step in steps)], rows)


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


REAL_PAIRS = {
    "dpo:0.1": "DPO(0.1)",
    "dpo:0.4": "DPO(0.4)",
    "spo:0.1": "SPO(0.1)",
    "spo-gap-weighted:0.1": "SPO(0.1), known gap",
    "spo-gap-weighted-below0:0.1": "SPO(0.1), known gap, `linear_below=0`",
    "spo-gap-weighted-below0:0.6": "SPO(0.6), known gap, `linear_below=0`",
}


def real_pairs() -> None:
    """Held-out accuracy, margin and change of log-probability of each arm on real pairs."""
    rows = {row["arm"]: row for row in measured("real_pairs/arms.csv")}

    def columns(row: dict[str, str]) -> list[str]:
        number = {name: float(row[name]) for name in row if name not in ("arm", "folds")}
        return [
            f"{100 * number['accuracy']:.1f} ± {100 * number['accuracy_error']:.1f}",
            f"{100 * number['lead']:+.1f} ± {100 * number['lead_error']:.1f}",
            f"{number['h']:.2f}",
            f"{number['held_out_dlogp_chosen']:.2f} / {number['held_out_dlogp_rejected']:.2f}",
            f"{number['train_x_mean']:.2f}",
            f"{number['grad_norm_max']:.2g}",
        ]

    header = ["", "held-out accuracy (%)", "minus DPO(0.4)'s", "h (nats)"]
    header += [
        "Δlogp chosen / rejected (nats)",
        "64 trained pairs: x mean",
        "largest gradient norm",
    ]
    write(header, [[title, *columns(rows[arm])] for arm, title in REAL_PAIRS.items()])


def _percent(row: dict[str, str]) -> str:
    return f"{100 * float(row['win_rate']):.1f} ± {100 * float(row['standard_error']):.1f}"
