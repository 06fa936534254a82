"""A pretrained Llama model as a policy: its lower blocks frozen, its last blocks trained.

The frozen blocks give the same hidden states in every step of every arm. So they run once, when
the reference writes its answers, and the policy reads the states that they left.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.studies import InputError
from benchmarks.studies.arms import Arm
from benchmarks.studies.training import PairLoss, Pairs
from spoloss import log_ratio_margin
from spoloss.torch import Completions, Head, linear_logps, linear_pair_loss

if TYPE_CHECKING:
    from torch.nn import Parameter
    from typing_extensions import Self

TRAINED_BLOCKS = 2
IGNORED = -100
SENTENCE_ENDS = (".", "!", "?", "\n")


@dataclass(frozen=True, eq=False)
class Base:
    """What all policies share: the frozen part of a pretrained model, and its tokenizer.

    Attributes:
      tokenizer: of the model.
      lower: the embedding and all but the last blocks.
      top: the last blocks and the final norm, as they were pretrained.
      head: the head's weight, [V, D].
    """

    tokenizer: PreTrainedTokenizerBase
    lower: LlamaModel
    top: LlamaModel
    head: Tensor

    @cached_property
    def ends(self) -> Tensor:
        """Whether a token ends an answer: the end of a sentence, a line or the text, [V]."""
        texts = self.tokenizer.batch_decode([[token] for token in range(len(self.head))])
        ends = torch.tensor([text.rstrip(" ").endswith(SENTENCE_ENDS) for text in texts])
        ends[self.tokenizer.all_special_ids] = True
        return ends

    @cached_property
    def description(self) -> str:
        """The model in one line: what it is, and a fingerprint of its weights."""
        blocks = [*self.lower.layers, *self.top.layers]
        digest = hashlib.sha256(self.head.numpy().tobytes())
        for block in (blocks[0], blocks[-1]):
            digest.update(block.mlp.down_proj.weight.detach().numpy().tobytes())
        width, vocabulary = self.head.shape[1], self.head.shape[0]
        return (
            f"Llama of {len(blocks)} blocks, width {width}, vocabulary {vocabulary}, "
            f"weights {digest.hexdigest()[:12]}"
        )


@lru_cache(maxsize=1)
def load_base(model: str) -> Base:
    """Reads a pretrained model.

    Args:
      model: a Transformers folder, or a name on the Hugging Face Hub.

    Raises:
      InputError: it is no Llama of more than two blocks.
    """
    disable_progress_bar()  # the experiment has its own
    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if not isinstance(whole, LlamaForCausalLM) or len(whole.model.layers) <= TRAINED_BLOCKS:
        raise InputError(
            f"--model {model}: expected a Llama of more than {TRAINED_BLOCKS} blocks, "
            f"got {type(whole).__name__} of {whole.config.num_hidden_layers}"
        )
    whole.eval().requires_grad_(False)
    split = len(whole.model.layers) - TRAINED_BLOCKS
    lower, top = slice_blocks(whole.model, 0, split), slice_blocks(whole.model, split, None)
    lower.norm = torch.nn.Identity()
    return Base(tokenizer, lower, top, whole.lm_head.weight)


def slice_blocks(model: LlamaModel, start: int, stop: int | None) -> LlamaModel:
    """A model of some of the blocks; it shares their weights."""
    part = copy.copy(model)
    part._modules = dict(model._modules)
    blocks = [copy.copy(block) for block in model.layers[start:stop]]
    for index, block in enumerate(blocks):
        # A block finds its keys and values in the cache by its place in the model.
        block._modules = dict(block._modules)
        block.self_attn = copy.copy(block.self_attn)
        block.self_attn.layer_idx = index
    part.layers = torch.nn.ModuleList(blocks)
    part.config = copy.deepcopy(model.config)
    part.config.num_hidden_layers = len(blocks)
    return part


class TopBlocks:
    """A policy: its own last blocks on what the frozen ones leave."""

    def __init__(self, base: Base, top: LlamaModel) -> None:
        self.base, self.top = base, top

    def copy(self) -> Self:
        """A policy of its own with the same weights, whose last blocks can be trained."""
        policy = type(self)(self.base, copy.deepcopy(self.top))
        for parameter in policy.trained():
            parameter.requires_grad_(True)
        return policy

    def trained(self) -> list[Parameter]:
        """The parameters of the last blocks; the final norm and the head stay."""
        return list(self.top.layers.parameters())

    def hidden(self, states: Tensor) -> Tensor:
        """Last hidden states [M, T, D] of the frozen blocks' states [M, T, D]."""
        return self.top(inputs_embeds=states, use_cache=False).last_hidden_state

    def logps(self, inputs: dict[str, Tensor]) -> Tensor:
        """Log-probabilities of answers, nats, [M], from states [M, T, D] and labels [M, T]."""
        states, labels = trim(inputs)
        completions = Completions(self.hidden(states), labels, shift=False)
        return linear_logps(Head(self.base.head), completions)

    def pair_loss(self, arm: Arm, pairs: Pairs) -> PairLoss:
        """The arm's loss of a batch, each term in one pass over the vocabulary, and its margins."""
        states, labels = trim(pairs.inputs)
        both = zip(self.hidden(states).chunk(2), labels.chunk(2), strict=True)
        sides = [Completions(*side, shift=False) for side in both]
        made = [
            linear_pair_loss(
                arm.margin_loss,
                Head(self.base.head),
                *sides[:: term.order],
                *pairs.references[:: term.order],
                beta=term.beta,
                weights=term.weights,
            )
            for term in arm.terms(pairs.gap)
        ]
        logps = made[0].chosen_logps, made[0].rejected_logps
        loss = torch.stack([each.loss for each in made]).sum()
        return PairLoss(loss, log_ratio_margin(*logps, *pairs.references))


