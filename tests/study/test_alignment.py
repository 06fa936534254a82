"""The alignment experiment: its task, its judge, its losses, its runs and what it refuses."""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.alignment import __main__ as command
from benchmarks.alignment import language, results, seeds, stability, training
from benchmarks.alignment.arms import FORMS, Arm, parse_arm
from benchmarks.alignment.evaluation import best_of, judge, tilt, win_rate
from benchmarks.alignment.experiment import Foundation, split_prompts, write_corpus
from benchmarks.alignment.figures import COLOURS
from benchmarks.alignment.language import Prompt, all_prompts, encode, parse, reward, write_review
from benchmarks.alignment.model import LAYERS, Policy, completion_logps, sample
from benchmarks.alignment.protocol import FULL, QUICK, Protocol
from benchmarks.alignment.store import open_store
from benchmarks.alignment.training import Pairs, Stage

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
FILM = Prompt("film", ("plot", "cast"))
TINY = Protocol(
    foundation=Foundation(
        fine_tuning=Stage(pairs=300, steps=12, batch=16, lr=2e-3, clip=None),
        pairs=48,
        held_out_pairs=32,
        answers=4,
        limit_answers=16,
    ),
    seeds=2,
    arms=tuple(map(parse_arm, ("dpo:0.1", "spo:0.1", "dpo:0.4", "spo:0.1@noisy"))),
    preference=Stage(pairs=48, steps=4, batch=8, snapshots=2),
    memorised_arms=(parse_arm("spo:0.25"),),
    memorised=Stage(pairs=8, steps=4, batch=4, lr_end=1.0, snapshots=2),
)


@pytest.fixture(autouse=True)
def quick_is_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    # Should a refusal fail to come, a test must not train for minutes before it says so.
    monkeypatch.setattr(command, "QUICK", TINY)


def policy_of(name: str) -> Policy:
    torch.manual_seed(seeds.number(name))
    return Policy()


# --------------------------------------------------------------------------- language and reward


def test_size_of_the_language() -> None:
    assert len(set(language.VOCABULARY)) == len(language.VOCABULARY) == 95
    assert len(set(all_prompts())) == 160
    assert all(len(prompt.tokens) == language.PROMPT_TOKENS for prompt in all_prompts())


def reward_by_hand(prompt: Prompt, review: list[str]) -> float:
    """The reward of a well-formed review, clause by clause from its text."""
    text = " ".join(review[:-1])
    clauses = re.findall(
        r"(?:(and|but) )?the (\w+) was (?:(very|really|rather|slightly) )?(\w+)", text
    )
    verdicts = re.findall(r"overall i (\w+) it", text)
    scores = [language.ADJECTIVES[adjective] for *_, adjective in clauses]
    factors = {"very": 1.5, "really": 1.25, "rather": 0.75, "slightly": 0.5, "": 1.0}
    sentiment = sum(s * factors[clause[2]] for s, clause in zip(scores, clauses, strict=True))
    sentiment += sum(
        {"loved": 1.5, "liked": 0.75, "disliked": -0.75, "hated": -1.5}[v] for v in verdicts
    )
    total = 3 * math.tanh(sentiment / 3)
    aspects, adjectives = [c[1] for c in clauses], [c[3] for c in clauses]
    total += sum(0.5 for aspect in prompt.aspects if aspect in aspects)
    for words in (aspects, adjectives, ["verdict"] * len(verdicts)):
        total -= 0.5 * sum(count - 1 for count in Counter(words).values())
    total -= 0.5 * sum(aspect not in language.TOPICS[prompt.topic] for aspect in aspects)
    for i, (conjunction, *_) in enumerate(clauses):
        opposite = conjunction and (scores[i] > 0) != (scores[i - 1] > 0)
        total -= 0.2 * (bool(conjunction) and (conjunction == "but") != opposite)
    return total - 0.1 * max(0, len(text.replace(".", "").split()) - 14)


