"""One run of the example, which several files look at."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from helpers.example import (
    EXAMPLES,
    SFT_STEPS,
    STEPS,
    Finished,
    json_lines,
    rows_of,
    run_script,
)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Finished:
    cwd = tmp_path_factory.mktemp("run")
    flags = ["--sft-steps", SFT_STEPS, "--sft-lr", 3e-3, "--steps", STEPS, "--batch-size", 8]
    done = run_script(*map(str, flags), "--max-length", "40", cwd=cwd)
    assert done.returncode == 0, done.stderr
    output = cwd / "runs" / "spo-1"
    steps, held_out = rows_of(output / "steps.csv"), rows_of(output / "held_out.csv")
    return Finished(cwd, output, done.stdout, steps, held_out)


@pytest.fixture(scope="session")
def judged(tmp_path_factory) -> Path:
    """The shipped pairs, whose reward gap every other line gives as a probability."""
    records = [json.loads(line) for line in (EXAMPLES / "pairs.jsonl").read_text().splitlines()]
    for each in records[1::2]:
        each["p_chosen"] = 1 / (1 + math.exp(-each.pop("reward_gap")))
    path = tmp_path_factory.mktemp("judged") / "pairs.jsonl"
    path.write_bytes(json_lines(*records))
    return path
