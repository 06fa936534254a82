"""`head_of` on small models: the right head or an error, and nothing of the model changes.

Every causal language model of Transformers and every method of PEFT are in the extended tier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn
from transformers import (
    CohereForCausalLM,
    Gemma2ForCausalLM,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiForCausalLM,
    RecurrentGemmaForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput

from helpers.tiny_models import check_head, llama, tiny_model
from spoloss.torch import head_of

# Transformers warns of itself when PEFT looks at its models.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MODELS = [
    (LlamaForCausalLM, 1.0, None),
    (PhiForCausalLM, 1.0, None),  # with a bias
    (CohereForCausalLM, 0.25, None),
    (GraniteForCausalLM, 1 / 8.0, None),
    (Gemma2ForCausalLM, 1.0, 5.0),
    (RecurrentGemmaForCausalLM, 1.0, 5.0),
]


@pytest.mark.parametrize(("kind", "scale", "softcap"), MODELS)
def test_models(kind: Any, scale: float, softcap: float | None) -> None:
    model = tiny_model(kind)
    head = head_of(model)
    assert (head.logit_scale, head.softcap) == (scale, softcap)
    linear = model.get_output_embeddings()
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    assert (head.bias is not None) == (kind is PhiForCausalLM)
    check_head(model, head)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tolerance_is_the_dtypes(dtype: torch.dtype) -> None:
    for kind, scale, softcap in MODELS[3:5]:
        head = head_of(tiny_model(kind).to(dtype))
        assert (head.logit_scale, head.softcap) == (scale, softcap)


class Rounded(LlamaForCausalLM):
    """Rounds the factors of its products, as a GPU may."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        hidden, weight = self.model(input_ids, **options).last_hidden_state, self.lm_head.weight
        return CausalLMOutput(logits=F.linear(*(x.bfloat16().float() for x in (hidden, weight))))


def test_the_tolerance_is_that_of_pytorchs_products(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="the model's logits are not those of its head"):
        head_of(llama(Rounded))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert head_of(llama(Rounded)).logit_scale == 1.0
    with pytest.raises(ValueError, match="the model's logits are not those of its head"):
        head_of(llama(Rounded).double())


# Models that do something beside their head


def changed(change: Callable[[Any, Tensor, Tensor], Tensor]) -> type[LlamaForCausalLM]:
    """A model that changes its logits: a function of the model, its input and the logits."""

    class Changed(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **options: Any) -> Any:
            out = super().forward(input_ids, **options)
            out.logits = change(self, input_ids, out.logits)
            return out

    return Changed


def entry_40(value: float) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """One of very many entries, so that the mean error is small."""
    return lambda _, __, logits: logits.index_fill(-1, torch.tensor(40), value)


class Shifted(LlamaForCausalLM):
    """The decoder gets another input in a call of the model."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        return super().forward((input_ids + 1) % self.config.vocab_size, **options)


class Outer(nn.Module):
    """Hidden states for other uses, as a base model may return them."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, **options: Any) -> Any:
        out = self.decoder(**options)
        out.last_hidden_state = out.last_hidden_state * 2.0
        return out


class OtherBase(LlamaForCausalLM):
    """Its base model's hidden states are not those of its decoder."""

    base_model_prefix = "outer"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.outer = Outer(self.model)

    def get_decoder(self) -> Any:
        return self.model


