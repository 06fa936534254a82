"""What the study says: a folder of tables and pictures for every part that has a finished seed."""

from __future__ import annotations

from benchmarks.alignment.figures import draw_figures, draw_margins, save
from benchmarks.alignment.protocol import Protocol
from benchmarks.alignment.report import (
    Row,
    csv_tables,
    header_of,
    memorised_section,
    pairs_sentence,
    part_sections,
    publish,
)
from benchmarks.alignment.results import Results
from benchmarks.alignment.sentiment.decided import decided_comparisons, gains
from benchmarks.alignment.sentiment.parts import OVERTRAINING, PARTS, finished_results
from benchmarks.alignment.store import Store


def report(protocol: Protocol, store: Store) -> str:
    """Writes what is finished of every part to a folder of its own, and returns the tables."""
    model = protocol.foundation.settings()["model"]
    texts = []
    for part in protocol.parts:
        results = finished_results(protocol.foundation, part, store)
        if results is None:
            texts.append(f"## {part.name}\n\nNo seed is finished.")
        else:
            texts.append(report_part(results, store, model))
    return "\n\n".join(texts)


def report_part(results: Results, store: Store, model: str) -> str:
    """Writes the tables and pictures of a part, and returns the tables."""
    part, folder = results.part, store.folder / results.part.name
    header = f"{header_of(part.seeds, 'transformers', 'vaderSentiment')}; {model}"
    sections = [f"## {part.name}", header, pairs_sentence(results), stage_sentence(results)]
    sections += [*unfinished_sentence(results), *decided_section(results), *part_sections(results)]
    if part.name == OVERTRAINING.name:
        sections += memorised_section(results)
        save(draw_margins(results), folder / "margins.png", header)
    text = "\n\n".join(sections)
    publish(folder, text, csv_tables({part.name: results}) | own_tables(results), header)
    draw_figures(results, folder, header)
    return text


def unfinished_sentence(results: Results) -> list[str]:
    """What a part still lacks; nothing where it is complete."""
    whole = PARTS.get(results.part.name, results.part)
    missing = [arm for arm in whole.arms if arm not in results.arms]
    found = []
    if results.part.seeds < whole.seeds:
        found.append(f"{results.part.seeds} of {whole.seeds} seeds are finished")
    if missing:
        found.append(f"unfinished are {', '.join(map(str, missing))}")
    return [f"This part is not complete: {'; '.join(found)}."] if found else []


def stage_sentence(results: Results) -> str:
    """How the arms of a part were trained."""
    stage = results.part.stage
    used = min(stage.pairs, *(each["pairs"] for each in results.references))
    passes = stage.steps * stage.batch / used
    return (
        f"{stage.steps} steps of {stage.batch} pairs on {used} pairs or more ({passes:.1f} passes "
        f"at most), AdamW, learning rate {stage.lr:g} "
        f"{'constant' if stage.lr_end == 1.0 else 'falling to 0'}, clipped at {stage.clip:g}."
    )


def own_tables(results: Results) -> dict[str, list[Row]]:
    """The rows of decided.csv, gains.csv and judgements.csv; of what has been run."""
    decided = decided_comparisons(results)
    return {
        "decided": [each.row(len(decided)) for each in decided if each.is_run],
        "gains": gains(results),
        "judgements": judgement_rows(results),
    }


def judgement_rows(results: Results) -> list[Row]:
    """What the answers on the way were, where training looked at them."""
    keys = ("step", "reward", "kl", *(measure.key for measure in results.foundation.measures))
    return [
        {"policy": str(arm), "seed": seed, **{key: judged[key] for key in keys}}
        for arm, found in results.arms.items()
        for seed, each in enumerate(found)
        for judged in each["judgements"]
    ]


def decided_section(results: Results) -> list[str]:
    """The comparisons that were written down before the runs."""
    decided = decided_comparisons(results)
    if not decided:
        return []
    lines = [f"- {each.sentence(len(decided))}" for each in decided]
    return ["\n".join(["### Decided before the runs", "", *lines])]
