"""The made-up language, the true reward of its texts, and the small model that writes them."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.studies.language import Prompt, encode, parse, reward
from benchmarks.studies.language_model import LAYERS, completion_logps, sample
from helpers.alignment import policy_of

pytestmark = [pytest.mark.extended, pytest.mark.usefixtures("one_thread")]

FILM = Prompt("film", ("plot", "cast"))


# --------------------------------------------------------------------------- language and reward


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the plot was very superb but the cast was weak . <end>", 3 * math.tanh(1.75 / 3) + 1),
        ("the plot was very superb and the cast was weak . <end>", 3 * math.tanh(1.75 / 3) + 0.8),
        ("the villain was good . <end>", 3 * math.tanh(1 / 3) - 0.5),
        ("the plot was good . the plot was good . <end>", 3 * math.tanh(2 / 3) + 0.5 - 1.0),
        (  # 15 words: one beyond 14
            "the plot was very good and the cast was very superb . overall i liked it . <end>",
            3 * math.tanh(5.25 / 3) + 1 - 0.1,
        ),
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
