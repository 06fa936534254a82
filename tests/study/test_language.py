"""The made-up language, the true reward of its texts, and the small model that writes them."""

from __future__ import annotations

import math
import random
import re
from collections import Counter

import pytest
import torch

from benchmarks.studies import language
from benchmarks.studies.language import Prompt, all_prompts, encode, parse, reward, write_review
from benchmarks.studies.language_model import LAYERS, completion_logps, sample
from helpers.alignment import policy_of

pytestmark = [pytest.mark.extended, pytest.mark.usefixtures("one_thread")]

FILM = Prompt("film", ("plot", "cast"))


# --------------------------------------------------------------------------- language and reward


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
    assert any(r.wrong_conjunctions for r in seen)
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
