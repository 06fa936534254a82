"""Trains a language model on preference pairs: first on the chosen completions, then on the pairs.

    python train.py                                    # a small new model, the pairs in this folder
    python train.py --model FOLDER_OR_HUB_NAME --pairs mine.jsonl
    python train.py --help

README.md shows the format of the pairs and what a run writes. Ctrl-C ends the training early; the
run then saves and draws what it has.

Needs: pip install "spoloss[examples]"
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from models import build_model, load_model
from pairs import IGNORED, Batch, EncodedPair, InputError, encode, hold_out, pad, read_pairs
from report import Log, Row, draw_curves, print_table
from spoloss import dpo_loss, preference_metrics, spo_loss, squared_loss
from spoloss.torch import sequence_logps

LOSSES: dict[str, Callable[..., Tensor]] = {
    "spo": spo_loss,
    "spo-tangent": partial(spo_loss, linear_below=-1.0),
    "dpo": dpo_loss,
    "squared": squared_loss,
}
NEW_MODEL = {"sft_steps": 150, "sft_lr": 1e-3, "lr": 3e-4}
PRETRAINED = {"sft_steps": 0, "sft_lr": 1e-5, "lr": 1e-6}
EVALUATIONS, MAX_GRAD_NORM = 10, 1.0


# ------------------------------------------------------------------------------ the command line


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser. Its defaults suit the small new model."""
    description = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser("train.py", "train.py [options]", description)
    count_or_0, length = partial(whole_number, low=0), partial(whole_number, low=8)
    shipped = Path(__file__).with_name("pairs.jsonl")
    add = parser.add_argument
    add("--pairs", type=Path, default=shipped, help="JSON Lines; default: pairs.jsonl beside it")
    add("--model", help="a folder or a name on the Hugging Face Hub; default: a small new Qwen2")
    add("--loss", choices=LOSSES, default="spo", help="default: spo")
    add("--beta", type=positive, default=0.1, help="for DPO, take four times SPO's; default: 0.1")
    add("--steps", type=whole_number, default=100, help="of preference training; default: 100")
    add("--lr", type=positive, help="of preference training; default: 3e-4, with --model 1e-6")
    add("--sft-steps", type=count_or_0, help="of SFT before; default: 150, with --model 0")
    add("--sft-lr", type=positive, help="default: 1e-3, with --model 1e-5")
    add("--batch-size", type=whole_number, default=16, help="pairs in a batch; default: 16")
    add("--max-length", type=length, default=256, help="tokens in a text; default: 256")
    add("--held-out", type=whole_number, default=40, help="prompts to evaluate on; default: 40")
    add("--seed", type=count_or_0, default=0, help="default: 0")
    add("--output", type=Path, help="a new folder; default: the first free runs/<loss>-<number>")
    return parser


def positive(text: str) -> float:
    """Reads a finite number above 0."""
    value = float(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text!r}")
    return value


def whole_number(text: str, low: int = 1) -> int:
    """Reads a whole number that is not below `low`."""
    if not text.isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"expected a whole number from {low}, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line. Unusable input ends it with one sentence and exit status 2."""
    parser = build_parser()
    options = parser.parse_args(argv)
    for name, default in (PRETRAINED if options.model else NEW_MODEL).items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    try:
        run(options)
    except InputError as error:
        parser.error(str(error))


# --------------------------------------------------------------------------------------- the run


def run(options: argparse.Namespace) -> None:
    """Reads the pairs, trains a model on them and writes the output folder."""
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    train, held_out = hold_out(read_pairs(options.pairs), options.held_out)
    texts = (text for pair in train for text in pair)
    model, tokenizer = load_model(options.model) if options.model else build_model(texts)
    # Eval mode: with dropout, policy and reference would differ at step 0.
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    output = make_output(options)
    # A short run needs only the pairs that it can draw.
    drawn = max(options.steps, options.sft_steps) * options.batch_size
    train = random.sample(train, min(drawn, len(train)))
    size = f"{model.num_parameters():,} parameters"
    print(f"{len(train)} pairs to train on, {len(held_out)} held out; {size}; writes to {output}")

    train, held_out = (
        [encode(pair, tokenizer, options.max_length) for pair in tqdm(pairs, "tokens")]
        for pairs in (train, held_out)
    )
    log, held_out_log = Log(output / "train.csv"), Log(output / "held_out.csv")
    try:
        train_on_chosen(model, train, options, Log(output / "sft.csv"))
        train_on_pairs(model, train, held_out, options, log, held_out_log)
    except KeyboardInterrupt:
        print("\nstopped early; saving what is done")
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    if held_out_log.rows:
        print_table(held_out_log)
        title = f"{options.loss}, beta = {options.beta:g}"
        draw_curves(output / "curves.png", title, log, held_out_log)