def test_samples_of_the_grammar_get_the_reward_counted_by_hand() -> None:
    rng = random.Random(0)
    seen = []
    for _ in range(1000):
        prompt = rng.choice(all_prompts())
        review = write_review(prompt, rng)
        reading = parse(review)
        assert (reading.malformed, reading.finished) == (0, True)
        assert len(review) <= language.COMPLETION_TOKENS
        assert reward(prompt, reading) == pytest.approx(reward_by_hand(prompt, review), abs=1e-8)
        seen.append(reading)
    # Every term of the reward was there to be counted.
    assert all(any(r.wrong_conjunctions > n for r in seen) for n in (0,))
    assert any(len(set(r.aspects)) < len(r.aspects) for r in seen)
    assert any(r.words > 14 for r in seen)
    assert any(r.verdicts for r in seen)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the plot was very superb but the cast was weak . <end>", 3 * math.tanh(1.75 / 3) + 1),
        ("the plot was very superb and the cast was weak . <end>", 3 * math.tanh(1.75 / 3) + 0.8),
        ("the villain was good . <end>", 3 * math.tanh(1 / 3) - 0.5),
        ("the plot was good . the plot was good . <end>", 3 * math.tanh(2 / 3) + 0.5 - 1.0),
        # Malformed: text that ends before a clause, without end, or with tokens out of place.
        ("<end>", -0.5),
        ("i went on monday . <end>", -0.5),
        ("the plot was good", 3 * math.tanh(1 / 3) + 0.5 - 1),
        ("was stunning was stunning . <end>", 3 * math.tanh(4 / 3) - 0.5 - 1.0),
        ("the plot was good . film <end>", 3 * math.tanh(1 / 3) + 0.5 - 0.5),
        ("the plot was good and <end>", 3 * math.tanh(1 / 3) + 0.5 - 0.5),
        ("plot plot plot plot plot . <end>", 0.5 - 2.0 - 1.5),  # seven malformed count as three
        ("good overall i hated it . i loved it . <end>", 3 * math.tanh(1 / 3) - 0.5 - 1.5),
    ],
)
def test_reward_of_malformed_and_well_formed_texts(text: str, expected: float) -> None:
    assert reward(FILM, parse(text.split())) == pytest.approx(expected, abs=1e-8)


def test_reading_stops_at_the_end_and_words_count_where_they_stand() -> None:
    ended = parse(["the", "plot", "was", "good", ".", "<end>", "awful", "awful"])
    assert (ended.adjectives, ended.malformed, ended.words) == (["good"], 0, 4)
    assert parse(["very", "superb"]).sentiment == 3.0
    assert parse(["very", ".", "superb"]).sentiment == 2.0


# -------------------------------------------------------------------------------------- the model


def test_log_probabilities_by_hand_up_to_the_first_end() -> None:
    policy = policy_of("logps")
    prompt = encode(FILM.tokens)
    completion = encode(["the", "plot", "was", "good", ".", "<end>"])
    rows = [completion + encode(["bad"]) * 34, encode(["was"]) * 40]
    got = completion_logps(policy, torch.tensor([prompt, prompt]), torch.tensor(rows))
    for row, counted, value in zip(rows, (6, 40), got, strict=True):
        text = prompt + row
        logps = policy(torch.tensor([text[:-1]]))[0].log_softmax(1)
        want = sum(logps[3 + i, row[i]] for i in range(counted))
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-4)


def test_sampling_with_a_cache_follows_the_model() -> None:
    policy = policy_of("cache")
    ids = torch.tensor([encode((*FILM.tokens, "the", "plot", "was"))])
    whole = policy(ids)
    logits, past = policy.advance(ids[:, :4], [None] * LAYERS)
    steps = [logits]
    for i in range(4, 7):
        logits, past = policy.advance(ids[:, i : i + 1], past)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)

    # The first token's frequencies are its probabilities.
    prompts = ids[:, :4].expand(1000, 4)
    first = sample(policy, prompts, torch.Generator().manual_seed(0))[:, 0]
    probability = whole[0, 3].softmax(0).detach()
    frequency = torch.bincount(first, minlength=95) / 1000
    assert ((frequency - probability).abs() < 5 * (probability / 1000).sqrt()).all()


