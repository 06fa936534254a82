"""What a run says: tables in the paper's form, the comparisons in words, and CSV files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.alignment.arms import Arm
from benchmarks.alignment.figures import draw_figures, draw_margins, save
from benchmarks.alignment.language_protocols import MEMORISED
from benchmarks.alignment.protocol import Protocol
from benchmarks.alignment.results import (
    Comparison,
    Estimate,
    Policy,
    Results,
    verdict,
    win_interval,
)
from benchmarks.alignment.results import rewards_win_rate as win_rate
from benchmarks.alignment.store import Store, write_atomically
from benchmarks.record import machine as describe

PACKAGES = ("torch", "numpy", "spoloss")
PAPER_DPOS, PAPER_SPO = (Arm("dpo", 0.1), Arm("dpo", 0.4)), Arm("spo", 0.1)
"""The paper's pair of arms at one beta, and the DPO that is held to the reference as SPO is."""
SIGNIFICANT = 6
"""Digits of a number in a CSV file."""

Row = dict[str, Any]


def report(protocol: Protocol, store: Store) -> str:
    """Writes tables, CSV files and figures to the results folder, and returns the tables."""
    parts = {part.name: Results(protocol.foundation, part, store) for part in protocol.parts}
    first = next(iter(parts.values()))
    header = header_of(first.part.seeds)
    sections = [pairs_sentence(first), *part_sections(first)]
    if MEMORISED in parts:
        sections += memorised_section(parts[MEMORISED])
    text = "\n\n".join([header, *sections])
    publish(store.folder, text, csv_tables(parts), header)
    draw_figures(first, store.folder, header)
    if MEMORISED in parts:
        save(draw_margins(parts[MEMORISED]), store.folder / "margins.png", header)
    return text


def header_of(seeds: int, *packages: str) -> str:
    """Where and with what a run was made, in one line."""
    return f"{describe(*PACKAGES, *packages)}; {seeds} seed{'s' * (seeds > 1)}"


def publish(folder: Path, text: str, tables: dict[str, list[Row]], header: str) -> None:
    """Writes what is printed and the CSV files."""
    write_atomically(folder / "tables.md", f"{text}\n".encode())
    for name, rows in tables.items():
        write_csv(folder, name, rows, header)


def part_sections(results: Results) -> list[str]:
    """All that is printed of a part, in reading order."""
    found = [paper_table(results, dpo) for dpo in PAPER_DPOS if has_paper_arms(results, dpo)]
    for labels in results.labels:
        policies = results.policies(labels)
        found += [
            policy_table(results, policies, labels),
            pair_table(results, policies[1:], labels),
            win_table(results, policies, f"All win rates, {labels} labels"),
        ]
    return [*found, *comparison_section(results)]


# ----------------------------------------------------------------------------------- the sections


def pairs_sentence(results: Results) -> str:
    """What the arms were trained on."""
    gap = Estimate(tuple(each["mean_gap"] for each in results.references))
    wrong = Estimate(tuple(each["wrong_labels"] for each in results.references))
    pairs = " or ".join(sorted({str(each["pairs"]) for each in results.references}))
    return (
        f"{pairs} training pairs a seed; their rewards differ by {gap.mean:.2f} on average; noisy "
        f"labels are wrong for {100 * wrong.mean:.1f} % of them. Figures are means over seeds "
        "± standard errors."
    )


def has_paper_arms(results: Results, dpo: Arm) -> bool:
    """Whether the run has the arms of a table in the paper's own form."""
    return {dpo, PAPER_SPO} <= results.arms.keys()


def paper_table(results: Results, dpo: Arm) -> str:
    """The reference, DPO and SPO as in the paper's tables 1 and 2, and how sure their gain is."""
    policies: list[Policy] = [None, dpo, PAPER_SPO]
    reference = results.title(None)
    text = win_table(results, policies, f"{reference}, {dpo.title} and {PAPER_SPO.title}")
    for policy in policies[1:]:
        wins = results.wins(policy, None)
        if wins.error > 0.0:
            sure = (wins.mean - 0.5) / wins.error
            text += (
                f"\n\n{results.title(policy)} is above {reference} by {sure:.1f} standard errors."
            )
    return text


def win_table(results: Results, policies: Sequence[Policy], heading: str) -> str:
    """Win rates of row over column, ± their standard errors over seeds."""
    columns = ["Win rate (%) of row vs. column", *map(results.title, policies)]
    rows = [
        [
            results.title(a),
            *("-" if a == b else results.wins(a, b).text(1, 100.0) for b in policies),
        ]
        for a in policies
    ]
    return markdown(heading, columns, rows)


