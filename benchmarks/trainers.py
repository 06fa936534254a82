"""Time and peak memory of a training step in TRL's DPOTrainer, loss by loss.

    pip install -c constraints.txt ".[test]" liger-kernel
    python -m benchmarks.studies smollm2 FOLDER               a model of 135M parameters
    python -m benchmarks.trainers --model FOLDER              results/trainers_cpu.csv

A step is TRL's: hidden states of policy and reference, the loss, the backward pass through all
weights, AdamW. Every measurement is a fresh process: one step warms up (and compiles Liger's
kernel), then the fastest of the others counts. In a round, the ways take turns, odd rounds
backwards; a row has the medians over the rounds, and ratios to TRL's own loss in the same round.
Time is the processor's, on one thread. Memory is the growth of the process's peak over what it held
between two steps: models and AdamW's states are not in it, gradients are. Tokens are random, all
sequences have one length, and prompts are masked.
"""

from __future__ import annotations

import argparse
import functools
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.fused_problem import IGNORED
from benchmarks.fused_worker import Apart, HostGauge
from benchmarks.record import RESULTS, Others, Table, machine

RECIPES = Path(__file__).parents[1] / "docs" / "recipes"
PACKAGES = ("torch", "transformers", "trl", "liger-kernel", "spoloss")
BASIS = "trl"


@dataclass(frozen=True)
class Cell:
    """One row: a way, and the shape of its batches."""

    way: str
    pairs: int
    tokens: int
    prompt: int


class Measured(NamedTuple):
    """Processor seconds of the fastest step, growth of peak memory, others' share of the cores."""

    seconds: float
    memory_mib: float
    others: float


# --------------------------------------------------------------------------------------- the ways