def test_texts_of_several_lengths_are_sampled_apart() -> None:
    # What one text has is not what its neighbours in the batch have: each follows its own prompt.
    policy = policy_of("rows")
    prompts = torch.tensor([encode(prompt.tokens) for prompt in all_prompts()[:64]])
    drawn = sample(policy, prompts, torch.Generator().manual_seed(1))
    lengths = (drawn != 0).sum(1)
    assert lengths.min() < 40 == drawn.shape[1]
    with torch.no_grad():
        for row in (0, 17, 63):
            alone = policy(torch.cat((prompts, drawn), 1)[row : row + 1])[0].softmax(1)
            assert all(alone[3 + i, drawn[row, i]] > 1e-4 for i in range(min(lengths[row] + 1, 40)))


# --------------------------------------------------------------------------- win rates and limits


def test_win_rate_is_over_all_pairs_of_unequal_number() -> None:
    ours = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 5.0]])
    theirs = np.array([[2.0, 2.0, 0.0], [0.0, 7.0, 5.0]])
    points = []
    for a, b in zip(ours, theirs, strict=True):
        for i, j in itertools.permutations(range(3), 2):
            points.append(1.0 if a[i] > b[j] else 0.5 if a[i] == b[j] else 0.0)
    assert win_rate(ours, theirs) == pytest.approx(statistics.fmean(points))
    assert win_rate(ours, theirs) + win_rate(theirs, ours) == pytest.approx(1.0)
    assert win_rate(ours, ours) == 0.5
    # Equal numbers left out: a text never meets the one that was drawn along with it.
    assert win_rate(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])) == 0.5
    assert math.isnan(win_rate(ours, np.full((2, 3), np.nan)))


def test_identical_policies_do_not_share_random_numbers() -> None:
    policy = policy_of("twins")
    prompts = all_prompts()[:32]
    answers = [judge(policy, policy, prompts, 16, name) for name in ("one", "other", "one")]
    assert answers[0] == answers[2]
    one, other = (np.array(each["rewards"]) for each in answers[:2])
    assert (one == other).mean() < 0.05
    assert abs(win_rate(one, other) - 0.5) < 4 * 0.5 / math.sqrt(one.size)
    assert answers[0]["kl"] == 0.0


def test_a_broken_policy_is_judged_without_a_crash() -> None:
    policy = policy_of("broken")
    for parameter in policy.parameters():
        parameter.data.fill_(math.nan)
    found = judge(policy, policy_of("sound"), all_prompts()[:2], 3, "broken")
    assert math.isnan(found["reward"])
    assert np.shape(found["rewards"]) == (2, 3)
    assert math.isnan(win_rate(np.array(found["rewards"]), np.zeros((2, 3))))


def test_limits_of_a_coin() -> None:
    coin = np.tile([0.0, 1.0], (3, 50))
    p = 1 / (1 + math.exp(-2))
    optimum = tilt(coin, beta=0.5)
    assert optimum.reward == pytest.approx(p)
    assert optimum.kl == pytest.approx(math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p))
    assert best_of(coin, 3).reward == pytest.approx(7 / 8)
    assert best_of(coin, 3).kl == pytest.approx(math.log(3) - 2 / 3)


@pytest.mark.parametrize(
    ("probability", "freedom", "table"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 4, 2.7764), (0.9995, 4, 8.6103)],
)
def test_student_quantiles(probability: float, freedom: int, table: float) -> None:
    assert results.t_quantile(probability, freedom) == pytest.approx(table, rel=1e-4)


def test_intervals_widen_with_the_number_of_comparisons() -> None:
    wins = results.Estimate((0.55, 0.57, 0.56))
    assert wins.error == pytest.approx(0.01 / math.sqrt(3))
    low, high = wins.interval(1)
    assert (low, high) == pytest.approx(
        (0.56 - 4.3027 * wins.error, 0.56 + 4.3027 * wins.error), rel=1e-4
    )
    comparison = results.Comparison(Arm("spo", 0.1), Arm("dpo", 0.1), wins)
    assert comparison.verdict(1) == "better"
    assert comparison.verdict(100) == "not distinguishable"
    mirrored = results.Estimate(tuple(1 - value for value in wins.values))
    assert replace(comparison, wins=mirrored).verdict(1) == "worse"


