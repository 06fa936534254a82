"""The training loop, for you to copy: supervised fine-tuning (SFT), then preference training.

The model after SFT is the reference. The run needs no second copy of it, because the reference
scores each pair that the run will draw once, before the first step of the policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from arguments import Options
from curves import draw_curves
from models import build_model, load_model
from objective import margin_loss, targets
from pairs import Split, draw_subset
from records import Records, create_output, peak_memory, print_table
from scoring import (
    PairLogps,
    check_head,
    completion_logps,
    head_weight,
    hidden_states,
    reference_logps,
    score_by_reference,
    score_pairs,
)
from spoloss import pair_loss, preference_metrics
from spoloss.torch import linear_pair_loss, sequence_logps
from tokens import (
    IGNORED,
    ScoredPair,
    TokenPair,
    draw_batches,
    encode_pair,
    known_gaps,
    pad,
    pad_pairs,
)
from updater import Updater

GOOD_LOSS = {
    "spo": "good values are negative, down to -1/e = -0.368",
    "dpo": "it falls towards 0",
    "squared": "it falls towards 0",
}


class PolicyLoss(NamedTuple):
    """The loss of a batch of pairs, and the policy's log-probabilities in it."""

    loss: Tensor
    logps: PairLogps


# ---------------------------------------------------------------------------------- the whole run


def run(split: Split, options: Options) -> None:
    """Trains a model in both stages and writes the output folder."""
    torch.manual_seed(options.seed)
    loaded = (
        load_model(options.model, options.max_length)
        if options.model
        else build_model(split.train, options.max_length)
    )
    tokenizer = loaded.tokenizer
    # Eval mode disables dropout. With dropout, policy and reference would differ at step 0.
    model = loaded.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    train, held_out = (
        [encode_pair(pair, tokenizer, options.max_length) for pair in tqdm(pairs, title)]
        for pairs, title in ((split.train, "tokens"), (split.held_out, "tokens, held out"))
    )
    if options.fused:
        check_head(model, train[: options.batch_size])
    output = create_output(options)
    truncated = sum(pair.truncated for pair in train + held_out)
    print(f"{len(train)} pairs to train on, {len(held_out)} held out; {truncated} truncated")
    size = f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens"
    print(f"{size}; writes to {output}", flush=True)

    if options.sft_steps > 0:
        train_on_chosen(model, train, options, Records(output))
    train_on_pairs(model, train, held_out, options, Records(output))

    draw_curves(output, options)
    print(f"Peak memory {'with the fused head' if options.fused else 'by logits'}: {peak_memory()}")
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")


# ------------------------------------------------------------------------------------ the stages


def train_on_chosen(
    model: PreTrainedModel, pairs: list[TokenPair], options: Options, records: Records
) -> None:
    """Fine-tunes the model on the chosen completions: the SFT stage."""
    advice = "a lower --sft-lr"
    updater = Updater(model, "sft", steps=options.sft_steps, lr=options.sft_lr, advice=advice)
    batches = draw_batches(pairs, options.sft_steps, options.batch_size, options.seed)
    progress = tqdm(batches, "SFT", total=options.sft_steps)
    for batch_pairs in progress:
        batch = pad([pair.chosen for pair in batch_pairs], model.device)
        tokens = (batch.labels != IGNORED).sum()
        loss = -completion_logps(model, batch, fused=options.fused).sum() / tokens
        loss.backward()
        row = updater.step(loss)
        records.add_step(row)
        progress.set_postfix(loss=f"{row['loss']:.2f}")


