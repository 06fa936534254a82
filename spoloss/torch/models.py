"""Heads of Transformers models: `head_of` compares them with the model's own logits.

A configuration does not say what a model computes: some models ignore a field that others use, and
some mask or rescale logits without a field. So the fields only propose heads. The model itself
decides: its decoder's output is replaced with random states, and its logits must be those of the
proposed head, for small logits as well as for logits that a soft-cap would change.

Numbers cannot show a new adapter, which does not change the logits yet. So the head must be exactly
a linear layer, and the model must not have a prompt that only its outer forward adds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spoloss.torch._arguments import Head

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SCALES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
"""The fields of a configuration that may hold a soft-cap, or a factor or divisor of the logits."""

LARGEST_LOGITS = (0.0, 1.0, 1.0, 30.0, 30.0, 30.0, 1000.0, 1000.0)
"""The largest logit of each probe, before scale and soft-cap. 0 shows what a model adds."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def head_of(model: Any) -> Head:
    """The head of a Transformers model, compared with the model's own logits.

        logits = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap)

    The hidden states are `model.get_decoder()(...).last_hidden_state`, also for a PEFT model, or
    equally those of a Transformers model's `base_model`. Call this once, before the training loop
    and before any wrapper (DDP, FSDP, DeepSpeed). It runs the model and its decoder on 8 tokens, in
    evaluation mode and without gradients. Modes and random state are afterwards as before.

    Under DDP, FSDP and DeepSpeed, read the weight inside the forward of the wrapped module, and put
    it into the head there: `dataclasses.replace(head, weight=...)`.

    Args:
      model: a causal language model of Transformers, or a PEFT model of one. LoRA, DoRA, IA3,
        `modules_to_save`, also of the head, and other adapters of the decoder are allowed.

    Returns:
      The head with the model's weight and bias themselves, not copies, and with its soft-cap and
      scale.

    Raises:
      TypeError: `model` has no head, or its head is not exactly an `nn.Linear` of plain numbers: it
        has an adapter, a hook or quantised weights.
      ValueError: the weights are not here (meta device, ZeRO-3, FSDP, several devices), the model
        has a prompt (prompt, prefix or P-tuning), or its logits are not those of a `Head`. The
        message says what differs.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    find = getattr(model, "get_output_embeddings", None)
    linear = None if find is None else _saved(find())
    if linear is None:
        raise TypeError(
            "model must be a Transformers model with a language-model head, got "
            f"{type(model).__name__}. Pass the model itself, not a wrapper such as DDP"
        )
    _refuse_distributed(model, linear)
    _refuse_prompts(model)
    _refuse_other_layers(linear)
    probe = _probe(linear.weight)
    logits, plain = _logits(model, probe, len(linear.weight)), _Plain.of(probe, linear)
    if logits.shape[1:] != plain.logits.shape:
        raise ValueError(
            f"the model's logits must have shape {tuple(plain.logits.shape)}, as its head has, "
            f"got {tuple(logits.shape[1:])}"
        )
    heads = [
        Head(linear.weight, linear.bias, softcap=softcap, logit_scale=scale)
        for softcap, scale in itertools.product(*_proposals(model))
    ]
    best = min(heads, key=lambda head: plain.errors(logits, head).norm())
    plain.check(logits, best)
    return best


def _refuse_distributed(model: Any, linear: Any) -> None:
    """Raise an error for weights that are not whole, or not all on one device."""
    weight = getattr(linear, "weight", None)
    wrapped = any(type(part).__name__ == "FullyShardedDataParallel" for part in model.modules())
    devices = sorted({str(device) for device in getattr(model, "hf_device_map", {}).values()})
    for refused, reason in (
        (hasattr(weight, "ds_id"), "DeepSpeed ZeRO-3 has partitioned the head's weight"),
        (hasattr(weight, "full_tensor"), "the head's weight is a sharded DTensor"),
        (wrapped, "FSDP has sharded the model"),
        (len(devices) > 1, f"device_map has spread the model over {', '.join(devices)}: use one"),
        (getattr(weight, "is_meta", False), "the head's weight is on the meta device: load it"),
    ):
        if refused:
            raise ValueError(
                f"{reason}. Call head_of while the weights are whole and on one device. Under FSDP "
                "or DeepSpeed you can also build a Head inside the wrapped module's forward"
            )


def _refuse_prompts(model: Any) -> None:
    """Raise an error for virtual tokens, which a call of the decoder would leave out."""
    for name, config in getattr(model, "peft_config", {}).items():
        if config.is_prompt_learning:
            raise ValueError(
                f"the adapter {name!r} is a {type(config).__name__}: the decoder's hidden states "
                "do not include its virtual tokens. Use the model's logits and sequence_logps"
            )


def _refuse_other_layers(linear: Any) -> None:
    """Raise an error for a head that is not exactly its weight and bias."""
    kind = type(linear) if type(linear) is not nn.Linear else type(linear.weight)
    if kind not in (nn.Parameter, Tensor):
        raise TypeError(
            "the head must be exactly an nn.Linear, without adapter, parametrization or "
            f"quantisation, got {kind.__module__}.{kind.__name__}"
        )
    if linear.weight.dtype not in DTYPES:
        raise TypeError(f"the head's weight must not be quantised, got {linear.weight.dtype}")
    if "forward" in vars(linear) or linear._forward_hooks or linear._forward_pre_hooks:
        raise TypeError("the head must have no hook and no forward of its own")


def _saved(module: Any) -> Any:
    """The layer that is used where PEFT trains a copy of the head (`modules_to_save`)."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    active = [name for name in module.active_adapters if name in copies]
    return copies[active[0]] if active and not module.disable_adapters else module.original_module


