"""The example's input: options, pairs and tokens; what is unusable is refused in one sentence."""

from __future__ import annotations

import gzip
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import spoloss
import train
from arguments import parse_options
from errors import InputError
from helpers.example import EXAMPLES, json_lines, pair
from helpers.interpreter import run_python
from models import load_model
from objective import margin_loss, targets
from pairs import Pair, Split, read_pairs, split_pairs
from records import create_output
from tokens import draw_batches, encode_pair


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Calls the script in an empty folder; it must refuse in one line and write nothing."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)

    def call(*argv: str | Path) -> str:
        assert train.main([str(argument) for argument in argv]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("train.py: error: ")
        assert captured.err.endswith("\n")
        assert captured.err.count("\n") == 1
        assert list(cwd.iterdir()) == []
        return captured.err

    return call


# --------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("flags", ["", "--linear-below -1", "--loss dpo", "--loss squared"])
def test_loss_of_the_command_line(flags) -> None:
    options = parse_options([*flags.split(), "--beta", "0.3"])
    logps = np.random.default_rng(0).normal(-20.0, 5.0, (4, 6))
    loss = {"spo": spoloss.spo_loss, "dpo": spoloss.dpo_loss, "squared": spoloss.squared_loss}
    extra = {"linear_below": -1.0} if "linear" in flags else {}
    want = loss[options.loss](*logps, beta=0.3, **extra)
    got = spoloss.pair_loss(margin_loss(options), *logps, **targets(None, options))
    assert got == want


def test_outputs_are_never_overwritten(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    spo, dpo = parse_options([]), parse_options(["--loss", "dpo"])
    made = [create_output(options).as_posix() for options in (spo, spo, dpo, spo)]
    assert made == ["runs/spo-1", "runs/spo-2", "runs/dpo-1", "runs/spo-3"]


def test_seed_and_sizes_choose_the_batches() -> None:
    def drawn(flags: str) -> list[list[int]]:
        options = parse_options(flags.split())
        return list(draw_batches(list(range(10)), 5, options.batch_size, options.seed))

    batches = drawn("--batch-size 4")
    assert [len(batch) for batch in batches] == [4] * 5
    assert sorted(number for batch in batches for number in batch) == sorted([*range(10)] * 2)
    assert batches == drawn("--batch-size 4")
    assert batches != drawn("--batch-size 4 --seed 1")
    assert [len(batch) for batch in drawn("--batch-size 30")] == [30] * 5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--beta 0", "--beta: expected a finite number above 0 and below inf, got '0'"),
        ("--beta nan", "--beta: expected a finite number above 0"),
        ("--beta much", "--beta: expected a finite number above 0"),
        ("--lr -1", "--lr: expected a finite number above 0"),
        ("--sft-lr 0", "--sft-lr: expected a finite number above 0"),
        ("--steps 0", "--steps: expected a whole number from 1"),
        ("--steps 1.5", "--steps: expected a whole number from 1"),
        ("--sft-steps -1", "--sft-steps: expected a whole number from 0"),
        ("--batch-size 0", "--batch-size: expected a whole number from 1"),
        ("--batch-size 65537", "--batch-size: expected a whole number from 1 to 65536"),
        ("--held-out 0", "--held-out: expected a whole number from 1"),
        ("--evaluations 0", "--evaluations: expected a whole number from 1"),
        ("--max-length 7", "--max-length: expected a whole number from 8"),
        ("--seed 2147483648", "--seed: expected a whole number from 0 to 2147483647"),
        ("--loss ipo", "--loss: invalid choice: 'ipo'"),
        ("--linear-below 1", "--linear-below: expected a finite number above -inf and below 1"),
        ("--linear-below=-800", "--linear-below: linear_below must lie in (-700, 1), got -800"),
        ("--beta 1e-60", "--beta 1e-60: expected a loss and a gradient that float32 can hold"),
        ("--beta 1e60", "--beta 1e+60: expected a loss and a gradient that float32 can hold"),
        ("--beta 1e-30 --loss squared", "--beta 1e-30: expected a loss and a gradient"),
        ("--linear-below 0 --loss dpo", "--linear-below: expected --loss spo, got --loss dpo"),
        ("--reward-gap --loss dpo", "--reward-gap: expected --loss spo or squared, got --loss dpo"),
        ("--model ./nowhere", "--model ./nowhere: expected a folder or a Hub name, got neither"),
        ("--bogus", "unrecognized arguments: --bogus"),
    ],
)
def test_options_are_refused(refused, flags, words) -> None:
    assert words in refused(*flags.split())