def reference_policy(model: str) -> TopBlocks:
    """The pretrained model as a policy."""
    base = load_base(model)
    return TopBlocks(base, base.top)


def trim(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """States and labels without the columns that are padding in all rows."""
    states, labels = inputs["states"], inputs["labels"]
    used = int((labels != IGNORED).any(0).nonzero().max()) + 1
    return states[:, :used], labels[:, :used]


# ---------------------------------------------------------------------------------------- sampling


class Written(NamedTuple):
    """Answers of a policy to prompts, prompt by prompt, each prompt's one after another.

    Attributes:
      states: what the frozen blocks leave, [M, T, D].
      labels: for each state the next token of the answer, [M, T]; elsewhere `IGNORED`.
      logps: log-probabilities under the policy that wrote them, nats, [M].
      reference: those under the pretrained model, nats, [M].
    """

    states: Tensor
    labels: Tensor
    logps: Tensor
    reference: Tensor


@torch.no_grad()
def write_answers(
    policy: TopBlocks,
    prompts: Sequence[list[int]],
    each: int,
    length: int,
    width: int,
    generator: torch.Generator,
) -> Written:
    """Draws answers at temperature 1; an answer ends with its first sentence.

    Args:
      policy: the writer.
      prompts: token ids; all of one length.
      each: answers to every prompt.
      length: tokens after which an answer is cut off.
      width: T of the tensors that are returned.
      generator: draws the tokens.

    Raises:
      FloatingPointError: the policy's logits are not finite.
    """
    base, number = policy.base, len(prompts) * each
    place = len(prompts[0]) - 1
    states = torch.zeros(number, width, base.head.shape[1])
    labels = torch.full((number, width), IGNORED)
    logps, reference = (torch.zeros(number, dtype=torch.float64) for _ in range(2))
    lower = Stack(base.lower)
    tops = [Stack(top) for top in dict.fromkeys((policy.top, base.top))]

    # A prompt is read once, whatever the number of its answers.
    below = lower.advance(base.lower.embed_tokens(torch.tensor(prompts)))
    last = [top.advance(below).repeat_interleave(each, 0) for top in tops]
    for stack in (lower, *tops):
        stack.cache.batch_repeat_interleave(each)
    states[:, : place + 1] = below.repeat_interleave(each, 0)
    running = torch.arange(number)
    for left in reversed(range(length)):
        logits = [hidden[:, -1] @ base.head.T for hidden in last]
        if not torch.isfinite(logits[0]).all():
            raise FloatingPointError("the policy's logits are not finite")
        log_softmax = [each_logits.log_softmax(1) for each_logits in logits]
        ids = torch.multinomial(log_softmax[0].exp(), 1, generator=generator)
        labels[running, place] = ids[:, 0]
        logps[running] += log_softmax[0].gather(1, ids)[:, 0]
        reference[running] += log_softmax[-1].gather(1, ids)[:, 0]
        going = ~base.ends[ids[:, 0]]
        if left == 0 or not going.any():
            break
        running, ids, place = running[going], ids[going], place + 1
        for stack in (lower, *tops):
            stack.cache.batch_select_indices(going.nonzero()[:, 0])
        below = lower.advance(base.lower.embed_tokens(ids))
        states[running, place] = below[:, -1]
        last = [top.advance(below) for top in tops]
    return Written(states, labels, logps, reference)


class Stack:
    """Blocks with the keys and values of what they have read."""

    def __init__(self, blocks: LlamaModel) -> None:
        self.blocks = blocks
        self.cache = DynamicCache(config=blocks.config)

    def advance(self, states: Tensor) -> Tensor:
        """Reads further states [M, T, D] and gives those that the blocks leave."""
        return self.blocks(
            inputs_embeds=states, past_key_values=self.cache, use_cache=True
        ).last_hidden_state