def _proposals(model: Any) -> tuple[list[float | None], list[float]]:
    """The soft-caps and scales that the configuration may mean, and none of each."""
    config = model.config.get_text_config()
    numbers = {name: getattr(config, name, None) for name in (*SOFTCAPS, *SCALES)}
    given = {name: float(x) for name, x in numbers.items() if isinstance(x, (int, float)) and x}
    softcaps = [given[name] for name in SOFTCAPS if given.get(name, 0.0) > 0.0]
    scales = [given[name] for name in SCALES if name in given]
    # Granite divides by logits_scaling, HyperCLOVA X multiplies by it.
    return [None, *softcaps], [1.0, *scales, *(1.0 / scale for scale in scales)]


def _logits(model: Any, probe: Tensor, entries: int) -> Tensor:
    """The model's logits, [1, n, V], with its decoder's output replaced by the probe, [1, n, D]."""
    decoder = model.get_decoder()
    core = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    parts = [decoder] if core.base_model in (core, decoder) else [decoder, core.base_model]
    # Not the first tokens: the embedding of a padding token is 0, which would hide a residual.
    ids = (entries // 2 + torch.arange(probe.shape[1], device=probe.device))[None] % entries
    met: list[Tensor] = []

    def replace(_: Any, __: Any, output: Any) -> Any:
        met.append(_hidden(output).clone())
        if isinstance(output, tuple):
            return (probe, *output[1:])
        output.last_hidden_state = probe
        return output

    alone = [_hidden(_run(part, ids, model)) for part in parts]
    for hidden in alone:
        if hidden.shape != probe.shape or hidden.dtype != probe.dtype:
            raise ValueError(
                f"the decoder's last hidden states must have shape {tuple(probe.shape)} and the "
                f"head's dtype {probe.dtype}, got {tuple(hidden.shape)} and {hidden.dtype}"
            )
    hook = decoder.register_forward_hook(replace)
    try:
        logits: Tensor = _run(model, ids, model).logits
    finally:
        hook.remove()
    if len(met) != 1:
        raise ValueError(f"model must call model.get_decoder() once, got {len(met)} calls")
    if not all(met[0].shape == hidden.shape and _close(met[0], hidden) for hidden in alone):
        raise ValueError(
            "the decoder's hidden states differ in a call of the whole model, which adds to its "
            "input. Use the model's logits and sequence_logps"
        )
    return logits


def _run(module: Any, ids: Tensor, model: Any) -> Any:
    """Call the model or a part in evaluation mode, with modes and random state as before."""
    modes = [(part, part.training) for part in model.modules()]
    try:
        model.eval()
        with (
            torch.no_grad(),
            torch.autocast(ids.device.type, enabled=False),
            torch.random.fork_rng([ids.device] if ids.is_cuda else []),
        ):
            return module(input_ids=ids, use_cache=False)
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} cannot be called with input_ids and use_cache alone: "
            f"{error}. Build a Head with what the model does"
        ) from error
    finally:
        for part, training in modes:
            part.training = training