def train_on_pairs(
    policy: PreTrainedModel,
    train: list[TokenPair],
    held_out: list[TokenPair],
    options: Options,
    records: Records,
) -> None:
    """Trains the policy on preferences. The reference is the policy before training."""
    # A short run draws few pairs of a large file. The reference scores only those.
    drawn = draw_subset(train, options.steps * options.batch_size, options.seed)
    drawn = score_by_reference(policy, drawn, options, "reference")
    held_out = score_by_reference(policy, held_out, options, "reference, held out")
    before = after = metrics_of(reference_logps(held_out, policy.device), held_out, options)
    records.add_evaluation(0, before)
    print_start(before["loss"], options)

    loss_of = loss_by_tiles if options.fused else loss_by_logits
    updater = preference_updater(policy, options)
    batches = draw_batches(drawn, options.steps, options.batch_size, options.seed)
    progress = tqdm(batches, "preference", total=options.steps)
    for step, pairs in enumerate(progress, start=1):
        # The core of the run: your own loop needs these lines and those of `loss_by_logits`.
        loss, policy_logps = loss_of(policy, pairs, options)
        loss.backward()
        row = updater.step(loss)

        records.add_step(row | metrics_of(policy_logps, pairs, options) | {"loss": row["loss"]})
        if step % math.ceil(options.steps / options.evaluations) == 0 or step == options.steps:
            logps = score_pairs(policy, held_out, options, "held out", delay=2.0)
            after = metrics_of(logps, held_out, options)
            records.add_evaluation(step, after)
            progress.set_postfix(held_out_accuracy=f"{after['rewards/accuracies']:.2f}")
    print_table(before, after, len(held_out))


def preference_updater(policy: PreTrainedModel, options: Options) -> Updater:
    """Returns the optimizer of preference training."""
    advice = "a lower --lr"
    if options.loss == "spo" and options.linear_below is None:
        advice += " or --linear-below 0"
    return Updater(policy, "preference", steps=options.steps, lr=options.lr, advice=advice)


def print_start(loss: float, options: Options) -> None:
    """Prints the first loss, and what values to expect."""
    unit = " times the squared gap" if options.loss == "spo" and options.reward_gap else ""
    start = f"starts at {loss:.3f}, where policy and reference agree"
    print(f"The {options.loss} loss {start}; {GOOD_LOSS[options.loss]}{unit}.", flush=True)


# ------------------------------------------------------------------------------------ the losses


def loss_by_logits(
    policy: PreTrainedModel, pairs: Sequence[ScoredPair], options: Options
) -> PolicyLoss:
    """Returns the loss of a batch of pairs from the policy's logits."""
    batch, reference = pad_pairs(pairs, policy.device), reference_logps(pairs, policy.device)
    logits = policy(batch.ids, attention_mask=batch.mask).logits
    policy_logps = PairLogps(*sequence_logps(logits, batch.labels).chunk(2))
    target = targets(known_gaps(pairs, policy.device), options)
    loss = pair_loss(margin_loss(options), *policy_logps, *reference, **target)
    return PolicyLoss(loss, policy_logps)


def loss_by_tiles(
    policy: PreTrainedModel, pairs: Sequence[ScoredPair], options: Options
) -> PolicyLoss:
    """Returns the same from hidden states, without holding all logits."""
    batch, reference = pad_pairs(pairs, policy.device), reference_logps(pairs, policy.device)
    out = linear_pair_loss(
        margin_loss(options),
        *hidden_states(policy, batch).chunk(2),
        head_weight(policy),
        *batch.labels.chunk(2),
        *reference,
        **targets(known_gaps(pairs, policy.device), options),
    )
    return PolicyLoss(out.loss, PairLogps(out.chosen_logps, out.rejected_logps))


def metrics_of(
    policy_logps: PairLogps, pairs: Sequence[ScoredPair], options: Options
) -> dict[str, float]:
    """Returns the loss and the preference metrics of scored pairs."""
    device = policy_logps.chosen.device
    logps = (*(side.detach() for side in policy_logps), *reference_logps(pairs, device))
    gaps = known_gaps(pairs, device)
    metrics = preference_metrics(*logps, beta=options.beta, reward_gap=gaps)
    metrics["loss"] = pair_loss(margin_loss(options), *logps, **targets(gaps, options))
    return {name: value.item() for name, value in metrics.items()}
