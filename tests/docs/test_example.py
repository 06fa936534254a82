"""The training example: what it refuses, what it computes, and what a run leaves."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import train
from models import build_model
from pairs import EncodedPair, Pair, encode, hold_out, read_pairs
from report import Log

pytestmark = pytest.mark.usefixtures("one_thread")
PAIR = {"prompt": "How long?", "chosen": "An hour.", "rejected": "Ages."}
SMALL = "--sft-steps=3 --steps=4 --batch-size=4 --held-out=3 --max-length=40"


def lines(*records: object) -> str:
    """A pairs file."""
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="module")
def small() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A new model, and a tokenizer for the words of `PAIR`."""
    torch.manual_seed(0)
    model, tokenizer = build_model(PAIR.values())
    return model.eval(), tokenizer


# ------------------------------------------------------------------------------------- its input


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{oops", "expected a JSON object, got malformed JSON"),
        ("[1, 2]", "expected a JSON object, got [1, 2]"),
        (lines({"prompt": "p", "chosen": "c"}), "the key 'rejected', got only the keys"),
        (lines(PAIR | {"prompt": None}), "expected text under the key 'prompt', got None"),
        (lines(PAIR | {"chosen": " \n"}), "expected text under the key 'chosen', got ' \\n'"),
        (lines(PAIR | {"rejected": "An hour."}), "got the same text twice"),
    ],
)
def test_bad_line_is_refused_by_number(tmp_path, monkeypatch, capsys, line, words) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text(lines(PAIR) + "\n" + line)
    with pytest.raises(SystemExit, match=r"^2$"):
        train.main(["--pairs", "pairs.jsonl"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train.py: error: pairs.jsonl:3: ")
    assert words in last
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--pairs missing.jsonl", "--pairs: expected a readable UTF-8 file, got: [Errno 2]"),
        ("--pairs bytes", "--pairs: expected a readable UTF-8 file, got: 'utf-8' codec"),
        ("--held-out 400", "--pairs: expected more prompts than are held out, got 400 with"),
        ("--output .", "--output: expected a new folder, got: [Errno 17]"),
        ("--model .", "--model: expected a causal language model, got: "),
        ("--beta 0", "argument --beta: expected a finite number above 0, got '0'"),
        ("--beta nan", "argument --beta: expected a finite number above 0, got 'nan'"),
        ("--steps 0", "argument --steps: expected a whole number from 1, got '0'"),
        ("--max-length 7", "argument --max-length: expected a whole number from 8, got '7'"),
        ("--loss ipo", "argument --loss: invalid choice: 'ipo'"),
    ],
)
def test_unusable_input_is_refused(tmp_path, monkeypatch, capsys, flags, words) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bytes").write_bytes(b"\xff")
    with pytest.raises(SystemExit, match=r"^2$"):
        train.main(flags.split())
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"train.py: error: {words}")
    assert [path.name for path in tmp_path.iterdir()] == ["bytes"]


def test_pairs_are_read_as_they_stand(tmp_path) -> None:
    path = tmp_path / "pairs.jsonl"
    strange = PAIR | {"chosen": " Ünï\u2028code\n", "score": 7}
    path.write_text("\ufeff" + lines(PAIR) + json.dumps(strange, ensure_ascii=False), "utf-8")
    assert read_pairs(path) == [Pair(**PAIR), Pair("How long?", " Ünï\u2028code\n", "Ages.")]


def test_whole_prompts_are_held_out() -> None:
    pairs = [Pair(f"prompt {row // 3}", "c", f"r{row}") for row in range(30)]
    kept, held_out = hold_out(pairs, 4)
    assert sorted([*kept, *held_out]) == sorted(pairs)
    assert len(held_out) == 12
    assert not {pair.prompt for pair in kept} & {pair.prompt for pair in held_out}


@pytest.mark.parametrize(("prompt", "chosen"), [(2, 1), (40, 3), (3, 40), (40, 40), (10, 7)])
def test_texts_lose_the_start_of_a_prompt_and_the_end_of_a_completion(
    small, prompt, chosen
) -> None:
    _, tokenizer = small
    pair = Pair("".join(map(chr, range(65, 65 + prompt))), "c" * chosen, "r")
    encoded = encode(pair, tokenizer, 16)
    asked = tokenizer.encode(pair.prompt + "\n")
    for text, completion in ((encoded.chosen, pair.chosen), (encoded.rejected, "r")):
        counted = text.labels != -100
        kept, answer = text.ids[~counted].tolist(), text.ids[counted].tolist()
        assert text.ids.tolist() == kept + answer
        assert text.labels[counted].tolist() == answer
        assert kept == asked[len(asked) - len(kept) :]
        assert answer == [*tokenizer.encode(completion), tokenizer.eos_token_id][: len(answer)]
        assert len(kept) >= min(8, len(asked))
        assert len(answer) >= min(8, len(completion) + 1)
        assert len(text.ids) <= 16
    if len(asked) + chosen + 1 <= 16:
        assert encoded.chosen.ids.tolist() == [
            *asked,
            *tokenizer.encode(pair.chosen),
            tokenizer.eos_token_id,
        ]