def make_output(options: argparse.Namespace) -> Path:
    """Creates the output folder. It never overwrites the files of another run."""
    numbered = (Path("runs", f"{options.loss}-{number}") for number in itertools.count(1))
    output = options.output or next(folder for folder in numbered if not folder.exists())
    try:
        output.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--output: expected a new folder, got: {error}") from error
    return output


# ---------------------------------------------------------------------------------- the training


def train_on_chosen(
    model: PreTrainedModel, train: list[EncodedPair], options: argparse.Namespace, log: Log
) -> None:
    """Supervised fine-tuning (SFT) on the chosen completions."""
    updater = Updater(model, options.sft_lr, options.sft_steps)
    progress = tqdm(draw(len(train), options.sft_steps, options.batch_size), "SFT")
    for step, rows in enumerate(progress, start=1):
        batch = pad([train[row].chosen for row in rows], model.device)
        tokens = (batch.labels != IGNORED).sum()
        loss = -completion_logps(model, batch).sum() / tokens
        log.add({"step": step, **updater.step(loss)})
        progress.set_postfix(loss=f"{loss.item():.2f}")


def train_on_pairs(
    policy: PreTrainedModel,
    train: list[EncodedPair],
    held_out: list[EncodedPair],
    options: argparse.Namespace,
    log: Log,
    held_out_log: Log,
) -> None:
    """Preference training. The reference is the policy before the first step."""
    loss_of = partial(LOSSES[options.loss], beta=options.beta)
    metrics_of = partial(preference_metrics, beta=options.beta)
    # Scored once, so that the run needs no second copy of the model.
    reference = score(policy, train, options.batch_size, "reference")
    held_out_reference = score(policy, held_out, options.batch_size, "reference, held out")

    def evaluate(step: int) -> None:
        logps = *score(policy, held_out, options.batch_size, "held out"), *held_out_reference
        held_out_log.add({"step": step, **numbers({"loss": loss_of(*logps), **metrics_of(*logps)})})

    evaluate(0)
    updater = Updater(policy, options.lr, options.steps)
    progress = tqdm(draw(len(train), options.steps, options.batch_size), options.loss)
    for step, rows in enumerate(progress, start=1):
        # Your own training loop needs these three lines.
        logps = *pair_logps(policy, [train[row] for row in rows]), *reference[:, rows]
        loss = loss_of(*logps)
        update = updater.step(loss)

        log.add({"step": step, **update, **numbers(metrics_of(*logps))})
        progress.set_postfix(loss=f"{update['loss']:.3f}")
        if step % math.ceil(options.steps / EVALUATIONS) == 0 or step == options.steps:
            evaluate(step)


class Updater:
    """AdamW with warm-up, linear decay and gradient clipping."""

    def __init__(self, model: PreTrainedModel, lr: float, steps: int) -> None:
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, steps // 10, steps)

    def step(self, loss: Tensor) -> Row:
        """Computes the gradient and updates the model.

        Returns:
          The loss, the learning rate and the norm of the gradient before clipping.

        Raises:
          SystemExit: the loss or the norm is not finite. The model then stays as it was.
        """
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        lr = self.optimizer.param_groups[0]["lr"]
        row = {"lr": lr, **numbers({"loss": loss, "grad_norm": norm})}
        if not all(map(math.isfinite, row.values())):
            advice = "try a lower learning rate, or --loss spo-tangent in place of spo"
            raise SystemExit(f"train.py: expected finite numbers, got {row}; {advice}")
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return row


def draw(count: int, steps: int, size: int) -> Sequence[Tensor]:
    """Returns the rows of each batch, from shuffled passes over `count` rows."""
    passes = [torch.randperm(count) for _ in range(math.ceil(steps * size / count))]
    return torch.cat(passes)[: steps * size].split(size) if passes else ()


@torch.no_grad()
def score(model: PreTrainedModel, pairs: list[EncodedPair], size: int, title: str) -> Tensor:
    """Returns the log-probabilities of the chosen and the rejected completions, [2, pairs]."""
    starts = tqdm(range(0, len(pairs), size), title, leave=False)
    return torch.cat([pair_logps(model, pairs[start : start + size]) for start in starts], dim=1)


def pair_logps(model: PreTrainedModel, pairs: list[EncodedPair]) -> Tensor:
    """Returns the same with gradients, from one forward pass."""
    texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return completion_logps(model, pad(texts, model.device)).view(2, -1)


def completion_logps(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Returns the log-probability of each text's completion, in nats, [texts]."""
    logits = model(batch.ids, attention_mask=batch.mask).logits
    return sequence_logps(logits, batch.labels)


def numbers(values: dict[str, Tensor]) -> Row:
    """Returns 0-d tensors as Python numbers."""
    return {name: value.item() for name, value in values.items()}


if __name__ == "__main__":
    main()