def test_output_with_files_is_refused(refused, tmp_path) -> None:
    output = tmp_path / "kept"
    output.mkdir()
    (output / "note.txt").write_text("mine")
    assert f"--output {output}: expected an empty folder" in refused("--output", output)
    note = output / "note.txt"
    assert f"--output {note}: expected a folder, got a file" in refused("--output", note)
    assert [path.read_text() for path in output.iterdir()] == ["mine"]


def test_folder_without_a_model_is_refused(refused, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    message = refused("--model", tmp_path / "empty")
    assert f"--model {tmp_path / 'empty'}: expected a folder with config.json" in message
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "qwen2"}')
    assert "expected a causal language model, got: " in refused("--model", tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match="expected a causal language model, got: "):
        load_model(str(tmp_path / "empty"), 40)


def test_model_that_does_not_fit_is_refused(finished, tmp_path) -> None:
    model = finished.output / "model"
    with pytest.raises(InputError, match="expected --max-length of at most 40, got 41"):
        load_model(str(model), 41)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, tmp_path)
    with pytest.raises(InputError, match="expected a tokenizer with words"):
        load_model(str(tmp_path), 40)


# ----------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b"{oops\n", "expected a JSON object, got malformed JSON"),
        (b"\xff\n", "expected UTF-8 text"),
        (b"[" * 100_000, "expected a JSON object, got numbers or nesting"),
        (b"1" * 5000, "expected a JSON object, got numbers or nesting"),
        (b"[1, 2]\n", "expected a JSON object, got [1, 2]"),
        (b'{"prompt": "p", "chosen": "c"}\n', "expected the key 'rejected'"),
        (json_lines(pair(prompt=None)), "expected a string as 'prompt', got None"),
        (json_lines(pair(chosen=["c"])), "expected a string as 'chosen', got ['c']"),
        (json_lines(pair(chosen="")), "expected text as 'chosen', got ''"),
        (json_lines(pair(rejected=" \n")), "expected text as 'rejected'"),
        (json_lines(pair(rejected="\ud800")), "expected text as 'rejected', got half a character"),
        (json_lines(pair(rejected="An hour.")), "expected a rejected completion that differs"),
        (json_lines(pair(split="dev")), "expected 'train' or 'test' as 'split', got 'dev'"),
        (json_lines(pair(split="test")), ""),
    ],
)
def test_bad_lines_are_refused_by_number(refused, tmp_path, bad, words) -> None:
    path = tmp_path / "pairs.jsonl"
    # The blank line counts: an editor must find the number.
    path.write_bytes(json_lines(pair()) + b"\n" + bad)
    line = 3 if words else 1
    words = words or "expected 'split' on every line or on none"
    assert f"{path}:{line}: {words}" in refused("--pairs", path)


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        ({}, "expected one of the keys 'reward_gap' and 'p_chosen', got neither"),
        ({"reward_gap": 1.0, "p_chosen": 0.7}, "got reward_gap and p_chosen"),
        ({"reward_gap": 0}, "expected a number above 0 and below 1e+09 as 'reward_gap', got 0"),
        ({"reward_gap": -0.5}, "as 'reward_gap', got -0.5"),
        ({"reward_gap": math.nan}, "as 'reward_gap', got nan"),
        ({"reward_gap": 1e9}, "as 'reward_gap', got 1000000000.0"),
        ({"reward_gap": True}, "as 'reward_gap', got True"),
        ({"reward_gap": "2"}, "as 'reward_gap', got '2'"),
        ({"p_chosen": 0.5}, "expected a number above 0.5 and below 1 as 'p_chosen', got 0.5"),
        ({"p_chosen": 1.0}, "as 'p_chosen', got 1.0"),
        ({"p_chosen": None}, "as 'p_chosen', got None"),
    ],
)
def test_gaps_that_are_not_above_0_are_refused_where_they_count(
    refused, tmp_path, gap, words
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json_lines(pair(reward_gap=2), pair(**gap)))
    message = refused("--pairs", path, "--reward-gap")
    assert f"{path}:2: " in message
    assert words in message
    assert len(read_pairs(path)) == 2