HeadLoss = Callable[[DPOTrainer, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""A trainer, hidden states and head of the policy and of the reference, and labels, to a loss."""


def head_trainer(loss: HeadLoss) -> type[DPOTrainer]:
    """A trainer that computes a loss of hidden states and heads inside the model's forward."""

    class HeadTrainer(DPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for model in (self.model, self.ref_model):
                add_head_call(model)

        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any
        ) -> Any:
            """The loss of a batch whose rows are all chosen, then all rejected."""
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
            tokens = {key: inputs[key] for key in ("input_ids", "attention_mask")}
            with torch.no_grad():
                reference = self.ref_model(**tokens, head_call=lambda *both: both)
            return model(**tokens, head_call=lambda *both: loss(self, *both, *reference, labels))

    return HeadTrainer


def add_head_call(model: Any) -> None:
    """Makes `model(..., head_call=f)` return f(hidden states, head's weight) from its forward."""
    forward = model.forward

    @functools.wraps(forward)
    def call(*args: Any, head_call: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        if head_call is None:
            return forward(*args, **kwargs)
        hidden = model.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        return head_call(hidden, model.get_output_embeddings().weight)

    model.forward = call


def no_head() -> type[DPOTrainer]:
    """Both models without their heads, which any loss pays for: the least that a step can take."""
    return head_trainer(lambda _, hidden, *__: hidden.square().mean())


def liger() -> type[DPOTrainer]:
    """Liger's fused linear DPO, as TRL's `use_liger_kernel` ran it up to TRL 1.12."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    @functools.cache
    def fused(beta: float) -> LigerFusedLinearDPOLoss:
        return LigerFusedLinearDPOLoss(ignore_index=IGNORED, beta=beta)

    def loss(
        trainer: DPOTrainer,
        hidden: Tensor,
        weight: Tensor,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        labels: Tensor,
    ) -> Tensor:
        states = hidden[:, :-1].contiguous(), labels[:, 1:].contiguous()
        reference = {"ref_input": ref_hidden[:, :-1].contiguous(), "ref_weight": ref_weight}
        return fused(trainer.beta)(weight, *states, **reference)[0]

    return head_trainer(loss)


def recipe(name: str) -> type[DPOTrainer]:
    """The trainer of a recipe, which is a script for readers to copy, and is run as one."""
    return runpy.run_path(str(RECIPES / f"{name}.py"))["SPOTrainer"]


WAYS: dict[str, Callable[[], type[DPOTrainer]]] = {
    "no_head": no_head,
    "trl": lambda: DPOTrainer,
    "liger": liger,
    "logits": functools.partial(recipe, "trl_dpo"),
    "fused": functools.partial(recipe, "trl_fused"),
}


# ---------------------------------------------------------------------------- inside the process


class StepGauge(TrainerCallback):
    """Times every step after the first, and takes the peak of memory over them."""

    def __init__(self) -> None:
        self.gauge = HostGauge()
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Forgets the peak of the step that warmed up, and starts the clock."""
        if state.global_step == 1:
            self.gauge.reset()
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Stops the clock; the optimizer has stepped."""
        if state.global_step > 1:
            self.seconds.append(time.process_time() - self.start)


def make_pairs(cell: Cell, steps: int, vocabulary: int) -> Dataset:
    """Pairs of random tokens as TRL has them once they are tokenised."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    lengths = {"prompt": cell.prompt}
    lengths |= dict.fromkeys(("chosen", "rejected"), cell.tokens - cell.prompt)
    return Dataset.from_list(
        [
            {f"{name}_ids": tokens(length) for name, length in lengths.items()}
            for _ in range(cell.pairs * steps)
        ]
    )


def train(cell: Cell, model: str, steps: int) -> Measured:
    """Train some steps one way in this process.

    Raises:
      OSError: the system keeps no peak of a process's memory.
    """
    torch.set_num_threads(1)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2)
    )
    gauge = StepGauge()
    with tempfile.TemporaryDirectory() as folder, Others() as others:
        trainer = WAYS[cell.way]()(
            policy,
            reference,
            DPOConfig(
                folder,
                beta=0.1,
                per_device_train_batch_size=cell.pairs,
                max_steps=steps,
                max_length=cell.tokens,
                learning_rate=1e-6,
                activation_checkpointing=False,
                bf16=False,
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=[gauge],
        )
        # TRL would tokenise text anew, to lengths of its own; so the tokens come after that.
        trainer.train_dataset = make_pairs(cell, steps, policy.config.vocab_size)
        trainer.train()
    growth = gauge.gauge.growth_mib()
    if growth is None:
        raise OSError("memory: expected a system with /proc, which keeps a process's peak")
    return Measured(min(gauge.seconds), growth, others.share)


# ----------------------------------------------------------------------------------- the command


def measure(cells: Sequence[Cell], options: argparse.Namespace) -> dict[Cell, dict[str, Any]]:
    """The columns of the rows. Every way runs once in each round, and so does TRL's own loss."""
    basis, absent = replace(cells[0], way=BASIS), {}
    found: dict[Cell, list[Measured]] = {cell: [] for cell in dict.fromkeys([basis, *cells])}
    turns = [cell for turn in range(options.rounds) for cell in list(found)[:: 1 - 2 * (turn % 2)]]
    for cell in tqdm(turns, unit="process", disable=None):
        if cell in absent:
            continue
        try:
            with Apart() as process:
                found[cell].append(process.call(train, cell, options.model, options.steps))
        except ModuleNotFoundError as problem:
            absent[cell] = {"note": f"not installed: {problem}"}
    return {cell: absent.get(cell) or summary(found[cell], found[basis]) for cell in cells}


def summary(ours: Sequence[Measured], trl: Sequence[Measured]) -> dict[str, Any]:
    """The columns of a way's row: medians, and medians of the ratios to TRL in the same round."""

    def ratio(name: str) -> float:
        both = zip(ours, trl, strict=True)
        return statistics.median(getattr(a, name) / getattr(b, name) for a, b in both)

    return {
        "rounds": len(ours),
        "seconds": statistics.median(each.seconds for each in ours),
        "of_trl": ratio("seconds"),
        "memory_mib": round(statistics.median(each.memory_mib for each in ours)),
        "memory_of_trl": ratio("memory_mib"),
        "others": statistics.fmean(each.others for each in (*ours, *trl)),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="a folder or a name that Transformers loads")
    add("--pairs", type=int, default=2, help="pairs of a batch; default: %(default)s")
    add("--tokens", type=int, default=256, help="tokens of a sequence; default: %(default)s")
    add("--prompt", type=int, default=64, help="of which prompt; default: %(default)s")
    add("--steps", type=int, default=2, help="of a process, the first not timed; default: 2")
    add("--rounds", type=int, default=3, help="default: %(default)s")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    add("--output", type=Path, default=RESULTS, help=f"a folder; default: {RESULTS.name}")
    add("--quick", action="store_true", help="tiny batches, one round; no file")
    options = parser.parse_args(argv)
    shape = (options.pairs, options.tokens, options.prompt)
    if options.quick:
        shape, options.steps, options.rounds = (1, 8, 2), 2, 1
    path = None if options.quick else options.output / "trainers_cpu.csv"
    title = f"{Path(options.model).name}, float32, {machine(*PACKAGES)}"
    table = Table(path, title, Cell)
    cells = table.missing([Cell(way, *shape) for way in options.ways])
    for cell, columns in (measure(cells, options) if cells else {}).items():
        table.add(cell, **columns)


if __name__ == "__main__":
    main()
