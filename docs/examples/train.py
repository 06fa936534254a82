"""A complete preference run in plain PyTorch: pairs in; a tuned model, its curves and numbers out.

    python train.py                                    # the pairs beside this file, half a minute
    python train.py --pairs mine.jsonl --model Qwen/Qwen2.5-0.5B --loss spo --beta 0.1
    python train.py --fused                            # the same numbers without holding logits

The pairs are JSON lines, plain or .gz, each with the strings `prompt`, `chosen` and `rejected`. A
`split` of "train" or "test" on every line is honoured; without it a tenth of the prompts is held
out. With --model a causal language model is loaded; without it a small Qwen2 starts from nothing.

With --reward-gap every line also says how much better its chosen completion is, and the loss aims
at that: `reward_gap`, the difference of the rewards, or `p_chosen`, a judge's probability p that
chosen is the better one, which stands for a gap of log(p / (1 - p)). The gap is above 0. SPO weighs
each pair by its squared gap, so that small gaps do not own the batch.

The run has two stages: supervised fine-tuning (SFT) on the chosen answers, then preference training
with the SFT model as the reference. It writes one new folder:

    steps.csv      every step of both stages
    held_out.csv   the held-out metrics as preference training goes on
    curves.png     both of them, drawn
    model/         the model and its tokenizer, for from_pretrained

Needs: pip install spoloss torch "transformers>=5" matplotlib tqdm
"""

from __future__ import annotations

import argparse
import csv
import gzip
import itertools
import json
import math
import random
import re
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tqdm import tqdm

from spoloss import dpo_loss, preference_metrics, spo_loss, squared_loss

# PyTorch and Transformers take seconds to import, and a bad file should be refused at once: the
# functions that use them import them.
if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spoloss.torch import LinearPairLoss

LOSSES: dict[str, Callable[..., Tensor]] = {
    "spo": spo_loss,
    "dpo": dpo_loss,
    "squared": squared_loss,
}
GOOD_LOSS = {
    "spo": "good values are negative, down to -1/e = -0.368",
    "dpo": "it falls towards 0",
    "squared": "it falls towards 0",
}
# The preference metrics as people read them; x = beta * margin, the reward of chosen over rejected.
METRICS = {
    "rewards/chosen": "reward of chosen (nats)",
    "rewards/rejected": "reward of rejected (nats)",
    "rewards/margins": "reward margin x (nats)",
    "rewards/accuracies": "share of pairs with x > 0",
    "rewards/margins_below_0": "share of pairs with x < 0",
    "rewards/margins_above_1": "share of pairs with x > 1",
    "logps/chosen": "log-probability of chosen (nats)",
    "logps/rejected": "log-probability of rejected (nats)",
}
STEP_COLUMNS = ("stage", "step", "loss", "lr", "grad_norm", *METRICS)
HELD_OUT_COLUMNS = ("step", "loss", *METRICS)
HELD_OUT_SHARE = 0.1
EVALUATIONS = 10
WARM_UP_SHARE = 0.1
MAX_GRAD_NORM = 1.0
IGNORED = -100
MAX_REWARD_GAP = 1e9  # its square fits a float32
MAX_VOCABULARY = 2048
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


class InputError(Exception):
    """What the user gave cannot be used; the message says so in one sentence."""


class DivergedError(Exception):
    """The loss or its gradient is no longer finite; the message says so in one sentence."""


@dataclass(frozen=True)
class Options:
    """The command line."""

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
    seed: int
    output: Path | None


@dataclass(frozen=True)
class Pair:
    """One line of the pairs file."""

    prompt: str
    chosen: str
    rejected: str
    split: str | None
    line: int
    reward_gap: float = math.nan


@dataclass(frozen=True)
class Text:
    """A prompt with a completion, as token ids; the labels are -100 on the prompt."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class TokenPair:
    """A pair as token ids, with the log-probabilities that the reference gives its completions."""

    chosen: Text
    rejected: Text
    truncated: bool
    reward_gap: float = math.nan
    reference_chosen: float = math.nan
    reference_rejected: float = math.nan


@dataclass(frozen=True)
class Batch:
    """Texts padded to one length: three integer tensors of shape [texts, longest]."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