def policy_table(results: Results, policies: Sequence[Policy], labels: str) -> str:
    """What each policy's own answers say of it, and how its training went."""
    measures = results.foundation.measures
    columns = ["", f"win rate vs {results.title(None)} (%)", "reward", "KL (nats)"]
    columns += [measure.heading for measure in measures]
    columns += ["gradient norm, median", "max", "stopped"]
    rows = []
    for policy in policies:
        found = results.of(policy)
        vs_reference = "-" if policy is None else results.wins(policy, None).text(1, 100.0)
        row = [results.title(policy), vs_reference]
        row += [results.estimate(policy, key).text(2) for key in ("reward", "kl")]
        row += [results.estimate(policy, m.key).text(m.digits, m.factor) for m in measures]
        if policy is not None:
            row += [f"{results.estimate(policy, 'grad_norm_median').mean:.3g}"]
            row += [f"{max(each['grad_norm_max'] for each in found):.2g}"]
            row += [str(sum(each["stopped_at"] is not None for each in found))]
        rows.append(row + [""] * (len(columns) - len(row)))
    return markdown(f"Policies, {labels} labels", columns, rows)


def pair_table(results: Results, policies: Sequence[Policy], labels: str) -> str:
    """Margins x = beta * h and changes of log-probabilities, on trained and held-out pairs."""
    columns = [""]
    for split in ("trained", "held-out"):
        columns += [f"{split}: x mean", "sd", "10/50/90 %", "x < 0 (%)", "Δlogp chosen", "rejected"]
    rows = []
    for policy in policies:
        row = [results.title(policy)]
        for split in ("train", "held_out"):
            row += pair_cells([found[split] for found in results.of(policy)])
        rows.append(row)
    return markdown(f"Pairs, {labels} labels (means over seeds)", columns, rows)


def pair_cells(measured: Sequence[dict[str, float]]) -> list[str]:
    """The cells of one policy on one kind of pairs."""
    mean = {key: Estimate(tuple(each[key] for each in measured)).mean for key in measured[0]}
    return [
        f"{mean['x_mean']:.2f}",
        f"{mean['x_sd']:.2f}",
        f"{mean['x_q10']:.2f} / {mean['x_q50']:.2f} / {mean['x_q90']:.2f}",
        f"{100 * mean['x_below_0']:.0f}",
        f"{mean['dlogp_chosen']:.2f}",
        f"{mean['dlogp_rejected']:.2f}",
    ]


def memorised_section(results: Results) -> list[str]:
    """What becomes of margins on pairs that are seen again and again; means over seeds."""
    stage, measures = results.part.stage, results.foundation.measures
    columns = ["", "trained: x mean", "sd", "10/50/90 %", "x < 0 (%)", "Δlogp chosen", "rejected"]
    columns += ["x in [0.9, 1.1] (%)", "held-out: x mean", "sd", "x < 0 (%)"]
    columns += ["KL (nats)", "reward", *(measure.heading for measure in measures)]
    columns += [f"win rate vs {results.title(None)} (%)"]
    rows = []
    for arm, found in results.arms.items():
        row = [arm.title, *pair_cells([each["train"] for each in found])]
        near = Estimate(tuple(each["train"]["x_near_1"] for each in found)).mean
        x_mean, x_sd, _, x_below_0, *_ = pair_cells([each["held_out"] for each in found])
        row += [f"{100 * near:.0f}", x_mean, x_sd, x_below_0]
        row += [results.estimate(arm, key).text(2) for key in ("kl", "reward")]
        row += [results.estimate(arm, m.key).text(m.digits, m.factor) for m in measures]
        rows.append([*row, results.wins(arm, None).text(1, 100.0)])
    seeds = "seed 0" if results.part.seeds == 1 else f"{results.part.seeds} seeds"
    heading = f"Memorised: {stage.pairs} pairs, {stage.steps} steps of {stage.batch}, {seeds}"
    return [markdown(heading, columns, rows)]


def comparison_section(results: Results) -> list[str]:
    """SPO(beta) against DPO(beta) and DPO(4 * beta), in words."""
    number = len(results.comparisons)
    if not number:
        return []
    lines = [comparison_sentence(each, number) for each in results.comparisons]
    heading = "SPO against DPO of the same beta and of four times that"
    if results.part.seeds > 1:
        heading += f" (Student's intervals, 95 %: alone, and for all {number} at once)"
    lines += [sentence for labels in results.labels for sentence in best_sentence(results, labels)]
    return ["\n".join([f"### {heading}", "", *(f"- {line}" for line in lines)])]


def comparison_sentence(each: Comparison, number: int) -> str:
    """One comparison and its verdict."""
    start = f"{each.ours.title} over {each.theirs.title}, {each.ours.labels} labels: "
    start += f"{each.wins.text(1, 100.0)} %"
    if math.isnan(each.wins.error):
        reason = "one seed" if len(each.wins.values) == 1 else "a policy has broken down"
        return f"{start} ({reason}: no verdict)."
    alone, together = (
        f"{100 * low:.1f} to {100 * high:.1f}"
        for low, high in (win_interval(each.wins, 1), win_interval(each.wins, number))
    )
    return f"{start}; {alone} alone, {together} with all: {verdict(each.wins, number)}."


