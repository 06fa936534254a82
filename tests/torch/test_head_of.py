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
import transformers
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

from helpers.tiny_models import tiny_model
from spoloss.torch import Completions, Head, head_of, linear_logps, sequence_logps

# Transformers warns of itself when PEFT looks at its models.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")

IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def llama(kind: type[LlamaForCausalLM] = LlamaForCausalLM, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        **options,
    )
    return kind(config)


def check_same(model: Any, head: Head) -> None:
    """The log-probabilities of the model's own logits, without any code of `head_of`."""
    model.eval()
    with torch.no_grad():
        want = sequence_logps(model(input_ids=IDS, use_cache=False).logits, IDS)
        hidden = model.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state
        found = linear_logps(head, Completions(hidden, IDS))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0.0)


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
    check_same(model, head)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tolerance_is_the_dtypes(dtype: torch.dtype) -> None:
    for kind, scale, softcap in MODELS[3:5]:
        head = head_of(tiny_model(kind).to(dtype))
        assert (head.logit_scale, head.softcap) == (scale, softcap)


class Capped(LlamaForCausalLM):
    """A soft-cap that no field of the configuration names."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        out = super().forward(input_ids, **options)
        out.logits = 100.0 * (out.logits / 100.0).tanh()
        return out


class Scaled(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        out = super().forward(input_ids, **options)
        out.logits = out.logits * 1.05
        return out


class Masked(LlamaForCausalLM):
    """One entry of the vocabulary is never generated."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        out = super().forward(input_ids, **options)
        out.logits[..., 40] = -torch.inf
        return out


class Zeroed(LlamaForCausalLM):
    """One of very many entries, so that the mean error is small."""

    def __init__(self, config: LlamaConfig) -> None:
        config.vocab_size = 4096
        super().__init__(config)

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        out = super().forward(input_ids, **options)
        out.logits[..., 40] = 0.0
        return out


class Padded(LlamaForCausalLM):
    """The weight has more rows than there are logits."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        out = super().forward(input_ids, **options)
        out.logits = out.logits[..., :60]
        return out


class Residual(LlamaForCausalLM):
    """The head adds something that is no function of the last hidden states."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        out = super().forward(input_ids, **options)
        out.logits = out.logits + self.lm_head(self.get_input_embeddings()(input_ids))
        return out


class Shifted(LlamaForCausalLM):
    """The decoder gets another input in a call of the model."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        return super().forward((input_ids + 1) % 64, **options)


class Outer(nn.Module):
    """Hidden states for other uses, as a base model may return them."""

    def forward(self, **options: Any) -> Any:
        out = self.decoder(**options)
        out.last_hidden_state = out.last_hidden_state * 2.0
        return out


class OtherBase(LlamaForCausalLM):
    """Its base model's hidden states are not those of its decoder."""

    base_model_prefix = "outer"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.outer = Outer()
        self.outer.decoder = self.model

    def get_decoder(self) -> Any:
        return self.model


class Functional(LlamaForCausalLM):
    """The head is never called as a module."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        out = super().forward(input_ids, **options)
        hidden = self.model(input_ids, **options).last_hidden_state
        out.logits = F.linear(hidden, self.lm_head.weight)
        return out


class OtherCall(LlamaForCausalLM):
    """As `torch.compile` or a fused kernel may do it."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        hidden = self.model(input_ids, **options).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(
            logits=F.linear(hidden, self.lm_head.weight)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Capped, "the model's logits are not those of its head"),
        (Scaled, "the model's logits are not those of its head"),
        (Masked, "entry 40 of the vocabulary has the logit -inf in the model"),
        (Zeroed, "entry 40 of the vocabulary has the logit 0 in the model"),
        (Padded, r"the model's logits must have shape \(8, 64\), as its head has, got \(8, 60\)"),
        (Residual, "the model's logits are not those of its head"),
        (Shifted, "the decoder's hidden states differ in a call of the whole model"),
        (OtherBase, "the decoder's hidden states differ in a call of the whole model"),
        (Functional, "model must call model.get_decoder.. once, got 2 calls"),
    ],
)
def test_what_a_model_does_beside_its_head(
    kind: type[LlamaForCausalLM], words: str, dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match=words):
        head_of(llama(kind).to(dtype))


def test_a_model_that_does_not_call_its_head() -> None:
    model = llama(OtherCall)
    check_same(model, head_of(model))


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
    model = llama(Scaled).train()
    with pytest.raises(ValueError, match="the model's logits"):
        head_of(model)
    assert all(part.training for part in model.modules())
    assert not any(part._forward_hooks for part in model.modules())