SCALED = changed(lambda _, __, logits: 1.05 * logits)
OTHERS = "the model's logits are not those of its head"
SHAPE = r"the model's logits must have shape \(8, 4096\), as its head has, got \(8, 4092\)"
STATES = "the decoder's hidden states differ in a call of the whole model"
BESIDE = {
    "a soft-cap without a field": (changed(lambda _, __, z: 100.0 * (z / 100.0).tanh()), OTHERS),
    "a scale without a field": (SCALED, OTHERS),
    "an entry that is never generated": (changed(entry_40(-torch.inf)), "entry 40 .* logit -inf"),
    "an entry of 0": (changed(entry_40(0.0)), "entry 40 of the vocabulary has the logit 0 in the"),
    "a padded weight": (changed(lambda _, __, logits: logits[..., :-4]), SHAPE),
    "a residual": (
        changed(lambda model, ids, z: z + model.lm_head(model.get_input_embeddings()(ids))),
        OTHERS,
    ),
    "another input": (Shifted, STATES),
    "another base model": (OtherBase, STATES),
    "the decoder again": (
        changed(lambda model, ids, _: model.lm_head(model.model(ids).last_hidden_state)),
        "model must call model.get_decoder.. once, got 2 calls",
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BESIDE)
def test_what_a_model_does_beside_its_head(name: str, dtype: torch.dtype) -> None:
    kind, words = BESIDE[name]
    with pytest.raises(ValueError, match=words):
        head_of(llama(kind, vocab_size=4096).to(dtype))


class OtherCall(LlamaForCausalLM):
    """As `torch.compile` or a fused kernel may do it."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        hidden = self.model(input_ids, **options).last_hidden_state
        return CausalLMOutput(logits=F.linear(hidden, self.lm_head.weight))


def test_a_model_that_does_not_call_its_head() -> None:
    model = llama(OtherCall)
    check_head(model, head_of(model))


# What is the same afterwards


def test_nothing_of_the_model_changes() -> None:
    model = llama(attention_dropout=0.5).train()
    model.model.norm.eval()
    # Some models draw random numbers in evaluation mode too.
    noise = model.model.norm.register_forward_hook(lambda _, __, out: out + torch.randn_like(out))
    modes = [part.training for part in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    head_of(model)
    noise.remove()
    assert torch.equal(torch.get_rng_state(), before)
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(part._forward_hooks for part in model.modules())


def test_modes_are_restored_after_an_error() -> None:
    model = llama(SCALED).train()
    with pytest.raises(ValueError, match=OTHERS):
        head_of(model)
    assert all(part.training for part in model.modules())
    assert not any(part._forward_hooks for part in model.modules())


def test_autocast_around_the_call_changes_nothing() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head_of(llama()).logit_scale == 1.0


def test_a_compiled_model_is_the_model_itself() -> None:
    model = llama()
    assert head_of(torch.compile(model, backend="eager")).weight is model.lm_head.weight


# Adapters


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]}],
    ids=str,
)
def test_adapters_of_the_decoder(options: dict[str, Any], *, trained: bool) -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], **options))
    if trained:  # a new adapter changes nothing
        for parameter in filter(lambda each: each.requires_grad, model.parameters()):
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    head = head_of(model)
    assert head.weight.requires_grad == ("modules_to_save" in options)
    check_head(model, head)
    if "modules_to_save" in options:
        with model.disable_adapter():
            assert head_of(model).weight is not head.weight


NO_LINEAR = r"the head must be exactly an nn.Linear.*, got peft\."


@pytest.mark.parametrize(
    ("config", "tied", "error", "words"),
    [
        # A new adapter changes no number yet.
        (peft.LoraConfig(target_modules=["q_proj", "lm_head"]), False, TypeError, NO_LINEAR),
        (
            peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5]),
            *(True, TypeError, NO_LINEAR),
        ),
        (
            peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
            *(False, ValueError, "the decoder's hidden states do not include its virtual tokens"),
        ),
    ],
    ids=["on the head", "of tokens of a tied head", "a prompt"],
)
def test_adapters_that_the_head_does_not_show(
    config: peft.PeftConfig, error: type[Exception], words: str, *, tied: bool
) -> None:
    with pytest.raises(error, match=words):
        head_of(peft.get_peft_model(llama(tie_word_embeddings=tied), config))


# Weights that are not here, or are not plain


class FullyShardedDataParallel(nn.Module):
    """A stand-in with the name of FSDP."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.module = model
        self.get_output_embeddings = model.get_output_embeddings


class Linear4bit(nn.Linear):
    """A stand-in for a quantised layer."""


SPREAD = {"model.layers.0": 0, "lm_head": "cpu"}
HOOK = "no hook and no forward of its own"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda model: setattr(model.lm_head.weight, "ds_id", 3), ValueError, "DeepSpeed ZeRO-3"),
        (
            lambda model: setattr(model.lm_head.weight, "full_tensor", None),
            *(ValueError, "a sharded DTensor"),
        ),
        (
            lambda model: setattr(model, "hf_device_map", SPREAD),
            *(ValueError, "device_map has spread the model over 0, cpu"),
        ),
        (lambda model: model.to("meta"), ValueError, "the meta device"),
        (
            lambda model: setattr(model, "lm_head", Linear4bit(32, 64)),
            *(TypeError, r"quantisation, got .*Linear4bit"),
        ),
        (lambda model: model.to(torch.float8_e4m3fn), TypeError, "quantised, got torch.float8"),
        (lambda model: model.lm_head.register_forward_pre_hook(print), TypeError, HOOK),
        (lambda model: setattr(model.lm_head, "forward", F.relu), TypeError, HOOK),
        (
            lambda model: nn.utils.prune.random_unstructured(model.lm_head, "weight", amount=0.0),
            *(TypeError, "exactly an nn.Linear|no hook"),
        ),
        (
            lambda model: nn.utils.parametrizations.orthogonal(model.lm_head),
            *(TypeError, "exactly an nn.Linear, .*Parametrized"),
        ),
    ],
)
def test_heads_that_are_not_plain_weights(
    change: Callable[[Any], Any], error: type[Exception], words: str
) -> None:
    model = llama()
    change(model)
    with pytest.raises(error, match=words):
        head_of(model)


@pytest.mark.parametrize(
    ("other", "error", "words"),
    [
        (FullyShardedDataParallel, ValueError, "FSDP"),
        (lambda model: nn.ModuleList([model]), TypeError, "a wrapper such as DDP"),
        (lambda model: model.model, TypeError, "a language-model head, got LlamaModel"),
    ],
)
def test_what_is_not_the_model_itself(
    other: Callable[[Any], Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        head_of(other(llama()))
