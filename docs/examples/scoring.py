"""Log-probabilities of completions under a model, from its logits or with the fused head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from arguments import Options
from errors import InputError
from spoloss.torch import linear_logps, sequence_logps
from tokens import Batch, ScoredPair, TokenPair, pad_pairs


class PairLogps(NamedTuple):
    """The log-probabilities of the chosen and of the rejected completions, nats, [B] each."""

    chosen: Tensor
    rejected: Tensor


def completion_logps(model: PreTrainedModel, batch: Batch, *, fused: bool) -> Tensor:
    """Returns the log-probability of each text's completion, nats, [texts]."""
    if fused:
        return linear_logps(hidden_states(model, batch), head_weight(model), batch.labels)
    # With a large vocabulary these logits need most of the memory; --fused never holds them.
    logits = model(batch.ids, attention_mask=batch.mask).logits
    return sequence_logps(logits, batch.labels)


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Returns the last hidden states, the input of the head, [texts, longest, width]."""
    return model.get_decoder()(batch.ids, attention_mask=batch.mask).last_hidden_state


def head_weight(model: PreTrainedModel) -> Tensor:
    """Returns the weight of the language-model head, [vocabulary, width]."""
    return model.get_output_embeddings().weight


@torch.no_grad()
def check_head(model: PreTrainedModel, pairs: Sequence[TokenPair]) -> None:
    """Raises an error if the model's head has more than a weight, such as a bias or a soft-cap."""
    batch = pad_pairs(pairs, model.device)
    by_logits, by_tiles = (completion_logps(model, batch, fused=fused) for fused in (False, True))
    if not torch.allclose(by_logits, by_tiles, rtol=1e-2, atol=1e-2):
        raise InputError(
            "--fused: expected a head that is hidden @ weight.T, got a head with more than that: "
            "pass its bias, softcap or logit_scale to linear_logps and linear_pair_loss"
        )


@torch.no_grad()
def score_pairs(
    model: PreTrainedModel,
    pairs: Sequence[TokenPair],
    options: Options,
    title: str,
    *,
    delay: float = 0.0,
) -> PairLogps:
    """Scores any number of pairs without gradients, --batch-size pairs at a time.

    Args:
      model: the policy or the reference.
      pairs: the pairs to score.
      options: the command line.
      title: the name of the progress bar.
      delay: the seconds after which the bar appears.

    Returns:
      The log-probabilities, in the order of the pairs.
    """
    logps = torch.empty(2, len(pairs), device=model.device)
    # Sorted by length, so that batches have little padding. The longest pairs come first.
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].length, reverse=True)
    with tqdm(total=len(pairs), desc=title, unit="pair", leave=False, delay=delay) as progress:
        for start in range(0, len(order), options.batch_size):
            rows = order[start : start + options.batch_size]
            batch = pad_pairs([pairs[i] for i in rows], model.device)
            logps[:, rows] = completion_logps(model, batch, fused=options.fused).view(2, -1)
            progress.update(len(rows))
    return PairLogps(*logps)


def score_by_reference(
    reference: PreTrainedModel, pairs: Sequence[TokenPair], options: Options, title: str
) -> list[ScoredPair]:
    """Returns the pairs with the log-probabilities of their completions under the reference."""
    logps = score_pairs(reference, pairs, options, title)
    return [
        ScoredPair(**vars(pair), reference_chosen=chosen, reference_rejected=rejected)
        for pair, chosen, rejected in zip(
            pairs, logps.chosen.tolist(), logps.rejected.tolist(), strict=True
        )
    ]


def reference_logps(pairs: Sequence[ScoredPair], device: torch.device | str) -> PairLogps:
    """Returns the log-probabilities under the reference as tensors."""
    chosen = torch.tensor([pair.reference_chosen for pair in pairs], device=device)
    rejected = torch.tensor([pair.reference_rejected for pair in pairs], device=device)
    return PairLogps(chosen, rejected)
