"""A run of the example: what it leaves, what it computes, and when."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import spoloss
import train
from arguments import Options, parse_options
from errors import DivergedError, InputError
from helpers.example import EXAMPLES, SFT_STEPS, STEPS, rows_of
from loop import loss_by_logits, loss_by_tiles, metrics_of, preference_updater, train_on_pairs
from models import LanguageModel, load_model
from pairs import read_pairs, split_pairs
from records import Records
from scoring import check_head, score_by_reference, score_pairs
from tokens import Text, TokenPair, encode_pair

pytestmark = pytest.mark.usefixtures("one_thread")
SIDES = ("chosen", "rejected")


@pytest.fixture
def trained(finished) -> LanguageModel:
    """The model that the run saved."""
    return load_model(str(finished.output / "model"), 40)


def encode_file(path: Path, trained: LanguageModel, count: int, *, with_gap: bool = False) -> list:
    """The first pairs of a file as tokens."""
    read = read_pairs(path, with_gap=with_gap)[:count]
    return [encode_pair(each, trained.tokenizer, 40) for each in read]


# --------------------------------------------------------------------------- what a run leaves


def test_run_leaves_what_it_promises(finished) -> None:
    assert [path.name for path in finished.cwd.iterdir()] == ["runs"]
    names = {path.name for path in finished.output.iterdir()}
    assert names == {"steps.csv", "held_out.csv", "curves.png", "model"}
    picture = (finished.output / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_steps_hold_every_step_and_metric(finished) -> None:
    metrics = set(spoloss.preference_metrics(*np.zeros((4, 2)), beta=0.1))
    assert set(finished.steps[0]) == {"stage", "step", "loss", "lr", "grad_norm"} | metrics
    counted = [(row["stage"], int(row["step"])) for row in finished.steps]
    sft = [("sft", step) for step in range(SFT_STEPS)]
    assert counted == sft + [("preference", step) for step in range(STEPS)]
    for row in finished.steps:
        filled = set(row) - {"stage"} - (metrics if row["stage"] == "sft" else set())
        assert all(math.isfinite(float(row[name])) for name in filled)
    for stage, lr in (("sft", 3e-3), ("preference", 3e-4)):
        assert max(float(row["lr"]) for row in finished.steps if row["stage"] == stage) == lr


def test_losses_move_as_they_should(finished) -> None:
    sft = [float(row["loss"]) for row in finished.steps if row["stage"] == "sft"]
    assert 0.0 < sft[-1] < 0.9 * sft[0]  # a negative log-likelihood
    # A batch is padded otherwise than in the reference's own pass, so 0 holds to rounding only.
    spo = [float(row["loss"]) for row in finished.steps if row["stage"] == "preference"]
    assert abs(spo[0]) < 1e-4
    assert spo[-1] < -0.01


def test_held_out_metrics_start_at_the_reference(finished) -> None:
    assert [int(row["step"]) for row in finished.held_out] == list(range(STEPS + 1))
    first, last = finished.held_out[0], finished.held_out[-1]
    rewards = [name for name in first if name.startswith("rewards/")]
    assert all(float(first[name]) == 0.0 for name in [*rewards, "loss"])
    assert float(last["rewards/accuracies"]) > 0.5
    assert float(last["loss"]) < -0.01
    assert float(last["rewards/margins"]) > 0.01
    for side in SIDES:
        moved = float(last[f"logps/{side}"]) - float(first[f"logps/{side}"])
        assert float(last[f"rewards/{side}"]) == pytest.approx(0.1 * moved, abs=1e-4)
    table = [line for line in finished.stdout.splitlines() if line.startswith("reward margin x")]
    margin = float(last["rewards/margins"])
    assert table == [f"{'reward margin x (nats)':<36}{0:>10.3f}{margin:>10.3f}{margin:>+10.3f}"]


def test_run_says_what_it_does(finished) -> None:
    assert "360 pairs to train on, 40 held out; " in finished.stdout
    truncated = int(finished.stdout.partition("held out; ")[2].partition(" ")[0])
    assert 0 < truncated < 400
    assert "The spo loss starts at 0.000" in finished.stdout
    assert "good values are negative" in finished.stdout


def test_saved_model_is_the_trained_policy(finished, trained) -> None:
    options = parse_options(["--batch-size", "8"])
    held_out = split_pairs(read_pairs(options.pairs), options).held_out
    encoded = [encode_pair(each, trained.tokenizer, 40) for each in held_out]
    logps = score_pairs(trained.model, encoded, options, "held out")
    last = finished.held_out[-1]
    assert logps.chosen.mean().item() == pytest.approx(float(last["logps/chosen"]), rel=1e-4)
    assert logps.rejected.mean().item() == pytest.approx(float(last["logps/rejected"]), rel=1e-4)


def test_diverged_run_stops_and_keeps_its_rows(finished, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    flags = "--sft-steps 1 --steps 2 --batch-size 2 --max-length 40 --loss squared --lr 1e30"
    model = ["--model", str(finished.output / "model"), "--held-out", "2", "--output", "out"]
    assert train.main([*model, *flags.split()]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("train.py: error: preference step 1: expected a finite loss")
    assert message.endswith("try a lower --lr")
    rows = rows_of(tmp_path / "out" / "steps.csv")
    assert [row["stage"] for row in rows] == ["sft", "preference"]
    assert not (tmp_path / "out" / "model").exists()


# ---------------------------------------------------------------------- what is scored, and when


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_are_those_of_each_text_alone(trained, batch_size) -> None:
    pairs = encode_file(EXAMPLES / "pairs.jsonl", trained, 7)
    assert len({each.length for each in pairs}) > 2
    options = parse_options(["--batch-size", str(batch_size)])
    logps = score_pairs(trained.model, pairs, options, "by hand")
    for row, each in enumerate(pairs):
        for text, logp in ((each.chosen, logps.chosen[row]), (each.rejected, logps.rejected[row])):
            # No padding, no second text in the batch, no function of the example.
            table = trained.model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
            answer = [position for position, label in enumerate(text.labels) if label != -100]
            by_hand = sum(table[position - 1, text.ids[position]] for position in answer)
            assert by_hand.item() == pytest.approx(logp.item(), rel=1e-4)


def count_texts(
    trained: LanguageModel, options: Options, output: Path, *, train: int, held_out: int
) -> dict[bool, int]:
    """Trains on pairs; the number of texts that the model saw with and without gradients."""
    pairs = encode_file(EXAMPLES / "pairs.jsonl", trained, train + held_out)
    seen = {True: 0, False: 0}

    def count(_model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[torch.is_grad_enabled()] += len(inputs[0])

    hook = trained.model.register_forward_pre_hook(count)
    train_on_pairs(trained.model, pairs[:train], pairs[train:], options, Records(output))
    hook.remove()
    return seen


@pytest.mark.parametrize(
    ("steps", "scored"), [(2, 8), (5, 20), (6, 22)], ids=["part", "most", "more than one pass"]
)
def test_reference_scores_each_drawn_pair_once(trained, tmp_path, steps, scored) -> None:
    flags = f"--steps {steps} --batch-size 4 --evaluations 1"
    options = parse_options(flags.split())
    seen = count_texts(trained, options, tmp_path, train=22, held_out=3)
    # The held-out pairs are scored by the reference and once after the last step.
    assert seen == {True: 2 * 4 * steps, False: 2 * (scored + 2 * 3)}


def test_first_batch_agrees_with_the_reference_in_a_short_run(trained, tmp_path) -> None:
    options = parse_options(["--steps", "1", "--batch-size", "4"])
    count_texts(trained, options, tmp_path, train=22, held_out=3)
    (row,) = rows_of(tmp_path / "steps.csv")
    assert float(row["rewards/chosen"]) == pytest.approx(0.0, abs=1e-4)
    assert float(row["rewards/rejected"]) == pytest.approx(0.0, abs=1e-4)
    assert float(row["grad_norm"]) > 0.01


def test_progress_is_shown_before_the_first_forward_pass(trained, tmp_path, capsys) -> None:
    shown = []

    def look(_model: torch.nn.Module, _inputs: tuple[torch.Tensor, ...]) -> None:
        shown.append(capsys.readouterr().err)

    trained.model.register_forward_pre_hook(look)
    pairs = encode_file(EXAMPLES / "pairs.jsonl", trained, 10)
    options = parse_options(["--steps", "1", "--batch-size", "4", "--evaluations", "1"])
    train_on_pairs(trained.model, pairs[:6], pairs[6:], options, Records(tmp_path))
    by_reference, held_out, step, _ = shown
    assert "reference:   0%" in by_reference
    assert "0/4" in by_reference
    assert "reference, held out:   0%" in held_out
    assert "preference:   0%" in step


@pytest.mark.parametrize(
    ("steps", "evaluations", "at"),
    [(4, 1, [0, 4]), (4, 2, [0, 2, 4]), (5, 2, [0, 3, 5]), (3, 10, [0, 1, 2, 3])],
)
def test_evaluations_are_spread_over_the_steps(trained, tmp_path, steps, evaluations, at) -> None:
    flags = f"--steps {steps} --evaluations {evaluations} --batch-size 1"
    count_texts(trained, parse_options(flags.split()), tmp_path, train=6, held_out=2)
    assert [int(row["step"]) for row in rows_of(tmp_path / "held_out.csv")] == at


# --------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize(
    ("loss", "known_gap"),
    [("spo", False), ("spo", True), ("dpo", False), ("squared", False), ("squared", True)],
)
def test_fused_is_the_same_run(
    finished, judged, tmp_path, monkeypatch, capsys, loss, known_gap
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(finished.output / "model"), "--loss", loss]
    gap = ["--pairs", str(judged), "--reward-gap"] if known_gap else []
    flags = ["--sft-steps", "2", "--steps", "3", "--lr", "1e-4", "--max-length", "40"]
    few = ["--batch-size", "8", "--held-out", "4", "--evaluations", "1"]
    for extra in ([], ["--fused"]):
        assert train.main([*model, *flags, *few, *gap, *extra]) == 0
    by_logits, by_tiles = (rows_of(tmp_path / "runs" / f"{loss}-{n}" / "steps.csv") for n in (1, 2))
    for plain, fused in zip(by_logits, by_tiles, strict=True):
        assert float(fused["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-4, abs=1e-4)
        assert float(fused["grad_norm"]) == pytest.approx(float(plain["grad_norm"]), rel=1e-3)
    printed = capsys.readouterr().out
    assert "Peak memory by logits: " in printed
    assert "Peak memory with the fused head: " in printed


@pytest.mark.parametrize("flags", ["--loss spo", "--linear-below 0", "--loss squared"])
def test_known_gap_is_the_target_of_its_pair(trained, judged, flags) -> None:
    model = trained.model
    options = parse_options([*flags.split(), "--reward-gap", "--beta", "0.3"])
    pairs = encode_file(judged, trained, 8, with_gap=True)
    pairs = score_by_reference(model, pairs, options, "reference")
    pushed = np.linspace(-9.0, 30.0, len(pairs))
    pairs = [
        replace(each, reference_chosen=each.reference_chosen - h)
        for each, h in zip(pairs, pushed, strict=True)
    ]
    gaps = np.array([each.reward_gap for each in pairs])
    assert gaps.std() > 0.5
    if options.loss == "squared":
        by_hand = ((pushed - gaps / 0.3) ** 2).mean()
    else:
        x = 0.3 * pushed / gaps
        curve = -x * np.exp(-x)
        curve = curve if options.linear_below is None else np.where(x < 0.0, -x, curve)
        by_hand = (gaps**2 * curve).mean()
    for loss, _ in (loss_of(model, pairs, options) for loss_of in (loss_by_logits, loss_by_tiles)):
        assert loss.item() == pytest.approx(by_hand, rel=1e-4)
    logps = score_pairs(model, pairs, options, "held out")
    metrics = metrics_of(logps, pairs, options)
    assert metrics["loss"] == pytest.approx(by_hand, rel=1e-4)
    above_target, above_1 = 0.3 * pushed > gaps, 0.3 * pushed > 1.0
    assert metrics["rewards/margins_above_1"] == pytest.approx(above_target.mean())
    assert above_target.sum() < above_1.sum()


def test_fused_refuses_a_head_with_more_to_it(trained) -> None:
    model = trained.model
    text = Text(ids=[5, 6, 7], labels=[-100, 6, 7])
    pairs = [TokenPair(text, text, truncated=False, reward_gap=None)]
    check_head(model, pairs)
    model.lm_head.bias = torch.nn.Parameter(torch.arange(model.config.vocab_size) / 100.0)
    with pytest.raises(InputError, match="expected a head that is hidden @ weight"):
        check_head(model, pairs)


def test_spo_is_advised_to_take_the_tangent(trained) -> None:
    model = trained.model
    advice = {}
    for flags in ("", "--linear-below 0", "--loss dpo"):
        updater = preference_updater(model, parse_options(flags.split()))
        loss = sum(weight.sum() for weight in model.parameters()) * math.inf
        loss.backward()
        with pytest.raises(DivergedError, match=r"^preference step 0: ") as error:
            updater.step(loss)
        advice[flags] = str(error.value).partition("; try ")[2]
    lower = "a lower --lr"
    assert advice == {
        "": f"{lower} or --linear-below 0",
        "--linear-below 0": lower,
        "--loss dpo": lower,
    }
