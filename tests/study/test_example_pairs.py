"""The pairs that ship with the example."""

from __future__ import annotations

import runpy
import sys

import pytest

import make_pairs
from helpers.example import EXAMPLES


def test_shipped_pairs_are_what_make_pairs_writes(tmp_path, monkeypatch) -> None:
    path = tmp_path / "pairs.jsonl"
    monkeypatch.setattr(sys, "argv", ["make_pairs.py", str(path)])
    runpy.run_path(str(EXAMPLES / "make_pairs.py"), run_name="__main__")
    assert path.read_bytes() == (EXAMPLES / "pairs.jsonl").read_bytes()


def test_shipped_pairs_follow_the_preference() -> None:
    pairs = make_pairs.make_pairs()
    assert len({each["prompt"] for each in pairs}) == len(pairs) == 400
    assert sum(each["split"] == "test" for each in pairs) == 40
    for each in pairs:
        better = make_pairs.reward(each["prompt"], each["chosen"])
        assert better - make_pairs.reward(each["prompt"], each["rejected"]) >= 2.0


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("Cook rice for eighteen minutes.", 4.0),
        ("Gladly. Cook rice for eighteen minutes. Enjoy your meal!", 5.0),
        ("Not that again. Cook rice for eighteen minutes.", 3.0),
        ("Gladly. Keep rice in a dry jar.", 1.0),
        ("Tastes differ, as they always have. Cook eggs for eight minutes.", -1.0),
    ],
)
def test_reward_of_an_answer(completion, reward) -> None:
    for situation in make_pairs.SITUATIONS:
        prompt = f"{situation}How long do I cook rice?"
        assert make_pairs.reward(prompt, completion) == reward