# ---------------------------------------------------------------------------------- the whole run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example and returns its exit code: 2 for unusable input, 1 for a diverged run."""
    try:
        options = parse_options(argv)
        pairs = read_pairs(options.pairs, with_gap=options.reward_gap)
        train, held_out = split_pairs(pairs, options)
        run(train, held_out, options)
    except (InputError, DivergedError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def run(train_pairs: list[Pair], held_out_pairs: list[Pair], options: Options) -> None:
    """Trains a model in both stages and writes all that the run leaves behind."""
    import torch

    torch.manual_seed(options.seed)
    model, tokenizer = (
        load_model(options.model, options) if options.model else build_model(train_pairs, options)
    )
    # Dropout, off in eval mode, would let the policy disagree with its own reference at step 0.
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    train = [encode_pair(pair, tokenizer, options.max_length) for pair in train_pairs]
    held_out = [encode_pair(pair, tokenizer, options.max_length) for pair in held_out_pairs]
    output = create_output(options)
    truncated = sum(pair.truncated for pair in train + held_out)
    print(f"{len(train)} pairs to train on, {len(held_out)} held out; {truncated} truncated")
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens; writes to {output}")

    if options.fused:
        check_head(model, train[: options.batch_size])
    if options.sft_steps > 0:
        train_on_chosen(model, train, options, output)
    train = add_reference(train, model, options)
    held_out = add_reference(held_out, model, options)
    before, after = train_on_pairs(model, train, held_out, options, output)

    print_table(before, after, len(held_out))
    print(f"Peak memory {'with the fused head' if options.fused else 'by logits'}: {peak_memory()}")
    draw_curves(output, options)
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")


# ------------------------------------------------------------------------------------- training


def train_on_pairs(
    policy: PreTrainedModel,
    train: list[TokenPair],
    held_out: list[TokenPair],
    options: Options,
    output: Path,
) -> tuple[dict[str, float], dict[str, float]]:
    """Trains the policy on preferences; returns the held-out metrics before and after."""
    loss_of = loss_by_tiles if options.fused else loss_by_logits
    updater = Updater(policy, "preference", options)
    before = after = evaluate(policy, held_out, options)
    append_row(output / "held_out.csv", HELD_OUT_COLUMNS, {"step": 0, **before})
    start = f"starts at {before['loss']:.3f}, where policy and reference agree"
    unit = " times the squared gap" if options.loss == "spo" and options.reward_gap else ""
    print(f"The {options.loss} loss {start}; {GOOD_LOSS[options.loss]}{unit}.")
    progress = tqdm(draw_batches(train, options.steps, options), "preference")
    for step, pairs in enumerate(progress, start=1):
        # The heart of it: a loop of your own needs these lines and those of `loss_by_logits`.
        loss, logps = loss_of(policy, pairs, options)
        loss.backward()
        row = updater.step(loss)
        row |= as_floats(preference_metrics(*logps, beta=options.beta))

        append_row(output / "steps.csv", STEP_COLUMNS, row)
        if step % math.ceil(options.steps / EVALUATIONS) == 0 or step == options.steps:
            after = evaluate(policy, held_out, options)
            append_row(output / "held_out.csv", HELD_OUT_COLUMNS, {"step": step, **after})
            progress.set_postfix(held_out_accuracy=f"{after['rewards/accuracies']:.2f}")
    return before, after


def loss_by_logits(
    policy: PreTrainedModel, pairs: Sequence[TokenPair], options: Options
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns the loss of a batch of pairs and the four log-probabilities that it is of."""
    policy_chosen, policy_rejected = pair_logps(policy, pairs, fused=False)
    logps = (policy_chosen, policy_rejected, *reference_logps(pairs, policy.device))
    return choose_loss(options)(*logps, **known_gaps(pairs, policy.device, options)), logps


def loss_by_tiles(
    policy: PreTrainedModel, pairs: Sequence[TokenPair], options: Options
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns the same from hidden states: the logits never exist as a whole."""
    batch, reference = pad_pairs(pairs, policy.device), reference_logps(pairs, policy.device)
    chosen_hidden, rejected_hidden = hidden_states(policy, batch).chunk(2)
    out = choose_fused_loss(options)(
        chosen_hidden,
        rejected_hidden,
        head_weight(policy),
        *batch.labels.chunk(2),
        *reference,
        **known_gaps(pairs, policy.device, options),
    )
    return out.loss, (out.chosen_logps, out.rejected_logps, *reference)


def train_on_chosen(
    model: PreTrainedModel, pairs: list[TokenPair], options: Options, output: Path
) -> None:
    """Fine-tunes the model on the chosen completions: the SFT stage."""
    updater = Updater(model, "sft", options)
    progress = tqdm(draw_batches(pairs, options.sft_steps, options), "SFT")
    for batch_pairs in progress:
        batch = pad([pair.chosen for pair in batch_pairs], model.device)
        tokens = (batch.labels != IGNORED).sum()
        loss = -completion_logps(model, batch, fused=options.fused).sum() / tokens
        loss.backward()
        row = updater.step(loss)
        append_row(output / "steps.csv", STEP_COLUMNS, row)
        progress.set_postfix(loss=f"{row['loss']:.2f}")


def choose_loss(options: Options) -> Callable[..., Tensor]:
    """Returns the loss of the command line as a function of the four log-probabilities."""
    loss_function = partial(LOSSES[options.loss], beta=options.beta)
    if options.linear_below is None:
        return loss_function
    return partial(loss_function, linear_below=options.linear_below)


def choose_fused_loss(options: Options) -> Callable[..., LinearPairLoss]:
    """Returns the same loss as a function of hidden states, head, labels and reference."""
    from spoloss import Squared
    from spoloss.torch import linear_dpo_loss, linear_pair_loss, linear_spo_loss

    def squared(*inputs: Tensor, beta: float, reward_gap: Tensor | float = 1.0) -> LinearPairLoss:
        # A target of reward_gap / beta is that of another beta.
        return linear_pair_loss(Squared(), *inputs, beta=beta / reward_gap)

    fused = {"spo": linear_spo_loss, "dpo": linear_dpo_loss, "squared": squared}
    loss_function = partial(fused[options.loss], beta=options.beta)
    if options.linear_below is None:
        return loss_function
    return partial(loss_function, linear_below=options.linear_below)


def known_gaps(
    pairs: Sequence[TokenPair], device: torch.device | str, options: Options
) -> dict[str, Tensor]:
    """Returns the arguments that tell the loss the reward gaps of its pairs, [B] each."""
    import torch

    if not options.reward_gap:
        return {}
    gaps = torch.tensor([pair.reward_gap for pair in pairs], device=device)
    if options.loss == "squared":
        return {"reward_gap": gaps}
    # SPO's curvature goes like 1 / gap^2: without the weight the smallest gaps own the batch.
    return {"reward_gap": gaps, "weights": gaps**2}


def completion_logps(model: PreTrainedModel, batch: Batch, *, fused: bool) -> Tensor:
    """Returns the log-probability of each text's completion, nats, [texts]."""
    from spoloss.torch import linear_logps, sequence_logps

    if fused:
        return linear_logps(hidden_states(model, batch), head_weight(model), batch.labels)
    # With a large vocabulary these logits are most of the memory: then --fused does without them.
    logits = model(batch.ids, attention_mask=batch.mask).logits
    return sequence_logps(logits, batch.labels)


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Returns the last hidden states, which the head turns into logits, [texts, longest, width]."""
    return model.get_decoder()(batch.ids, attention_mask=batch.mask).last_hidden_state


def head_weight(model: PreTrainedModel) -> Tensor:
    """Returns the weight of the language-model head, [vocabulary, width]."""
    return model.get_output_embeddings().weight


def check_head(model: PreTrainedModel, pairs: Sequence[TokenPair]) -> None:
    """Refuses a model whose head does more than a product, such as a bias or a soft-cap."""
    import torch

    batch = pad_pairs(pairs, model.device)
    with torch.no_grad():
        by_logits, by_tiles = (completion_logps(model, batch, fused=f) for f in (False, True))
    if not torch.allclose(by_logits, by_tiles, rtol=1e-2, atol=1e-2):
        raise InputError(
            "--fused: expected a head that is hidden @ weight.T, got one with more to it: "
            "give linear_logps and the fused loss its bias, softcap or logit_scale"
        )


def pair_logps(
    model: PreTrainedModel, pairs: Sequence[TokenPair], *, fused: bool
) -> tuple[Tensor, Tensor]:
    """Returns the log-probabilities of the chosen and of the rejected completions, nats, [B]."""
    logps = completion_logps(model, pad_pairs(pairs, model.device), fused=fused)
    chosen, rejected = logps.chunk(2)
    return chosen, rejected


def score_pairs(
    model: PreTrainedModel, pairs: list[TokenPair], batch_size: int, *, fused: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns what pair_logps does, for any number of pairs and without gradients."""
    import torch

    with torch.no_grad():
        batches = (pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size))
        scored = (pair_logps(model, batch, fused=fused) for batch in batches)
        chosen, rejected = zip(*scored, strict=True)
    return torch.cat(chosen), torch.cat(rejected)


def add_reference(
    pairs: list[TokenPair], reference: PreTrainedModel, options: Options
) -> list[TokenPair]:
    """Returns the pairs with the log-probabilities that the reference gives their completions."""
    # The reference is frozen, so once per pair is enough: later there is no second model to hold in
    # memory and no second forward pass in any step, and the policy may train in place.
    chosen, rejected = score_pairs(reference, pairs, options.batch_size, fused=options.fused)
    return [
        replace(pair, reference_chosen=of_chosen, reference_rejected=of_rejected)
        for pair, of_chosen, of_rejected in zip(
            pairs, chosen.tolist(), rejected.tolist(), strict=True
        )
    ]


def reference_logps(
    pairs: Sequence[TokenPair], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Returns the log-probabilities that the reference gives chosen and rejected, nats, [B]."""
    import torch

    chosen = torch.tensor([pair.reference_chosen for pair in pairs], device=device)
    rejected = torch.tensor([pair.reference_rejected for pair in pairs], device=device)
    return chosen, rejected


def evaluate(
    policy: PreTrainedModel, held_out: list[TokenPair], options: Options
) -> dict[str, float]:
    """Returns the loss and the preference metrics of the held-out pairs."""
    policy_logps = score_pairs(policy, held_out, options.batch_size, fused=options.fused)
    logps = (*policy_logps, *reference_logps(held_out, policy.device))
    metrics = preference_metrics(*logps, beta=options.beta)
    loss = choose_loss(options)(*logps, **known_gaps(held_out, policy.device, options))
    return as_floats({"loss": loss, **metrics})


def as_floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Returns 0-d tensors as Python numbers."""
    return {name: value.item() for name, value in metrics.items()}


class Updater:
    """AdamW with warm-up, linear decay and gradient clipping for one stage of the run."""

    def __init__(self, model: PreTrainedModel, stage: str, options: Options) -> None:
        """Sets the stage up.

        Args:
          model: the model to train.
          stage: "sft" or "preference".
          options: the command line, for the stage's steps and learning rate.
        """
        import torch

        sft = stage == "sft"
        self.stage = stage
        self.steps = options.sft_steps if sft else options.steps
        self.advice = "a lower --sft-lr" if sft else "a lower --lr"
        if not sft and options.loss == "spo" and options.linear_below is None:
            self.advice += " or --linear-below 0"
        self.count = 0
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=options.sft_lr if sft else options.lr
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.lr_factor)

    def lr_factor(self, step: int) -> float:
        """Returns the share of the full learning rate at a step: up in a line, then down."""
        warm_up = math.ceil(WARM_UP_SHARE * self.steps)
        return min((step + 1) / warm_up, (self.steps - step) / (self.steps - warm_up + 1))

    def step(self, loss: Tensor) -> dict[str, str | float]:
        """Clips the gradients and updates the model.

        Args:
          loss: the loss whose gradients the parameters hold.

        Returns:
          The stage, the step, the loss, the learning rate and the gradient norm before clipping.

        Raises:
          DivergedError: the loss or the gradient norm is not finite; the model is left as it was.
        """
        import torch

        norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM).item()
        value, lr = loss.item(), self.optimizer.param_groups[0]["lr"]
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise DivergedError(
                f"{self.stage} step {self.count}: expected a finite loss and gradient, got loss "
                f"{value} and gradient norm {norm}; try {self.advice}"
            )
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        counted: dict[str, str | float] = {"stage": self.stage, "step": self.count}
        self.count += 1
        return {**counted, "loss": value, "lr": lr, "grad_norm": norm}


