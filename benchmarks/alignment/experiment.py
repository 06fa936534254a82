"""The parts of the experiment: what each of them computes and leaves in the store.

A seed has a foundation (prompts split, corpus, fine-tuned policy, pairs, limits); every arm of the
seed starts from it, on all pairs or on a few that it memorises.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.alignment import seeds
from benchmarks.alignment.arms import Arm
from benchmarks.alignment.evaluation import draw_samples, find_limits, judge, measure_pairs
from benchmarks.alignment.language import (
    COMPLETION_TOKENS,
    END,
    Prompt,
    all_prompts,
    encode,
    write_review,
)
from benchmarks.alignment.model import Policy
from benchmarks.alignment.store import Store, write_atomically
from benchmarks.alignment.training import (
    Pairs,
    Stage,
    StepHook,
    fine_tune,
    score,
    train_on_pairs,
)
from torch import Tensor

HELD_OUT_PROMPTS = 32
LEAST_GAP = 0.1
MEASURED_PAIRS, SNAPSHOT_PAIRS = 512, 128
SFT = "sft"


@dataclass(frozen=True)
class Foundation:
    """What every arm of a seed starts from.

    Attributes:
      fine_tuning: the SFT stage; its `pairs` are reviews drawn from the grammar.
      pairs: pairs on the training prompts.
      held_out_pairs: pairs on the held-out prompts.
      answers: texts by which a policy is judged, for each held-out prompt.
      limit_answers: texts of the reference for each held-out prompt, for the limits.
    """

    fine_tuning: Stage
    pairs: int
    held_out_pairs: int
    answers: int
    limit_answers: int


@dataclass(frozen=True)
class Ground:
    """A foundation that has been laid.

    Attributes:
      policy: the fine-tuned one, the reference of all arms.
      pairs: training pairs, each labelled by its true rewards.
      wrong: the pairs that a Bradley-Terry judge labels wrongly, [N].
      held_out: pairs on the held-out prompts, labelled by their true rewards.
    """

    policy: Policy
    pairs: Pairs
    wrong: Tensor
    held_out: Pairs

    def labelled_for(self, arm: Arm) -> Pairs:
        """The training pairs with the labels that the arm is given."""
        return self.pairs.flipped(self.wrong) if arm.noisy else self.pairs


# ---------------------------------------------------------------------------------- the foundation


def lay_foundation(settings: Foundation, seed: int, store: Store, hook: StepHook) -> None:
    """Fine-tunes the policy, draws the pairs from it, judges it and finds the limits."""
    training, held_out = split_prompts(seed)
    prompts, reviews = write_corpus(training, settings.fine_tuning.pairs, seed)
    policy = fine_tune(prompts, reviews, settings.fine_tuning, seed, hook)
    pairs = draw_pairs(policy, training, settings.pairs, seed, "training pairs")
    held_out_pairs = draw_pairs(policy, held_out, settings.held_out_pairs, seed, "held-out pairs")
    wrong = draw_wrong_labels(pairs, seed)
    save_ground(Ground(policy, pairs, wrong, held_out_pairs), store, seed)

    generator = seeds.generator(seed, "limits")
    rewards = draw_samples(policy, held_out, settings.limit_answers, generator).rewards
    store.write(
        foundation_name(seed),
        {
            **judge(policy, policy, held_out, settings.answers, seed, SFT),
            "limits": find_limits(rewards),
            "pairs": len(pairs),
            "mean_gap": pairs.gap.mean().item(),
            "wrong_labels": wrong.double().mean().item(),
        },
    )


def foundation_name(seed: int) -> str:
    """Under which the store keeps a seed's foundation."""
    return f"seed-{seed}/foundation"