def test_gaps_that_float32_cannot_hold_are_refused_where_they_count(refused, tmp_path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json_lines(pair(reward_gap=2, prompt="p"), pair(reward_gap=1e-60)))
    where = f"--beta 0.1 with the reward gap 1e-60 of {path}:2: expected a loss and a gradient"
    for loss in ("spo", "squared"):
        assert where in refused("--pairs", path, "--reward-gap", "--loss", loss)


def test_gap_of_a_probability_is_its_log_odds(tmp_path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json_lines(pair(reward_gap=3), pair(p_chosen=0.9), pair(p_chosen=0.999999)))
    gaps = [each.reward_gap for each in read_pairs(path, with_gap=True)]
    assert gaps == pytest.approx([3.0, math.log(9.0), math.log(999999.0)], rel=1e-9)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected pairs to train on and pairs to hold out, got 0 and 0"),
        (json_lines(pair(split="train")), "got 1 and 0"),
        (json_lines(pair(split="test")), "got 0 and 1"),
        (json_lines(pair(), pair(chosen="Two hours.")), "got 0 and 2"),
    ],
)
def test_files_without_enough_pairs_are_refused(refused, tmp_path, content, words) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    message = refused("--pairs", path)
    assert f"{path}: expected pairs to train on" in message
    assert words in message


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"not gzip", id="not gzip"),
        pytest.param(gzip.compress(json_lines(pair()))[:-9], id="cut short"),
        pytest.param(None, id="missing"),
    ],
)
def test_unreadable_files_are_refused(refused, tmp_path, content) -> None:
    path = tmp_path / "pairs.jsonl.gz"
    if content is not None:
        path.write_bytes(content)
    assert f"{path}: expected a readable file of pairs, got: " in refused("--pairs", path)


def run_and_watch_imports(argv: list[str], cwd: Path, stop_at: str) -> list[str]:
    """Runs train.py until it imports `stop_at`; each line of the output, and whether PyTorch is in.

    The script runs as `python train.py` does, in a process of its own.
    """
    code = f"""
import runpy, sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == {stop_at!r}:
            raise SystemExit(77)
class Watched:
    def write(self, text):
        for line in filter(str.strip, text.splitlines()):
            seen = [name for name in ("torch", "transformers") if name in sys.modules]
            print(line, seen, file=sys.__stdout__)
    def flush(self):
        sys.__stdout__.flush()
sys.meta_path.insert(0, Stop())
sys.path.insert(0, {str(EXAMPLES)!r})
sys.argv[1:] = {argv!r}
sys.stdout = sys.stderr = Watched()
runpy.run_path({str(EXAMPLES / "train.py")!r}, run_name="__main__")
"""
    return run_python("-c", code, cwd=cwd).stdout.splitlines()


def test_bad_file_is_refused_before_the_heavy_imports(tmp_path) -> None:
    lines = run_and_watch_imports(["--pairs", "missing.jsonl"], tmp_path, stop_at="torch")
    assert [line for line in lines if line.endswith("[]")] == lines
    assert lines[0].startswith("train.py: error: missing.jsonl: expected a readable file of pairs")


def test_first_line_comes_before_the_heavy_imports(tmp_path) -> None:
    lines = run_and_watch_imports([], tmp_path, stop_at="torch")
    assert lines == ["400 pairs read; loading PyTorch and a small new Qwen2 ... []"]