def _hidden(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"model.get_decoder() must return last hidden states, got {type(output).__name__}"
        )
    return hidden


def _probe(weight: Tensor) -> Tensor:
    """Random hidden states [1, n, D] with LARGEST_LOGITS, in the weight's dtype."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(len(LARGEST_LOGITS), weight.shape[1], generator=generator).double()
    logits = [directions.to(rows.device) @ rows.t() for rows in _blocks(weight)]
    largest = torch.stack([block.abs().amax(1) for block in logits]).amax(0).cpu()
    # A weight of zeros gives no large logits, and float16 ends at 65,504.
    factor = (torch.tensor(LARGEST_LOGITS) / largest.clamp(min=1e-30)).clamp(max=1e4)
    return (directions * factor[:, None]).to(weight.device, weight.dtype)[None]


def _blocks(weight: Tensor) -> Iterator[Tensor]:
    """A weight's rows in float64, some at a time, because the weight may be large."""
    return map(_exact, torch.split(weight, 8192))


def _exact(tensor: Tensor) -> Tensor:
    """A tensor in float64, on the CPU unless its device is sure to have float64."""
    tensor = tensor.detach()
    return (tensor if tensor.device.type in ("cpu", "cuda") else tensor.cpu()).double()


class _Plain(NamedTuple):
    """hidden W^T + bias in float64, [n, V].

    Attributes:
      logits: the logits without scale and soft-cap.
      spread: the root of the sum of the squares of the products in each logit, and its bias: what
        rounding errors are proportional to.
      eps: the relative rounding error of a logit.
    """

    logits: Tensor
    spread: Tensor
    eps: float

    @classmethod
    def of(cls, probe: Tensor, linear: nn.Linear) -> _Plain:
        """For some hidden states [1, n, D]."""
        states, weight = _exact(probe[0]), linear.weight
        logits = torch.cat([states @ rows.t() for rows in _blocks(weight)], dim=1)
        squares = torch.cat([states**2 @ (rows**2).t() for rows in _blocks(weight)], dim=1)
        bias = torch.zeros_like(logits[0]) if linear.bias is None else _exact(linear.bias)
        wide = torch.promote_types(weight.dtype, torch.float32)
        # A sum of D terms, in float32 for half precision. A GPU may use TF32 for float32.
        summed = math.sqrt(weight.shape[1]) * torch.finfo(wide).eps
        reduced = wide == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        eps = torch.finfo(torch.bfloat16 if reduced else weight.dtype).eps
        return cls(logits + bias, squares.sqrt() + bias.abs(), max(eps, summed))

    def under(self, head: Head) -> Tensor:
        """The logits of a head."""
        logits = self.logits * head.logit_scale
        return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()

    def errors(self, logits: Tensor, head: Head) -> Tensor:
        """How far other logits are from a head's, in units of the rounding error."""
        size = (self.logits.abs() + self.spread) * (abs(head.logit_scale) * self.eps)
        errors = (_exact(logits[0]) - self.under(head)).abs()
        return (errors / size.clamp(min=torch.finfo(errors.dtype).tiny)).nan_to_num(math.inf)

    def check(self, logits: Tensor, head: Head) -> None:
        """Raise an error if other logits are not those of a head."""
        errors = self.errors(logits, head)
        if errors.square().mean() > 1.0 or errors.amax() > 8.0:
            token, entry = divmod(int(errors.argmax()), errors.shape[1])
            found, own = float(logits[0, token, entry]), float(self.under(head)[token, entry])
            raise ValueError(
                f"the model's logits are not those of its head, not even with logit_scale = "
                f"{head.logit_scale} and softcap = {head.softcap}: entry {entry} of the vocabulary "
                f"has the logit {found:.6g} in the model and {own:.6g} in the head. Build a Head "
                "with what the model does, or use its logits and sequence_logps"
            )


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two runs of the same computation agree."""
    size = _exact(b).norm().clamp(min=1e-30)
    return float((_exact(a) - _exact(b)).norm() / size) <= 32.0 * torch.finfo(b.dtype).eps