# ------------------------------------------------------------------------------ tokens and model


def build_model(
    pairs: list[Pair], options: Options
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Builds a small untrained Qwen2 and a byte-level BPE tokenizer that has read the pairs."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    texts = [text for pair in pairs for text in (pair.prompt, pair.chosen, pair.rejected)]
    # Qwen2's own class, for AutoTokenizer picks it by the model's name when the folder is loaded.
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, MAX_VOCABULARY, show_progress=False)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=options.max_length,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config), tokenizer


def load_model(name: str, options: Options) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the model and the tokenizer that the command line names."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = f"--model {name}"
    try:
        # In bfloat16 weights an AdamW step of 1e-6 would be rounded away.
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{where}: expected a causal language model, got: {reason}") from error
    # For a folder without a tokenizer Transformers makes one up that knows no word.
    if tokenizer.eos_token_id is None or not tokenizer.encode("text", add_special_tokens=False):
        raise InputError(f"{where}: expected a tokenizer with words and an end of text, got none")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and options.max_length > longest:
        raise InputError(
            f"{where}: expected --max-length of at most {longest}, got {options.max_length}"
        )
    return model, tokenizer


def encode_pair(pair: Pair, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenPair:
    """Turns a pair into tokens, and cuts what is longer than `max_length`."""
    # Prompt and completion are encoded apart, so that no token can straddle their boundary.
    prompt = encode_prompt(pair.prompt, tokenizer)
    chosen, rejected = (
        [*tokenizer.encode(completion, add_special_tokens=False), tokenizer.eos_token_id]
        for completion in (pair.chosen, pair.rejected)
    )
    longest = max(len(chosen), len(rejected))
    # The prompt gives way first and loses its beginning, for the question mostly ends it; half the
    # room stays its own, for an answer to nothing teaches nothing. A completion loses its end.
    kept = prompt[-max(max_length - longest, max_length // 2) :]
    return TokenPair(
        chosen=join(kept, chosen, max_length),
        rejected=join(kept, rejected, max_length),
        truncated=len(prompt) + longest > max_length,
        reward_gap=pair.reward_gap,
    )


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encodes a prompt the way the model was taught to read one, or else as a line of its own."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(prompt + "\n")
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def join(prompt: list[int], completion: list[int], max_length: int) -> Text:
    """Joins a prompt and as much of a completion as fits; only the completion is to be learnt."""
    completion = completion[: max_length - len(prompt)]
    return Text(ids=prompt + completion, labels=[IGNORED] * len(prompt) + completion)


def pad_pairs(pairs: Sequence[TokenPair], device: torch.device | str) -> Batch:
    """Pads pairs for one forward pass: all chosen texts, then all rejected."""
    return pad([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs], device)


def pad(texts: Sequence[Text], device: torch.device | str) -> Batch:
    """Pads texts on the right to the longest of them."""
    import torch

    longest = max(len(text.ids) for text in texts)

    def filled(rows: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows], device=device)

    # The mask hides the padding, so any token may fill it: 0.
    return Batch(
        ids=filled([text.ids for text in texts], 0),
        mask=filled([[1] * len(text.ids) for text in texts], 0),
        labels=filled([text.labels for text in texts], IGNORED),
    )


def draw_batches(pairs: list[TokenPair], steps: int, options: Options) -> list[list[TokenPair]]:
    """Draws full batches for a number of steps: pass after pass over the pairs, each shuffled."""
    rng = random.Random(options.seed)
    drawn: list[TokenPair] = []
    while len(drawn) < steps * options.batch_size:
        drawn += rng.sample(pairs, len(pairs))
    return [drawn[i * options.batch_size :][: options.batch_size] for i in range(steps)]


# --------------------------------------------------------------------------------- what it leaves


def create_output(options: Options) -> Path:
    """Creates the output folder: the one asked for, or the first free runs/<loss>-<n>."""
    free = (Path("runs", f"{options.loss}-{number}") for number in itertools.count(1))
    output = options.output or next(folder for folder in free if not folder.exists())
    try:
        output.mkdir(parents=True, exist_ok=options.output is not None)
    except OSError as error:
        raise InputError(f"{output}: expected a folder to write to, got: {error}") from error
    return output


def append_row(path: Path, columns: Sequence[str], row: dict[str, str | float]) -> None:
    """Appends a row to a CSV file, so that a run that stops early leaves what it has seen."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerow(row)


def read_columns(path: Path, stage: str | None = None) -> dict[str, list[float]]:
    """Reads the columns of numbers of a CSV file, of one stage if it has several."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.pop("stage", None) == stage]
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def peak_memory() -> str:
    """Returns the most memory that the run has held so far: the card's, or the process's."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB on the card"
    try:
        import resource
    except ImportError:  # Windows
        return "not known on this system"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:.0f} MiB"


def print_table(before: dict[str, float], after: dict[str, float], pairs: int) -> None:
    """Prints the held-out metrics before and after preference training."""
    title = f"{pairs} held-out pairs"
    print(f"\n{title:<36}{'before':>10}{'after':>10}{'change':>10}")
    for name, label in {"loss": "loss", **METRICS}.items():
        change = after[name] - before[name]
        print(f"{label:<36}{before[name]:>10.3f}{after[name]:>10.3f}{change:>+10.3f}")
    print("Before, the policy is the reference and every x is 0; a coin wins half of the pairs.\n")


def draw_curves(output: Path, options: Options) -> None:
    """Draws the preference stage: loss, rewards, margins and log-probabilities."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    batches = read_columns(output / "steps.csv", "preference")
    held_out = read_columns(output / "held_out.csv")
    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(f"Preference training: {options.loss}, beta = {options.beta:g}")
    loss, margins, rewards, logps = figure.subplots(2, 2).flat
    draw_panel(loss, f"{options.loss} loss", ["loss"], batches, held_out)
    draw_panel(margins, "reward margin x (nats)", ["rewards/margins"], batches, held_out)
    sides = ["rewards/chosen", "rewards/rejected"]
    draw_panel(rewards, "reward (nats)", sides, batches, held_out)
    sides = ["logps/chosen", "logps/rejected"]
    draw_panel(logps, "log-probability (nats)", sides, batches, held_out)
    if options.loss != "dpo" and not options.reward_gap:
        margins.axhline(1, color="grey", linestyle=":", label="target of the loss")
        margins.legend()
    FigureCanvasAgg(figure).print_png(output / "curves.png")


def draw_panel(
    axes: Axes,
    label: str,
    names: list[str],
    batches: dict[str, list[float]],
    held_out: dict[str, list[float]],
) -> None:
    """Draws metrics over the preference steps: of each batch, and of the held-out pairs."""
    for name, color in zip(names, ("tab:blue", "tab:orange"), strict=False):
        side = name.rpartition("/")[2]
        axes.plot(batches["step"], batches[name], color, alpha=0.4, label=f"{side}, batch")
        axes.plot(held_out["step"], held_out[name], color, marker="o", label=f"{side}, held out")
    axes.set_xlabel("preference step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend()


# --------------------------------------------------------------------------- reading what is given


def read_pairs(path: Path, *, with_gap: bool = False) -> list[Pair]:
    """Reads the preference pairs of a JSONL file, plain or .gz; blank lines are skipped."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            lines = enumerate(file, start=1)
            return [parse_pair(text, path, line, with_gap) for line, text in lines if text.strip()]
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: expected a readable file of pairs, got: {reason}") from error


def parse_pair(text: bytes, path: Path, line: int, with_gap: bool) -> Pair:
    """Reads one line of the pairs file."""

    def refuse(expected: str, got: str) -> NoReturn:
        raise InputError(f"{path}:{line}: expected {expected}, got {got}")

    try:
        record = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        refuse("UTF-8 text", f"a byte that is not: {error.reason}")
    except json.JSONDecodeError as error:
        refuse("a JSON object", f"malformed JSON: {error.msg} at column {error.colno}")
    if not isinstance(record, dict):
        refuse("a JSON object", f"{record!r:.40}")
    for key in ("prompt", "chosen", "rejected"):
        if key not in record:
            refuse(f"the key {key!r}", f"the keys {list(record)!r:.60}")
        if not isinstance(record[key], str):
            refuse(f"a string as {key!r}", f"{record[key]!r:.40}")
        if LONE_SURROGATE.search(record[key]):
            refuse(f"text as {key!r}", "half a character: a lone surrogate")
        if key != "prompt" and not record[key].strip():
            refuse(f"text as {key!r}", repr(record[key]))
    if record["chosen"] == record["rejected"]:
        refuse("a rejected completion that differs from the chosen one", "the same twice")
    split = record.get("split")
    if "split" in record and split not in ("train", "test"):
        refuse("'train' or 'test' as 'split'", f"{split!r:.40}")
    gap = parse_gap(record, refuse) if with_gap else math.nan
    return Pair(record["prompt"], record["chosen"], record["rejected"], split, line, gap)


def parse_gap(record: dict[str, object], refuse: Callable[[str, str], NoReturn]) -> float:
    """Reads by how much the chosen completion of one line is the better one."""
    given = [key for key in ("reward_gap", "p_chosen") if key in record]
    if len(given) != 1:
        refuse("one of the keys 'reward_gap' and 'p_chosen'", " and ".join(given) or "neither")
    key = given[0]
    low, high = (0.0, MAX_REWARD_GAP) if key == "reward_gap" else (0.5, 1.0)
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
        refuse(f"a number above {low:g} and below {high:g} as {key!r}", f"{value!r:.40}")
    return value if key == "reward_gap" else math.log(value / (1.0 - value))


def split_pairs(pairs: list[Pair], options: Options) -> tuple[list[Pair], list[Pair]]:
    """Splits the pairs into those to train on and those held out."""
    unmarked = [pair for pair in pairs if pair.split is None]
    if unmarked and len(unmarked) < len(pairs):
        raise InputError(
            f"{options.pairs}:{unmarked[0].line}: expected 'split' on every line or on none, "
            "got a line without it"
        )
    if unmarked:
        # Whole prompts are held out: an answer to a prompt gives its other answers away.
        prompts = sorted({pair.prompt for pair in pairs})
        random.Random(options.seed).shuffle(prompts)
        chosen = set(prompts[: max(1, round(HELD_OUT_SHARE * len(prompts)))])
        held_out = [pair for pair in pairs if pair.prompt in chosen]
        train = [pair for pair in pairs if pair.prompt not in chosen]
    else:
        held_out = [pair for pair in pairs if pair.split == "test"]
        train = [pair for pair in pairs if pair.split == "train"]
    if not (train and held_out):
        raise InputError(
            f"{options.pairs}: expected pairs to train on and pairs to hold out, "
            f"got {len(train)} and {len(held_out)}"
        )
    return train, held_out


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that refuses in one sentence, as the rest of the script does."""

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


def parse_options(argv: Sequence[str] | None) -> Options:
    """Reads and checks the command line; the learning rates that suit depend on --model."""
    positive, below_one = partial(number, low=0), partial(number, high=1)
    natural, length = partial(whole_number, low=0), partial(whole_number, low=8)
    shipped = Path(__file__).with_name("pairs.jsonl")
    parser = OneLineParser(prog="train.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--pairs", type=Path, default=shipped, help="JSON lines, plain or .gz")
    add("--model", help="a folder or a name on the Hugging Face Hub; default: a small new Qwen2")
    add("--loss", choices=list(LOSSES), default="spo", help="default: spo")
    add("--beta", type=positive, default=0.1, help="default: 0.1")
    add("--linear-below", type=below_one, help="continue SPO in a line for x below this")
    add("--reward-gap", action="store_true", help="aim at each line's reward_gap or p_chosen")
    add("--fused", action="store_true", help="hidden states to the loss without the logits")
    add("--sft-steps", type=natural, default=150, help="default: 150; 0 after an SFT of your own")
    add("--sft-lr", type=positive, help="default: 1e-3, with --model 1e-5")
    add("--steps", type=whole_number, default=100, help="of preference training; default: 100")
    add("--lr", type=positive, help="of preference training; default: 3e-4, with --model 1e-6")
    add("--batch-size", type=whole_number, default=16, help="pairs in a batch; default: 16")
    add("--max-length", type=length, default=256, help="tokens in a text; default: 256")
    add("--seed", type=natural, default=0, help="default: 0")
    add("--output", type=Path, help="a new folder; default: the first free runs/<loss>-<n>")
    given = vars(parser.parse_args(argv))
    given["sft_lr"] = given["sft_lr"] or (1e-5 if given["model"] else 1e-3)
    given["lr"] = given["lr"] or (1e-6 if given["model"] else 3e-4)
    options = Options(**given)
    check_options(options)
    return options


def check_options(options: Options) -> None:
    """Refuses what argparse cannot judge: another loss's option, and folders of no use."""
    if options.linear_below is not None and options.loss != "spo":
        raise InputError(f"--linear-below: expected --loss spo, got --loss {options.loss}")
    if options.reward_gap and options.loss == "dpo":
        raise InputError("--reward-gap: expected --loss spo or squared, got --loss dpo")
    output, model = options.output, options.model
    if output is not None and output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: expected a folder, got a file")
    if output is not None and output.exists() and any(output.iterdir()):
        raise InputError(f"--output {output}: expected an empty folder, got one with files")
    if model is not None and Path(model).is_dir():
        if not Path(model, "config.json").is_file():
            raise InputError(f"--model {model}: expected a folder with config.json, got none")
    elif model is not None and (Path(model).exists() or not HUB_NAME.fullmatch(model)):
        raise InputError(f"--model {model}: expected a folder or a Hub name, got neither")


if __name__ == "__main__":
    sys.exit(main())