def split_prompts(seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on and the held-out ones."""
    prompts = all_prompts()
    seeds.rng(seed, "prompts").shuffle(prompts)
    return prompts[HELD_OUT_PROMPTS:], prompts[:HELD_OUT_PROMPTS]


def write_corpus(prompts: Sequence[Prompt], number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Reviews drawn from the grammar, as ids of their prompts [N, 4] and of themselves [N, 40]."""
    rng = seeds.rng(seed, "corpus")
    asked = rng.choices(prompts, k=number)
    reviews = [write_review(prompt, rng) for prompt in asked]
    padded = [review + [END] * (COMPLETION_TOKENS - len(review)) for review in reviews]
    return (
        torch.tensor([encode(prompt.tokens) for prompt in asked]),
        torch.tensor([encode(review) for review in padded]),
    )


def draw_pairs(
    policy: Policy, prompts: Sequence[Prompt], number: int, seed: int, name: str
) -> Pairs:
    """Pairs of the policy's answers whose rewards differ by 0.1 at least, the better one chosen."""
    each = 2 * -(-number * 5 // (4 * len(prompts)))  # a quarter more: some differ by too little
    drawn = draw_samples(policy, prompts, each, seeds.generator(seed, name))
    rewards = torch.tensor(drawn.rewards).flatten()
    first, second = rewards[::2], rewards[1::2]
    apart = ((first - second).abs() >= LEAST_GAP).nonzero()[:, 0]
    # Answers come prompt by prompt: in this order the first pairs would all be of a few prompts.
    order = torch.randperm(len(apart), generator=seeds.generator(seed, name, "order"))
    kept = apart[order][:number]
    chosen, rejected = (drawn.completions[2 * kept + offset] for offset in (0, 1))
    prompt_ids = drawn.prompts[2 * kept]
    pairs = Pairs(
        prompts=prompt_ids,
        chosen=chosen,
        rejected=rejected,
        gap=(first - second)[kept].float(),
        reference_chosen=score(policy, prompt_ids, chosen),
        reference_rejected=score(policy, prompt_ids, rejected),
    )
    return pairs.flipped(pairs.gap < 0)


def draw_wrong_labels(pairs: Pairs, seed: int) -> Tensor:
    """The pairs that a Bradley-Terry judge of the true rewards would label wrongly."""
    uniform = torch.rand(len(pairs), generator=seeds.generator(seed, "labels"))
    return uniform > pairs.gap.sigmoid()


def save_ground(ground: Ground, store: Store, seed: int) -> None:
    """Keeps what the arms start from, as tensors."""
    contents = {
        "policy": ground.policy.state_dict(),
        "pairs": vars(ground.pairs),
        "wrong": ground.wrong,
        "held_out": vars(ground.held_out),
    }
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    write_atomically(store.path(foundation_name(seed), ".pt"), buffer.getvalue())


def load_ground(store: Store, seed: int) -> Ground:
    """What the arms of a seed start from."""
    contents = torch.load(store.path(foundation_name(seed), ".pt"))
    policy = Policy()
    policy.load_state_dict(contents["policy"])
    return Ground(
        policy, Pairs(**contents["pairs"]), contents["wrong"], Pairs(**contents["held_out"])
    )


# ---------------------------------------------------------------------------------------- the arms


def run_arm(
    name: str,
    arm: Arm,
    stage: Stage,
    foundation: Foundation,
    seed: int,
    store: Store,
    hook: StepHook,
) -> None:
    """Trains one arm from the foundation and judges it.

    Args:
      name: under which the store keeps the result; it also seeds the policy's answers.
      arm: loss, beta and labels.
      stage: how it is trained.
      foundation: the settings of what it starts from.
      seed: whose foundation that is.
      store: where that lies and the result goes.
      hook: called after every step.
    """
    ground = load_ground(store, seed)
    pairs = ground.labelled_for(arm)[: stage.pairs]
    snapshots: list[dict[str, Any]] = []

    def look(step: int, policy: Policy) -> None:
        for split, seen in (("train", pairs), ("held_out", ground.held_out)):
            measured = measure_pairs(policy, seen[:SNAPSHOT_PAIRS], arm.beta)
            snapshots.append({"step": step, "split": split, **measured})

    trained = train_on_pairs(ground.policy, pairs, arm, stage, seed, hook, look)
    _, held_out_prompts = split_prompts(seed)
    store.write(
        name,
        {
            **judge(trained.policy, ground.policy, held_out_prompts, foundation.answers, name),
            **trained.summary(),
            "train": measure_pairs(trained.policy, pairs[:MEASURED_PAIRS], arm.beta),
            "held_out": measure_pairs(trained.policy, ground.held_out[:MEASURED_PAIRS], arm.beta),
            "snapshots": snapshots,
        },
    )