def test_pairs_are_read_as_they_stand(tmp_path) -> None:
    records = [pair(prompt="a", id=7), pair(prompt="b", chosen=" Ünïcode\n")]
    content = b"\xef\xbb\xbf" + json_lines(records[0]) + b"\n" + json_lines(records[1])
    plain, packed = tmp_path / "pairs.jsonl", tmp_path / "pairs.jsonl.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    read = read_pairs(plain)
    assert read == read_pairs(packed)
    assert [(each.prompt, each.chosen, each.rejected, each.split, each.line) for each in read] == [
        ("a", "An hour.", "Ages.", None, 1),
        ("b", " Ünïcode\n", "Ages.", None, 3),
    ]


def test_split_is_honoured_or_drawn_by_prompt() -> None:
    options = parse_options([])
    pairs = [Pair(f"prompt {i // 3}", "c", "r", None, i) for i in range(90)]
    split = split_pairs(pairs, options)
    assert sorted(split.train + split.held_out, key=lambda each: each.line) == pairs
    assert len({each.prompt for each in split.held_out}) == 3
    assert not {each.prompt for each in split.train} & {each.prompt for each in split.held_out}
    assert split_pairs(pairs, options) == split
    assert split_pairs(pairs, parse_options(["--seed", "1"])) != split
    marked = [Pair("p", "c", "r", "test" if i == 5 else "train", i) for i in range(9)]
    assert split_pairs(marked, options) == Split(marked[:5] + marked[6:], [marked[5]])


def test_held_out_pairs_can_be_fewer() -> None:
    pairs = [Pair(f"prompt {i}", "c", "r", None, i) for i in range(90)]
    everything = split_pairs(pairs, parse_options([]))
    few = split_pairs(pairs, parse_options(["--held-out", "4"]))
    assert few.train == everything.train
    assert len(few.held_out) == 4
    assert [each for each in everything.held_out if each in few.held_out] == few.held_out
    assert split_pairs(pairs, parse_options(["--held-out", "90"])) == everything


def byte_tokenizer(chat_template: str | None = None) -> SimpleNamespace:
    def encode(text: str, add_special_tokens: bool = True) -> list[int]:
        return ([1] if add_special_tokens else []) + list(text.encode())

    def apply_chat_template(chat, tokenize, add_generation_prompt) -> str:
        assert (tokenize, add_generation_prompt) == (False, True)
        return f"<{chat[0]['role']}>{chat[0]['content']}<assistant>"

    return SimpleNamespace(
        encode=encode,
        eos_token_id=0,
        chat_template=chat_template,
        apply_chat_template=apply_chat_template,
    )


def test_pairs_that_fit_are_encoded_whole() -> None:
    each = Pair("ask", "yes", "n", None, 1)
    encoded = encode_pair(each, byte_tokenizer(), 9)
    assert encoded.chosen.ids == [1, *b"ask\nyes", 0]
    assert encoded.chosen.labels == [-100] * 5 + [*b"yes", 0]
    assert encoded.rejected.ids == [1, *b"ask\nn", 0]
    assert not encoded.truncated
    chat = encode_pair(each, byte_tokenizer("some"), 99)
    assert chat.chosen.ids == [*b"<user>ask<assistant>yes", 0]


@pytest.mark.parametrize(("prompt", "chosen"), [(40, 3), (3, 40), (40, 40), (10, 7)])
def test_truncation_cuts_the_prompt_first_and_leaves_a_completion(prompt, chosen) -> None:
    each = Pair("p" * prompt + "?", "c" * chosen, "r", None, 1)
    encoded = encode_pair(each, byte_tokenizer(), 16)
    assert encoded.truncated
    asked = [1, *each.prompt.encode(), *b"\n"]
    for text, completion in ((encoded.chosen, each.chosen), (encoded.rejected, "r")):
        answer = [token for token in text.labels if token != -100]
        kept = text.ids[: len(text.ids) - len(answer)]
        assert text.ids == kept + answer
        assert len(text.ids) <= 16
        assert kept == asked[len(asked) - len(kept) :]
        assert answer == [*completion.encode(), 0][: len(answer)]
        assert len(answer) >= min(8, len(completion) + 1)
        assert len(kept) >= min(8, len(asked))
    assert len(encoded.chosen.ids) == 16