# ------------------------------------------------------------------------------ what it computes


def encoded_pairs(tokenizer: PreTrainedTokenizerBase) -> list[EncodedPair]:
    """Pairs of different lengths."""
    sides = ["An hour.", "Ages. Ages. An hour.", "How", "long? How long?"]
    pairs = [Pair("How long?", one, two) for one in sides for two in sides if one != two]
    return [encode(pair, tokenizer, 40) for pair in pairs]


def test_scores_are_those_of_each_text_alone(small) -> None:
    model, tokenizer = small
    pairs = encoded_pairs(tokenizer)
    scores = train.score(model, pairs, 5, "by hand")
    for row, pair in enumerate(pairs):
        for text, logp in zip(pair, scores[:, row], strict=True):
            # No padding, no second text in the batch, no function of the example.
            table = model(text.ids[None]).logits[0].log_softmax(-1)
            counted = [place for place, label in enumerate(text.labels) if label != -100]
            by_hand = sum(table[place - 1, text.ids[place]] for place in counted)
            torch.testing.assert_close(logp, by_hand, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("loss", "by_hand"),
    [
        ("spo", lambda x: -x * math.exp(-x)),
        ("spo-tangent", lambda x: -x * math.exp(-x) if x > -1.0 else -math.e * (1.0 + 2.0 * x)),
        ("dpo", lambda x: math.log1p(math.exp(-x))),
        ("squared", lambda x: (x - 1.0) ** 2 / 0.3**2),
    ],
)
def test_losses_of_the_command_line(loss, by_hand) -> None:
    margins = torch.tensor([-20.0, -3.0, 0.0, 4.0, 9.0], dtype=torch.float64)
    zero = torch.zeros_like(margins)
    value = train.LOSSES[loss](margins + 1.0, zero, zero + 1.0, zero, beta=0.3)
    want = sum(by_hand(0.3 * margin.item()) for margin in margins) / len(margins)
    assert value.item() == pytest.approx(want, rel=1e-12)


# ------------------------------------------------------------------------------ what a run leaves


def run_in(folder: Path, *flags: str) -> None:
    """Runs the script with small sizes. The output folder is `out` in the given one."""
    train.main([*SMALL.split(), "--output", str(folder / "out"), *flags])


def numbers_of(path: Path) -> list[dict[str, float]]:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


@pytest.mark.extended
def test_run_writes_what_it_computes(tmp_path, capsys) -> None:
    run_in(tmp_path)
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {"sft.csv", "train.csv", "held_out.csv", "curves.png", "model"}
    sft, rows, held_out = map(numbers_of, (out / f"{n}.csv" for n in ("sft", "train", "held_out")))
    assert [row["step"] for row in sft] == [1, 2, 3]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in held_out] == [0, 1, 2, 3, 4]
    assert abs(rows[0]["loss"]) < 1e-3  # a batch is padded otherwise than in the reference's pass
    first, last = held_out[0], held_out[-1]
    assert first["loss"] == first["rewards/chosen"] == first["rewards/margins"] == 0.0
    assert last["loss"] < 0.0
    for side in ("chosen", "rejected"):
        moved = last[f"logps/{side}"] - first[f"logps/{side}"]
        assert last[f"rewards/{side}"] == pytest.approx(0.1 * moved, abs=1e-4)
    table = capsys.readouterr().out.splitlines()
    (line,) = (line for line in table if line.startswith("rewards/margins "))
    assert line.split()[1:3] == ["0.000", f"{last['rewards/margins']:.3f}"]

    model, tokenizer = train.load_model(str(out / "model"))
    torch.manual_seed(0)
    train.random.seed(0)
    _, pairs = hold_out(read_pairs(Path(train.__file__).with_name("pairs.jsonl")), 3)
    scores = train.score(model.eval(), [encode(pair, tokenizer, 40) for pair in pairs], 4, "saved")
    want = [last["logps/chosen"], last["logps/rejected"]]
    assert scores.mean(1).tolist() == pytest.approx(want, rel=1e-4)


@pytest.mark.extended
def test_ctrl_c_leaves_what_is_done(tmp_path, monkeypatch, capsys) -> None:
    add = Log.add

    def add_then_interrupt(log: Log, row: dict[str, float]) -> None:
        add(log, row)
        if log.path.stem == "train" and row["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Log, "add", add_then_interrupt)
    run_in(tmp_path)
    assert [row["step"] for row in numbers_of(tmp_path / "out" / "train.csv")] == [1, 2]
    assert {"curves.png", "model"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert "step 1" in capsys.readouterr().out  # the last evaluation


@pytest.mark.extended
def test_diverged_run_stops_and_keeps_its_rows(tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"expected finite numbers, got .* try a lower"):
        run_in(tmp_path, "--lr", "1e30", "--loss", "squared")
    assert len(numbers_of(tmp_path / "out" / "train.csv")) < 4
    assert not (tmp_path / "out" / "model").exists()
