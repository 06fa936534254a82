"""How good a policy is: samples and their true reward, win rates, KL, margins, and the limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

import torch
from benchmarks.alignment import seeds
from benchmarks.alignment.language import Prompt, decode, encode, parse, reward
from benchmarks.alignment.model import Policy, sample
from benchmarks.alignment.training import SCORING_ROWS, Pairs, pair_logps, score
from spoloss import log_ratio_margin, preference_metrics
from torch import Tensor

SHOWN_SAMPLES = 3
QUANTILES = (0.1, 0.5, 0.9)
BEST_OF = (1, 2, 4, 8, 16, 32, 64)
OPTIMUM_BETAS = (4.0, 2.0, 1.4, 1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15)
LEAST_EFFECTIVE_SAMPLES = 35.0


# ---------------------------------------------------------------------------------------- samples


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


def judge(
    policy: Policy, reference: Policy, prompts: Sequence[Prompt], each: int, *names: object
) -> dict[str, object]:
    """What a policy's own answers say of it.

    Args:
      policy: the policy.
      reference: what its divergence is measured from.
      prompts: the held-out prompts.
      each: answers to each of them.
      names: of the policy. They seed its answers, so that no two policies share random numbers:
        with shared ones, policies that are nearly alike give the same text, and ties hide which
        of them is better.

    Returns:
      Means over the answers, and the reward of every one. All nan where the policy's logits are
      not finite.
    """
    try:
        drawn = draw_samples(policy, prompts, each, seeds.generator("answers", *names))
    except FloatingPointError:
        nothing = dict.fromkeys(("reward", "kl", "words", "malformed"), math.nan)
        return {**nothing, "rewards": np.full((len(prompts), each), math.nan).tolist(), "texts": []}
    log_ratios = score(policy, drawn.prompts, drawn.completions) - score(
        reference, drawn.prompts, drawn.completions
    )
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


# -------------------------------------------------------------------------------------- win rates


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How often a text of ours has the greater reward, ties counted half.

    Args:
      ours: rewards [P, n] of n texts for each of P prompts.
      theirs: likewise, for the same prompts.

    Returns:
      The mean over prompts and over all pairs of texts of unequal number; nan if a reward is.
    """
    if np.isnan(ours).any() or np.isnan(theirs).any():
        return math.nan
    a, b = ours[:, :, None], theirs[:, None, :]
    wins = (a > b) + 0.5 * (a == b)
    unequal = ~np.eye(ours.shape[1], dtype=bool)
    return float(wins[:, unequal].mean())


# ---------------------------------------------------------------------------------------- margins


@torch.no_grad()
def measure_pairs(policy: Policy, pairs: Pairs, beta: float) -> dict[str, float]:
    """Implicit reward margins x = beta * h of pairs, and how far their log-probabilities moved."""
    starts = range(0, len(pairs), SCORING_ROWS)
    parts = [pairs[start : start + SCORING_ROWS] for start in starts]
    gathered = zip(*(pair_logps(policy, part) for part in parts), strict=True)
    pc, pr, rc, rr = (torch.cat(tensors).double() for tensors in gathered)
    x = beta * log_ratio_margin(pc, pr, rc, rr)
    metrics = preference_metrics(pc, pr, rc, rr, beta=beta)
    low, median, high = torch.quantile(x, torch.tensor(QUANTILES, dtype=x.dtype)).tolist()
    return {
        "x_mean": metrics["rewards/margins"].item(),
        "x_sd": x.std().item(),
        "x_q10": low,
        "x_q50": median,
        "x_q90": high,
        "x_below_0": metrics["rewards/margins_below_0"].item(),
        "x_above_1": metrics["rewards/margins_above_1"].item(),
        "x_near_1": ((x - 1.0).abs() <= 0.1).double().mean().item(),
        "accuracy": metrics["rewards/accuracies"].item(),
        "dlogp_chosen": (metrics["logps/chosen"] - rc.mean()).item(),
        "dlogp_rejected": (metrics["logps/rejected"] - rr.mean()).item(),
    }


# ----------------------------------------------------------------------------------------- limits


@dataclass(frozen=True)
class Limit:
    """A point of a curve that no loss is behind.

    Attributes:
      curve: "optimum" is pi_ref * e^(r / beta) at beta = parameter; "best of n" keeps the best of
        n = parameter texts of the reference.
      parameter: see `curve`.
      reward: expected true reward.
      kl: divergence from the reference, nats; of best of n its upper bound log n - (n - 1) / n.
      effective_samples: of the prompt where the weights leave fewest.
    """

    curve: str
    parameter: float
    reward: float
    kl: float
    effective_samples: float


def find_limits(rewards: np.ndarray) -> list[dict[str, object]]:
    """The optimum and best of n, from rewards [P, M] of M texts of the reference a prompt."""
    optimum = [tilt(rewards, beta) for beta in OPTIMUM_BETAS]
    kept = [limit for limit in optimum if limit.effective_samples >= LEAST_EFFECTIVE_SAMPLES]
    return [asdict(limit) for limit in (*kept, *(best_of(rewards, n) for n in BEST_OF))]


def tilt(rewards: np.ndarray, beta: float) -> Limit:
    """The exact optimum of the regularised objective, by importance weights e^(r / beta)."""
    scaled = rewards / beta
    greatest = scaled.max(1, keepdims=True)
    weights = np.exp(scaled - greatest)
    log_partition = np.log(weights.mean(1)) + greatest[:, 0]
    weights /= weights.sum(1, keepdims=True)
    mean = (weights * rewards).sum(1)
    kl = mean / beta - log_partition
    effective = 1.0 / (weights**2).sum(1)
    return Limit("optimum", beta, float(mean.mean()), float(kl.mean()), float(effective.min()))


def best_of(rewards: np.ndarray, n: int) -> Limit:
    """The best of n texts: the expected greatest of n draws from the texts at hand."""
    ordered = np.sort(rewards, axis=1)
    rank = np.arange(rewards.shape[1] + 1) / rewards.shape[1]
    greatest = (ordered * np.diff(rank**n)).sum(1)
    kl = math.log(n) - (n - 1) / n
    return Limit("best of n", n, float(greatest.mean()), kl, rewards.shape[1] / n)