# ----------------------------------------------------------------------------------- arms, stages


def test_arms_are_written_as_they_are_read() -> None:
    for protocol in (QUICK, FULL):
        for arm in protocol.arms:
            assert parse_arm(str(arm)) == arm
        assert len(set(protocol.arms)) == len(protocol.arms)
    assert COLOURS.keys() == FORMS.keys()
    assert parse_arm("spo:0.1@noisy") == Arm("spo", 0.1, noisy=True)
    assert Arm("spo", 0.1).title == "SPO(0.1)"


def test_the_full_protocol_has_every_partner() -> None:
    spos = [arm for arm in FULL.arms if arm.form == "spo"]
    assert {arm.noisy for arm in spos} == {False, True}
    for arm in spos:
        for factor in (1, 4):
            assert any(
                other.form == "dpo"
                and other.noisy == arm.noisy
                and math.isclose(other.beta, factor * arm.beta)
                for other in FULL.arms
            )


X0 = {"spo-below0": 0.0, "spo-below-1": -1.0, "spo-below-2": -2.0}


def loss_by_hand(form: str, beta: float, h: np.ndarray, gap: np.ndarray) -> float:
    def curve(x: np.ndarray, x0: float = -math.inf) -> np.ndarray:
        tangent = math.exp(-x0) * (-x0 + (x0 - 1) * (x - x0)) if math.isfinite(x0) else x
        return np.where(x < x0, tangent, -x * np.exp(-x))

    p = 1 / (1 + np.exp(-gap))
    x = beta * h
    return float(
        np.mean(
            {
                "dpo": np.log1p(np.exp(-x)),
                "spo": curve(x),
                **{name: curve(x, x0) for name, x0 in X0.items()},
                "squared": (h - 1 / beta) ** 2,
                "dpo-soft": p * np.log1p(np.exp(-x)) + (1 - p) * np.log1p(np.exp(x)),
                "squared-gap": (h - gap / beta) ** 2,
                "spo-gap": curve(x / gap),
                "spo-gap-floor": curve(x / np.maximum(gap, 0.5)),
                "spo-gap-weighted": gap**2 * curve(x / gap),
                "spo-gap-weighted-below0": gap**2 * curve(x / gap, 0.0),
            }[form]
        )
    )


@pytest.mark.parametrize("form", FORMS)
def test_losses_of_the_arms(form: str) -> None:
    rng = np.random.default_rng(0)
    logps = rng.normal(-20, 3, (4, 64))
    logps[0, 0] -= 30.0  # a pair far on the steep side
    gap = rng.uniform(0.1, 3, 64)
    h = (logps[0] - logps[2]) - (logps[1] - logps[3])
    assert (0.3 * h).min() < -2
    got = Arm(form, 0.3).loss(tuple(map(torch.tensor, logps)), torch.tensor(gap))
    assert got.item() == pytest.approx(loss_by_hand(form, 0.3, h, gap), rel=1e-9)


def some_pairs(number: int) -> Pairs:
    prompts, reviews = write_corpus(all_prompts(), 2 * number, 0)
    policy = policy_of("reference")
    chosen, rejected = reviews[:number], reviews[number:]
    return Pairs(
        prompts[:number],
        chosen,
        rejected,
        torch.linspace(0.5, 2, number),
        training.score(policy, prompts[:number], chosen),
        training.score(policy, prompts[:number], rejected),
    )


def test_wrong_labels_exchange_everything() -> None:
    pairs = some_pairs(4)
    wrong = torch.tensor([True, False, True, False])
    flipped = pairs.flipped(wrong)
    assert (flipped.gap[wrong] == -pairs.gap[wrong]).all()
    assert (flipped.chosen[wrong] == pairs.rejected[wrong]).all()
    assert (flipped.reference_rejected[wrong] == pairs.reference_chosen[wrong]).all()
    for old, new in zip(vars(pairs).values(), vars(flipped.flipped(wrong)).values(), strict=True):
        assert (old == new).all()
    for old, new in zip(vars(pairs).values(), vars(flipped).values(), strict=True):
        assert (old[~wrong] == new[~wrong]).all()