def best_sentence(results: Results, labels: str) -> list[str]:
    """Each loss at the beta that suits it."""
    ours, theirs = results.best("spo", labels), results.best("dpo", labels)
    if ours is None or theirs is None:
        return []
    wins = results.wins(ours, theirs).text(1, 100.0)
    return [
        f"Each at the beta of its greatest reward (chosen on the same answers, so no interval), "
        f"{labels} labels: {ours.title} over {theirs.title} {wins} %."
    ]


def markdown(heading: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a heading."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join([f"### {heading}", "", *(f"| {' | '.join(line)} |" for line in lines)])


# ---------------------------------------------------------------------------------- the CSV files


def csv_tables(parts: dict[str, Results]) -> dict[str, list[Row]]:
    """The rows of every CSV file; those that hold one part hold the first."""
    first = next(iter(parts.values()))
    return {
        "win_rates": win_rows(first),
        # The reference is the same in every part, so it is listed with the first.
        "policies": [
            *reference_rows(first),
            *(row for results in parts.values() for row in arm_rows(results)),
        ],
        "comparisons": comparison_rows(first),
        "margins": [row for results in parts.values() for row in margin_rows(results)],
        "limits": [
            {"seed": seed, **limit}
            for seed, found in enumerate(first.references)
            for limit in found["limits"]
        ],
        "texts": text_rows(first),
    }


def name_of(results: Results, policy: Policy) -> str:
    """How a CSV file names a policy: as the command line does."""
    return results.foundation.reference_title.lower() if policy is None else str(policy)


def win_rows(results: Results) -> list[Row]:
    """All win rates, over all kinds of labels."""
    policies: list[Policy] = [None, *results.arms]
    return [
        {
            "row": name_of(results, a),
            "column": name_of(results, b),
            "win_rate": wins.mean,
            "standard_error": wins.error,
            **{f"seed_{seed}": value for seed, value in enumerate(wins.values)},
        }
        for a in policies
        for b in policies
        if a != b
        for wins in [results.wins(a, b)]
    ]


def reference_rows(results: Results) -> list[Row]:
    """Everything measured of the reference, seed by seed."""
    return [policy_row(results, None, seed, found) for seed, found in enumerate(results.references)]


def arm_rows(results: Results) -> list[Row]:
    """Everything measured of every arm of a part, seed by seed."""
    return [
        policy_row(results, arm, seed, found)
        for arm, seeds in results.arms.items()
        for seed, found in enumerate(seeds)
    ]


def policy_row(results: Results, policy: Policy, seed: int, found: dict[str, Any]) -> Row:
    """A row of policies.csv."""
    measures = (measure.key for measure in results.foundation.measures)
    keys = ("reward", "kl", *measures, "grad_norm_median", "grad_norm_max")
    reference = results.title(None).lower()
    row: Row = {"stage": results.part.name, "policy": name_of(results, policy), "seed": seed}
    row[f"win_rate_vs_{reference}"] = win_rate(found, results.references[seed])
    row |= {key: found.get(key) for key in (*keys, "stopped_at", "lowest_x")}
    for split in ("train", "held_out"):
        row |= {f"{split}_{key}": value for key, value in found.get(split, {}).items()}
    return row


def comparison_rows(results: Results) -> list[Row]:
    """The comparisons with their corrected intervals."""
    number = len(results.comparisons)
    rows = []
    for each in results.comparisons:
        row: Row = {"spo": str(each.ours), "dpo": str(each.theirs)}
        row |= {"win_rate": each.wins.mean, "standard_error": each.wins.error}
        if not math.isnan(each.wins.error):
            row |= dict(zip(("low_alone", "high_alone"), win_interval(each.wins, 1), strict=True))
            row |= dict(zip(("low", "high"), win_interval(each.wins, number), strict=True))
            row["verdict"] = verdict(each.wins, number)
        rows.append(row)
    return rows


def margin_rows(results: Results) -> list[Row]:
    """Margins over training."""
    return [
        {"stage": results.part.name, "policy": str(arm), "seed": seed, **snapshot}
        for arm, found in results.arms.items()
        for seed, each in enumerate(found)
        for snapshot in each["snapshots"]
    ]


def text_rows(results: Results) -> list[Row]:
    """A few answers of every policy, of seed 0."""
    return [
        {"policy": name_of(results, policy), "text": text}
        for policy in (None, *results.arms)
        for text in results.of(policy)[0]["texts"]
    ]


def write_csv(folder: Path, name: str, rows: Sequence[Row], header: str) -> None:
    """Writes rows under a line that says where they come from; a file without rows is none."""
    if not rows:
        return
    buffer = io.StringIO()
    buffer.write(f"# {header}\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: cell(value) for key, value in row.items()} for row in rows)
    write_atomically(folder / f"{name}.csv", buffer.getvalue().encode())


def cell(value: object) -> object:
    """A value as a CSV file has it: floats in six digits, nothing for what does not exist."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.{SIGNIFICANT}g}"
    return "" if value is None else value
