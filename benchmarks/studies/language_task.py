"""The made-up language as a task: fine-tuning on its reviews, pairs of answers, their judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.studies import seeds
from benchmarks.studies.evaluation import find_limits
from benchmarks.studies.experiment import (
    Foundation,
    Ground,
    describe_pairs,
    foundation_name,
    load_kept,
    save_ground,
)
from benchmarks.studies.language import (
    COMPLETION_TOKENS,
    END,
    Prompt,
    all_prompts,
    decode,
    encode,
    parse,
    reward,
    write_review,
)
from benchmarks.studies.language_model import Policy, completion_logps, sample
from benchmarks.studies.store import Store
from benchmarks.studies.training import (
    Answers,
    Pairs,
    Stage,
    Updater,
    draw_batches,
    score,
)

HELD_OUT_PROMPTS = 32
LEAST_GAP = 0.1
SHOWN_SAMPLES = 3
SFT = "sft"


@dataclass(frozen=True)
class LanguageFoundation(Foundation):
    """A policy fine-tuned on reviews drawn from the grammar, and pairs of its answers.

    Attributes:
      fine_tuning: the SFT stage; its `pairs` are reviews drawn from the grammar.
      pairs: pairs on the training prompts.
      held_out_pairs: pairs on the held-out prompts.
      answers: texts by which a policy is judged, for each held-out prompt.
      limit_answers: texts of the reference for each held-out prompt, for the limits.
    """

    reference_name: ClassVar[str] = SFT
    measures: ClassVar[tuple[str, ...]] = ("words", "malformed")
    measured_pairs: ClassVar[int] = 512
    snapshot_pairs: ClassVar[int] = 128

    fine_tuning: Stage
    pairs: int
    held_out_pairs: int
    answers: int
    limit_answers: int

    def lay(self, seed: int, store: Store) -> None:
        """Fine-tunes the policy, draws the pairs from it, judges it and finds the limits."""
        training, held_out = split_prompts(seed)
        prompts, reviews = write_corpus(training, self.fine_tuning.pairs, seed)
        policy = fine_tune(prompts, reviews, self.fine_tuning, seed)
        ground = LanguageGround(
            policy,
            draw_pairs(policy, training, self.pairs, seed, "training pairs"),
            draw_pairs(policy, held_out, self.held_out_pairs, seed, "held-out pairs"),
            held_out,
            self.answers,
        )
        save_ground(ground, store, seed, policy.state_dict())
        generator = seeds.generator(seed, "limits")
        rewards = draw_samples(policy, held_out, self.limit_answers, generator).rewards
        store.write(
            foundation_name(seed),
            {
                **judge(policy, policy, held_out, self.answers, seed, SFT),
                "limits": find_limits(rewards),
                **describe_pairs(ground.pairs, seed),
            },
        )

    def load(self, store: Store, seed: int) -> LanguageGround:
        """The fine-tuned policy and the pairs of a seed."""
        pairs, held_out_pairs, weights = load_kept(store, seed)
        policy = Policy()
        policy.load_state_dict(weights)
        _, held_out = split_prompts(seed)
        return LanguageGround(policy, pairs, held_out_pairs, held_out, self.answers)


@dataclass(frozen=True)
class LanguageGround(Ground):
    """A fine-tuned policy and pairs of its answers.

    Attributes:
      prompts: the held-out prompts.
      answers: texts by which a policy is judged, for each of them.
    """

    prompts: list[Prompt]
    answers: int

    def judge(self, policy: Policy, name: str) -> dict[str, Any]:
        """What a policy's own answers to the held-out prompts say of it."""
        return judge(policy, self.policy, self.prompts, self.answers, name)


# -------------------------------------------------------------------------- prompts, texts, policy


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


def fine_tune(prompts: Tensor, completions: Tensor, stage: Stage, seed: int) -> Policy:
    """Trains a new policy on texts, by their mean negative log-probability."""
    with torch.random.fork_rng():
        torch.manual_seed(seeds.number(seed, "weights"))
        policy = Policy()
    updater = Updater(policy.trained(), stage)
    for rows in draw_batches(len(prompts), stage, seeds.generator(seed, "fine-tuning order")):
        logps = completion_logps(policy, prompts[rows], completions[rows])
        updater.step(-logps.mean())
    return policy


# ------------------------------------------------------------------------------ answers and pairs


@dataclass(frozen=True)
class Samples:
    """What a policy wrote.

    Attributes:
      prompts: ids [P * n, 4]; each prompt n times.
      completions: ids [P * n, 40].
      rewards: true rewards [P, n].
      words: length of each text, full stops left out, [P, n].
      malformed: whether a text has a malformed token or no end, [P, n].
    """

    prompts: Tensor
    completions: Tensor
    rewards: np.ndarray
    words: np.ndarray
    malformed: np.ndarray

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the policy reads the texts from."""
        return {"prompts": self.prompts, "completions": self.completions}


def draw_samples(
    policy: Policy, prompts: Sequence[Prompt], each: int, generator: torch.Generator
) -> Samples:
    """Lets the policy answer every prompt `each` times, and judges the answers.

    Raises:
      FloatingPointError: the policy's logits are not finite.
    """
    ids = torch.tensor([encode(prompt.tokens) for prompt in prompts]).repeat_interleave(each, 0)
    completions = sample(policy, ids, generator)
    readings = [parse(decode(row)) for row in completions.tolist()]
    asked = [prompt for prompt in prompts for _ in range(each)]
    shape = (len(prompts), each)
    return Samples(
        ids,
        completions,
        np.reshape([reward(p, r) for p, r in zip(asked, readings, strict=True)], shape),
        np.reshape([r.words for r in readings], shape),
        np.reshape([r.malformed > 0 or not r.finished for r in readings], shape),
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
    answers = Answers(drawn.inputs, rewards, score(policy, drawn.inputs))
    pairs = Pairs(answers, 2 * kept, 2 * kept + 1)
    return pairs.flipped(pairs.gap < 0)


def judge(
    policy: Policy, reference: Policy, prompts: Sequence[Prompt], each: int, *names: object
) -> dict[str, Any]:
    """Means over a policy's answers, `each` to a prompt, seeded by `names`; see `Ground.judge`."""
    try:
        drawn = draw_samples(policy, prompts, each, seeds.generator("answers", *names))
    except FloatingPointError:
        nothing = dict.fromkeys(("reward", "kl", "words", "malformed"), math.nan)
        return {**nothing, "rewards": np.full((len(prompts), each), math.nan).tolist(), "texts": []}
    log_ratios = score(policy, drawn.inputs) - score(reference, drawn.inputs)
    texts = [
        f"{' '.join(prompt.tokens)} {' '.join(decode(drawn.completions[i * each].tolist()))}"
        for i, prompt in enumerate(prompts[:SHOWN_SAMPLES])
    ]
    return {
        "reward": float(drawn.rewards.mean()),
        "kl": log_ratios.double().mean().item(),
        "words": float(drawn.words.mean()),
        "malformed": float(drawn.malformed.mean()),
        "rewards": drawn.rewards.tolist(),
        "texts": texts,
    }