def train(arm: str, stage: Stage, looks: list[int] | None = None) -> training.Trained:
    seen: list[int] = [] if looks is None else looks
    return training.train_on_pairs(
        policy_of("reference"),
        some_pairs(16),
        parse_arm(arm),
        stage,
        0,
        lambda: None,
        lambda step, _: seen.append(step),
    )


def test_training_widens_margins_and_repeats_itself() -> None:
    looks: list[int] = []
    stage = Stage(pairs=16, steps=12, batch=8, lr=1e-3, snapshots=3)
    first, second = train("spo:0.1", stage, looks), train("spo:0.1", stage)
    assert looks == [4, 8, 12]
    assert first.grad_norms == second.grad_norms
    pc, pr, rc, rr = training.pair_logps(first.policy, some_pairs(16))
    assert ((pc - rc) - (pr - rr)).mean() > 1.0
    assert first.stopped_at is None
    assert len(first.grad_norms) == 12


def test_a_run_stops_at_the_first_loss_that_is_not_finite() -> None:
    stage = Stage(pairs=16, steps=30, batch=16, lr=3e-2, lr_end=1.0, clip=None)
    stopped = train("spo:1000", stage)
    assert stopped.stopped_at is not None
    assert len(stopped.grad_norms) == stopped.stopped_at
    assert all(map(math.isfinite, stopped.grad_norms[:-1]))
    assert stopped.summary()["grad_norm_max"] == math.inf
    assert all(torch.isfinite(parameter).all() for parameter in stopped.policy.parameters())
    assert train("spo-below0:1000", stage).stopped_at is None


def test_schedule_and_batches() -> None:
    stage = Stage(pairs=10, steps=7, batch=4)
    assert stage.lr_factor(0) == 1.0
    assert 0.0 < stage.lr_factor(6) < 0.1
    assert replace(stage, lr_end=1.0).lr_factor(5) == 1.0
    batches = list(training.draw_batches(10, stage, torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [4] * 7
    drawn = torch.cat(batches).tolist()
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))
    assert drawn[:10] != drawn[10:20]


def test_held_out_prompts_are_held_out() -> None:
    fit, held_out = split_prompts(0)
    assert (len(fit), len(held_out)) == (128, 32)
    assert set(fit) | set(held_out) == set(all_prompts())
    assert split_prompts(1)[1] != held_out == split_prompts(0)[1]


# ---------------------------------------------------------------------------------- a whole run


def run_main(*argv: str | Path) -> int:
    return command.main([str(argument) for argument in argv])


@dataclass(frozen=True)
class Finished:
    folder: Path
    printed: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("alignment") / "run"
    done = subprocess.run(
        tiny_command(folder, 1), cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "100%" in done.stderr
    return Finished(folder, done.stdout)


def tiny_command(folder: Path, workers: int) -> list[str]:
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_alignment as t; "
        "t.command.QUICK = t.TINY; sys.exit(t.command.main(sys.argv[1:]))"
    )
    return [
        sys.executable,
        "-c",
        code,
        "--quick",
        "--output",
        str(folder),
        "--workers",
        str(workers),
    ]


def published(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def rows_of(path: Path) -> list[dict[str, str]]:
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ")
    assert f"torch {torch.__version__.partition('+')[0]}" in first
    return list(csv.DictReader(lines))


def test_a_run_leaves_its_tables_and_figures(finished: Finished) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    tables = {
        f"{name}.csv"
        for name in ("win_rates", "policies", "comparisons", "margins", "limits", "texts")
    }
    pictures = {f"{name}.png" for name in ("frontier", "margins", "gradients")}
    assert names >= tables | pictures | {"settings.json", "tables.md", "work"}
    assert (finished.folder / "work" / ".gitignore").read_text() == "*\n"
    assert (
        finished.printed.strip()
        == (finished.folder / "tables.md").read_text(encoding="utf-8").strip()
    )

    # The paper's own form comes first: three policies, rates that mirror each other.
    table = finished.printed.partition("### SFT, DPO(0.1) and SPO(0.1)")[2].strip().splitlines()
    assert table[0] == "| Win rate (%) of row vs. column | SFT | DPO(0.1) | SPO(0.1) |"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:5]]
    assert [row[0] for row in cells] == ["SFT", "DPO(0.1)", "SPO(0.1)"]
    ours, theirs = (float(cells[i][j].split(" ± ")[0]) for i, j in ((2, 1), (0, 3)))
    assert ours == pytest.approx(100 - theirs, abs=0.11) or cells[1][1] == "-"
    assert "SPO(0.1) over DPO(0.4), clean labels" in finished.printed


