"""The benchmark built on the example: its arms, its rows, and how it goes on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

import arguments
from benchmarks import real_pairs


@pytest.mark.parametrize("arm", real_pairs.ARMS, ids=lambda arm: arm.name)
def test_arms_are_command_lines_of_the_example(arm, tmp_path) -> None:
    options = arguments.parse_options(arm.command(3, Path("pairs.jsonl"), tmp_path)[2:])
    assert (options.loss, options.beta, options.seed) == (arm.loss, arm.beta, 3)
    assert (options.max_length, options.sft_steps, options.steps) == (384, 150, 80)
    assert f"{options.loss.upper()}({options.beta})" in arm.name
    assert options.reward_gap == ("known gap" in arm.name)
    assert (options.linear_below == 0.0) == ("linear below 0" in arm.name)


def test_a_pretrained_model_is_trained_without_sft(tmp_path) -> None:
    arm = replace(real_pairs.ARMS[0], model="owner/name")
    options = arguments.parse_options(arm.command(0, Path("pairs.jsonl"), tmp_path)[2:])
    assert (options.model, options.sft_steps, options.fused) == ("owner/name", 0, True)
    # A row says which model it is of, and is not taken for another's; the place does not matter.
    settings = {real_pairs.settings_of(each) for each in (arm, real_pairs.ARMS[0])}
    assert len(settings) == 2
    moved = replace(arm, model=str(tmp_path / "name"))
    assert real_pairs.settings_of(moved) == real_pairs.settings_of(arm)
    (tmp_path / "name").mkdir()
    assert real_pairs.model_name(f"{tmp_path}/./name") == str(tmp_path / "name")
    assert real_pairs.model_name("owner/name") == "owner/name"


def test_row_is_the_end_of_the_run(finished) -> None:
    arm = real_pairs.ARMS[2]
    row = real_pairs.summarise(arm, 7, finished.output, 40, 1.0, diverged=False)
    last = {name: float(value) for name, value in finished.held_out[-1].items()}
    accuracy = last["rewards/accuracies"]
    assert (row.arm, row.seed, row.steps) == ("SPO(0.1)", 7, len(finished.held_out) - 1)
    assert row.accuracy == pytest.approx(accuracy, abs=1e-4)
    assert row.accuracy_error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 40), abs=1e-4)
    assert row.h == pytest.approx(10.0 * last["rewards/margins"], abs=1e-3)
    assert row.chosen_change == pytest.approx(10.0 * last["rewards/chosen"], abs=2e-3)
    assert row.rejected_change == pytest.approx(10.0 * last["rewards/rejected"], abs=2e-3)
    broken = real_pairs.summarise(arm, 7, finished.output, 40, 1.0, diverged=True)
    assert broken.steps == row.steps
    assert math.isnan(broken.accuracy)


def test_finished_arms_are_not_run_again(tmp_path, monkeypatch, finished, capsys) -> None:
    results = tmp_path / "results" / "real.csv"
    names = [arm.name for arm in real_pairs.ARMS]

    def ran_until(stop: int) -> tuple[int, list[tuple[str, int]]]:
        ran = []

        def run_arm(arm, seed, _pairs):
            if len(ran) == stop:
                raise real_pairs.ArmError("no more")
            ran.append((arm.name, seed))
            return real_pairs.summarise(arm, seed, finished.output, 40, 1.0, diverged=False)

        monkeypatch.setattr(real_pairs, "run_arm", run_arm)
        command = ["--pairs", "pairs.jsonl", "--seeds", "2", "--output", str(results)]
        return real_pairs.main(command), ran

    wanted = [(name, seed) for seed in (0, 1) for name in names]
    assert ran_until(4) == (2, wanted[:4])
    assert capsys.readouterr().err == "real_pairs: no more\n"
    assert ran_until(99) == (0, wanted[4:])
    assert ran_until(99) == (0, [])
    kept = [(row.arm, row.seed) for row in real_pairs.finished(results)]
    assert kept == [(name, seed) for name in names for seed in (0, 1)]


def test_refusal_of_the_example_is_passed_on(tmp_path, capsys) -> None:
    missing = tmp_path / "missing.jsonl"
    command = ["--pairs", str(missing), "--output", str(tmp_path / "real.csv")]
    assert real_pairs.main(command) == 2
    assert f"{missing}: expected a readable file of pairs" in capsys.readouterr().err
    assert not (tmp_path / "real.csv").exists()
