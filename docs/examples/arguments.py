"""The command line: its options, their ranges and their defaults."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from errors import InputError

LOSSES = ("spo", "dpo", "squared")
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Options:
    """The options of the command line. `build_parser` describes each of them."""

    pairs: Path
    model: str | None
    loss: str
    beta: float
    linear_below: float | None
    reward_gap: bool
    fused: bool
    sft_steps: int
    sft_lr: float
    steps: int
    lr: float
    batch_size: int
    max_length: int
    held_out: int | None
    evaluations: int
    seed: int
    output: Path | None


def parse_options(argv: Sequence[str] | None) -> Options:
    """Reads and checks the command line.

    Raises:
      InputError: an option is unknown, out of range or incompatible with another option.
    """
    given = vars(build_parser().parse_args(argv))
    given["sft_lr"] = given["sft_lr"] or (1e-5 if given["model"] else 1e-3)
    given["lr"] = given["lr"] or (1e-6 if given["model"] else 3e-4)
    options = Options(**given)
    check_losses(options)
    check_output(options.output)
    check_model(options.model)
    return options


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser. README.md shows its options as a table."""
    positive, below_one = partial(number, low=0), partial(number, high=1)
    natural, length = partial(whole_number, low=0), partial(whole_number, low=8)
    batch = partial(whole_number, high=2**16)
    shipped = Path(__file__).with_name("pairs.jsonl")
    parser = OneLineParser(
        prog="train.py",
        description="A complete preference run in plain PyTorch: SFT, then SPO, DPO or squared.",
    )
    add = parser.add_argument
    add("--pairs", type=Path, default=shipped, help="JSON lines, plain or .gz; default: shipped")
    add("--model", help="a folder or a name on the Hugging Face Hub; default: a small new Qwen2")
    add(
        "--loss",
        choices=LOSSES,
        default="spo",
        help="default: spo",
    )
    add("--beta", type=positive, default=0.1, help="pull to the reference, 1/nats; default: 0.1")
    add("--linear-below", type=below_one, help="continue SPO as a line for x below this, < 1")
    add("--reward-gap", action="store_true", help="target each line's reward_gap or p_chosen")
    add("--fused", action="store_true", help="compute the loss from hidden states, without logits")
    add(
        "--sft-steps",
        type=natural,
        default=150,
        help="default: 150; 0 for an instruct model",
    )
    add("--sft-lr", type=positive, help="default: 1e-3, with --model 1e-5")
    add("--steps", type=whole_number, default=100, help="of preference training; default: 100")
    add("--lr", type=positive, help="of preference training; default: 3e-4, with --model 1e-6")
    add("--batch-size", type=batch, default=16, help="pairs in a batch; default: 16")
    add("--max-length", type=length, default=256, help="tokens in a text; default: 256")
    add("--held-out", type=whole_number, help="held-out pairs to score at most; default: all")
    add("--evaluations", type=whole_number, default=10, help="of the held-out pairs; default: 10")
    add(
        "--seed",
        type=natural,
        default=0,
        help="of split, batches and new model; default: 0",
    )
    add("--output", type=Path, help="a new folder; default: the first free runs/<loss>-<n>")
    return parser


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports an error in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raises InputError."""
        raise InputError(message)


def number(text: str, low: float = -math.inf, high: float = math.inf) -> float:
    """Reads a finite number strictly between two bounds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and low < value < high):
        expected = f"a finite number above {low:g} and below {high:g}"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def whole_number(text: str, low: int = 1, high: int = 2**31 - 1) -> int:
    """Reads a whole number within two bounds."""
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        expected = f"a whole number from {low} to {high}"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def check_losses(options: Options) -> None:
    """Raises an error for an option of another loss."""
    if options.linear_below is not None and options.loss != "spo":
        raise InputError(f"--linear-below: expected --loss spo, got --loss {options.loss}")
    if options.reward_gap and options.loss == "dpo":
        raise InputError("--reward-gap: expected --loss spo or squared, got --loss dpo")


def check_output(output: Path | None) -> None:
    """Raises an error for a place where a run would overwrite files."""
    if output is None or not output.exists():
        return
    if not output.is_dir():
        raise InputError(f"--output {output}: expected a folder, got a file")
    if any(output.iterdir()):
        raise InputError(f"--output {output}: expected an empty folder, got one with files")


def check_model(model: str | None) -> None:
    """Raises an error for anything but a folder with a model or a valid name on the Hub."""
    if model is None:
        return
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"--model {model}: expected a folder with config.json, got none")
        if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
            raise InputError(
                f"--model {model}: expected a causal language model, got: a folder without weights"
            )
    elif folder.exists() or not HUB_NAME.fullmatch(model):
        raise InputError(f"--model {model}: expected a folder or a Hub name, got neither")