def test_published_win_rates_are_those_of_the_kept_rewards(finished: Finished) -> None:
    rows = {(row["row"], row["column"]): row for row in rows_of(finished.folder / "win_rates.csv")}
    assert len(rows) == 5 * 4
    rates = []
    for seed in (0, 1):
        work = finished.folder / "work" / f"seed-{seed}"
        a, b = (
            np.array(json.loads((work / f"{name}.json").read_text())["rewards"])
            for name in ("spo_0.1@noisy", "foundation")
        )
        assert a.shape == (32, 4)
        rates.append(win_rate(a, b))
    row = rows["spo:0.1@noisy", "sft"]
    assert float(row["win_rate"]) == pytest.approx(statistics.fmean(rates), rel=1e-5)
    assert float(row["standard_error"]) == pytest.approx(
        abs(rates[0] - rates[1]) / 2, rel=1e-4, abs=1e-6
    )
    assert float(rows["sft", "spo:0.1@noisy"]["win_rate"]) == pytest.approx(
        1 - statistics.fmean(rates), rel=1e-5
    )


def test_an_interrupted_run_goes_on_and_gives_the_same(finished: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen(
        tiny_command(folder, 1), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        parts = folder / "work" / "seed-0"
        while len(list(parts.glob("*.json"))) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.rstrip().endswith("stopped; the same command goes on from here")
    assert not (folder / "tables.md").exists()

    kept = {path: path.stat().st_mtime_ns for path in folder.glob("work/*/*.json")}
    complete = {path.name for path in finished.folder.glob("work/*/*.json")}
    assert 3 <= len(kept) < len(list(finished.folder.glob("work/*/*.json")))
    assert run_main("--quick", "--output", folder, "--workers", "2") == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert {path.name for path in folder.glob("work/*/*.json")} == complete
    assert published(folder) == published(finished.folder)


def test_a_finished_run_is_only_reported_again(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.folder.glob("work/*/*")}
    assert run_main("--quick", "--output", finished.folder) == 0
    assert capsys.readouterr().out == finished.printed
    assert {path: path.stat().st_mtime_ns for path in before} == before


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--quick --arms ppo:0.1", "ppo:0.1: expected an arm FORM:BETA with FORM one of dpo, spo"),
        ("--quick --arms dpo:0.1 spo", "spo: expected a finite beta above 0"),
        ("--quick --arms spo:0", "spo:0: expected a finite beta above 0"),
        ("--quick --arms spo:-1", "spo:-1: expected a finite beta above 0"),
        ("--quick --arms spo:nan", "spo:nan: expected a finite beta above 0"),
        ("--quick --arms spo:0.1@dirty", "spo:0.1@dirty: expected @noisy or nothing"),
        ("--quick --arms spo-gap:1@noisy", "spo-gap:1@noisy: expected clean labels"),
        ("--quick --seeds 0", "--seeds: expected at least 1, got 0"),
        ("--quick --seeds many", "argument --seeds: invalid int value: 'many'"),
        ("--full --workers 0", "--workers: expected at least 1, got 0"),
        ("--quick --full", "not allowed with argument"),
        ("", "one of the arguments --quick --full is required"),
    ],
)
def test_requests_that_make_no_sense(
    arguments: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert run_main(*arguments.split(), "--output", folder) == 2
    assert_refused(capsys, words)
    assert not folder.exists()


def assert_refused(capsys: pytest.CaptureFixture[str], words: str) -> None:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("python -m benchmarks.alignment: error: ")
    assert words in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("content", [{}, {"settings.json": "{broken"}, {"mine.txt": "mine"}])
def test_folders_of_others_stay_as_they_are(
    content: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    if content:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
        words = "expected an empty folder or one with the settings.json of an earlier run"
    else:
        open_store(folder, TINY.settings())
        words = "expected results of the same settings, but these differ: arms, seeds"
    before = published(folder)
    assert run_main("--quick", "--seeds", "3", "--arms", "spo:0.1", "--output", folder) == 2
    assert_refused(capsys, words)
    assert published(folder) == before
    assert open_store(tmp_path / "new", QUICK.settings()) == open_store(
        tmp_path / "new", QUICK.settings()
    )


def test_a_file_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out"
    path.write_text("mine")
    assert run_main("--quick", "--output", path) == 2
    assert_refused(capsys, "expected a folder to write to")
    assert path.read_text() == "mine"


# -------------------------------------------------------------------------------- stability study


def outcome(form: str, stopped_at: int | None, rate: float, lr: float = 1e-3) -> stability.Outcome:
    setting = stability.Setting(Arm(form, 1.0), lr, None)
    return stability.Outcome(setting, stopped_at, 10.0, rate, 1.0, 0.1, -1.0)


def test_the_recommendation_follows_from_the_counts() -> None:
    safe = [outcome("spo-below0", None, 0.6), outcome("spo-below0", None, 0.4)]
    better = [outcome("spo-below-1", None, 0.7), outcome("spo-below-1", None, 0.55, lr=3e-4)]
    stopped = [outcome("spo", 7, 0.9), outcome("spo", None, 0.99)]
    unasked = [outcome("dpo", None, 0.95)] * 2
    advice = stability.advice([*stopped, *safe, *better, *unasked])
    assert "win rate): spo-below-1. Of its 2 runs 0 stopped and 0 ended below SFT" in advice
    assert "(of as many: spo-below0 0 and 1, spo 1 and 0)" in advice
    assert "Within it β 1, lr 0.001: 70.0 %" in advice
    assert "win rate): spo-below0." in stability.advice([*stopped, *safe])
    broken = [outcome("spo", 3, math.nan), *stopped]
    (count,) = stability.count_by(stability.form_of, broken)
    assert (count.stopped, count.worse_than_sft) == (2, 1)
    assert count.win_rate == pytest.approx((0.0 + 0.9 + 0.99) / 3)


def test_the_study_asks_for_what_it_says() -> None:
    runs = stability.STUDY.runs()
    assert len({run.name for run in runs}) == len(runs) == 180
    stages = {run.name: job for run, job in zip(runs, stability.STUDY.jobs()[1:], strict=True)}
    unclipped = next(run for run in runs if run.clip is None and run.lr == 3e-3 and run.arm.noisy)
    name, arm, stage, *_ = stages[unclipped.name].function.args
    assert (name, arm, stage.lr, stage.clip) == (unclipped.name, unclipped.arm, 3e-3, None)
    assert (stage.steps, stage.lr_factor(149)) == (150, 1.0)


def test_a_small_study(tmp_path: Path) -> None:
    study = replace(
        stability.STUDY,
        foundation=TINY.foundation,
        stage=Stage(pairs=48, steps=6, batch=8, lr_end=1.0),
        forms=("dpo", "spo", "spo-below0"),
        betas=(1000.0,),
        rates=(3e-2,),
        clips=(None,),
    )
    store = open_store(tmp_path / "study", {})
    for job in study.jobs():
        job.function(store, lambda: None)
    text = stability.report(study, store)
    rows = rows_of(store.folder / "stability.csv")
    assert len(rows) == 6
    stopped = {(row["form"], row["labels"]) for row in rows if row["stopped_at"]}
    assert stopped >= {("spo", "noisy")}
    assert not any(form == "dpo" for form, _ in stopped)
    assert "win rate): spo-below0. Of its 2 runs 0 stopped" in text
    assert (store.folder / "stability.png").stat().st_size > 1000