def test_autocast_around_the_call_changes_nothing() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head_of(llama()).logit_scale == 1.0


# Adapters


def perturbed(model: Any) -> Any:
    """As if it had been trained: a new adapter changes nothing."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]}],
    ids=str,
)
def test_adapters_of_the_decoder(options: dict[str, Any], *, trained: bool) -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], **options))
    model = perturbed(model) if trained else model
    head = head_of(model)
    assert head.weight.requires_grad == ("modules_to_save" in options)
    check_same(model, head)
    if "modules_to_save" in options:
        with model.disable_adapter():
            assert head_of(model).weight is not head.weight


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(target_modules=["q_proj", "lm_head"]),
        peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_a_new_adapter_on_the_head(config: Any) -> None:
    """It changes no number yet."""
    with pytest.raises(TypeError, match=r"the head must be exactly an nn.Linear.*, got peft\."):
        head_of(peft.get_peft_model(llama(), config))


def test_trained_tokens_of_a_tied_head() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5])
    model = peft.get_peft_model(llama(tie_word_embeddings=True), config)
    with pytest.raises(TypeError, match="the head must be exactly an nn"):
        head_of(model)


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8
        ),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_prompts(config: Any) -> None:
    model = peft.get_peft_model(llama(), config)
    with pytest.raises(ValueError, match="the decoder's hidden states do not include its virtual"):
        head_of(model)


# Weights that are not here, or are not plain


def marked(name: str, value: Any) -> Callable[[LlamaForCausalLM], Any]:
    def mark(model: LlamaForCausalLM) -> Any:
        setattr(model.lm_head.weight, name, value)
        return model

    return mark


class FullyShardedDataParallel(nn.Module):
    """A stand-in with the name of FSDP."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.module = model
        self.get_output_embeddings = model.get_output_embeddings


class Linear4bit(nn.Linear):
    """A stand-in for a quantised layer."""


def with_layer(layer: nn.Module) -> Callable[[LlamaForCausalLM], Any]:
    def change(model: LlamaForCausalLM) -> Any:
        model.lm_head = layer
        return model

    return change


def hooked(model: LlamaForCausalLM) -> Any:
    model.lm_head.register_forward_pre_hook(lambda module, args: None)  # noqa: ARG005
    return model


def overridden(model: LlamaForCausalLM) -> Any:
    model.lm_head.forward = lambda states: F.linear(states, model.lm_head.weight)
    return model


def spread(model: LlamaForCausalLM) -> Any:
    model.hf_device_map = {"model.layers.0": 0, "lm_head": "cpu"}
    return model


def pruned(model: LlamaForCausalLM) -> Any:
    nn.utils.prune.random_unstructured(model.lm_head, "weight", amount=0.0)
    return model


def parametrized(model: LlamaForCausalLM) -> Any:
    nn.utils.parametrizations.orthogonal(model.lm_head)
    return model


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (marked("ds_id", 3), ValueError, "DeepSpeed ZeRO-3"),
        (marked("full_tensor", None), ValueError, "a sharded DTensor"),
        (FullyShardedDataParallel, ValueError, "FSDP"),
        (spread, ValueError, "device_map has spread the model over 0, cpu"),
        (lambda model: model.to("meta"), ValueError, "the meta device"),
        (with_layer(Linear4bit(32, 64)), TypeError, r"quantisation, got .*Linear4bit"),
        (lambda model: model.to(torch.float8_e4m3fn), TypeError, "quantised, got torch.float8"),
        (hooked, TypeError, "no hook and no forward of its own"),
        (overridden, TypeError, "no hook and no forward of its own"),
        (pruned, TypeError, "exactly an nn.Linear|no hook"),
        (parametrized, TypeError, "exactly an nn.Linear, .*Parametrized"),
        (lambda model: model.model, TypeError, "a language-model head, got LlamaModel"),
        (lambda model: nn.ModuleList([model]), TypeError, "a wrapper such as DDP"),
    ],
)
def test_heads_that_are_not_plain_weights(
    change: Callable[[Any], Any], error: type[Exception], words: str
) -> None:
    model = change(llama())
    with pytest.raises(error, match=words):
        head_of(model)


def test_a_compiled_model_is_the_model_itself() -> None:
    model = llama()
    assert head_of(torch.compile(model, backend="eager")).weight is model.lm_head.weight
