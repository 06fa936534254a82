"""Predicted time of the fused head on cards that were not there: python -m benchmarks.roofline.

Each way runs on paper (`benchmarks.paper`) at real sizes, and every launch is priced by what it
multiplies, reads and writes:

    seconds = sum over launches of max(2 us, FLOP / rate, bytes / bandwidth)

The rates are those that others have measured: 790 TFLOP/s of bfloat16 products, and 4.3 and 3.0
TB/s for copies on an H200 and an H100. A product overlaps with its own traffic. Any other operator
reads its inputs once and writes its outputs once, which is too little for some kernels of full
logits; ours are counted by the passes of the code that Inductor writes. No number was fitted.
A ratio is over the bare products: three of 2NDV with a trained head, two with a frozen one, one for
a reference's forward.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.fused_problem import Problem, dpo
from benchmarks.fused_ways import Step, UnavailableError, full_logits, liger, spoloss, trl
from benchmarks.paper import GIB, H200, Kernel, Paper, backward, on_paper, refusal

FLOP_RATE = 790e12
BANDWIDTHS = {"h200": 4.3e12, "h100": 3.0e12}
LEAST_SECONDS = 2e-6
PAIRS, TOKENS = 8, 2048
PACKAGES = ("torch", "trl", "liger-kernel", "spoloss")


@dataclass(frozen=True)
class Cell:
    """What is predicted: a way, a model's head, and whether it is trained, frozen or a reference's.

    Attributes:
      model: whose head.
      head: "trained", "frozen" or "reference".
      way: of `WAYS`.
    """

    model: str
    head: str
    way: str


class Size(NamedTuple):
    """A model's head [vocab, width], and its soft-cap."""

    width: int
    vocab: int
    softcap: float | None = None


MODELS = {
    "7B": Size(4096, 128_256),
    "0.5B": Size(896, 151_936),
    "Gemma 2B": Size(2304, 256_000, 30.0),
    "Gemma 9B": Size(3584, 256_000, 30.0),
}
HEADS = {"trained": 3, "frozen": 2, "reference": 1}
"""How many products each needs."""
WAYS: dict[str, Callable[[float | None], Step]] = {
    "spoloss": partial(spoloss, dpo),
    "trl": trl,
    "full_logits": full_logits,
    "liger": partial(liger, compiled=False),
}


def predicted(cell: Cell) -> dict[str, float]:
    """The columns of a row.

    Raises:
      UnavailableError: the way cannot do this.
    """
    size = MODELS[cell.model]
    with on_paper(H200) as paper, peers(paper):
        problem = problem_of(size, trained=cell.head == "trained")
        step = WAYS[cell.way](size.softcap)
        before = paper.forget()
        if cell.head == "reference":
            with torch.no_grad(), mock.patch.object(Tensor, "backward"):
                step(problem)
        else:
            step(problem)
        bare = HEADS[cell.head] * 2 * problem.labels.numel() * size.width * size.vocab / FLOP_RATE
        ratios = {
            card: sum(seconds(kernel, bandwidth) for kernel in paper.kernels) / bare
            for card, bandwidth in BANDWIDTHS.items()
        }
        return ratios | {
            "memory_gib": (paper.peak - before) / GIB,
            "launches": len(paper.kernels),
            "syncs": len(paper.syncs),
            "products": paper.flops / FLOP_RATE / bare,
        }


def seconds(kernel: Kernel, bandwidth: float) -> float:
    """The predicted time of one launch."""
    return max(LEAST_SECONDS, kernel.flops / FLOP_RATE, kernel.bytes / bandwidth)


def problem_of(size: Size, *, trained: bool) -> Problem:
    """A problem without numbers, all of whose labels count."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="cuda:0")

    labels = torch.randint(size.vocab, (2 * PAIRS, TOKENS)).to("cuda:0")
    weight = empty(size.vocab, size.width).requires_grad_(trained)
    reference = torch.zeros(2 * PAIRS, device="cuda:0")
    return Problem.over(empty(2 * PAIRS, TOKENS, size.width), weight, labels, reference)


# ------------------------------------------------------- what other packages need to run on paper


class Launcher:
    """Stands in for a Triton kernel of TRL, called as `kernel[grid](logits, ...)`."""

    def __init__(self, paper: Paper, name: str, passes: int) -> None:
        """`passes` over the logits: reads and writes."""
        self._paper, self._name, self._passes = paper, name, passes

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """What launches the kernel."""
        return self._launch

    def _launch(self, logits: Tensor, *_: Any, **__: Any) -> None:
        self._paper.launch(self._name, traffic=self._passes * logits.nbytes)


@contextmanager
def peers(paper: Paper) -> Iterator[None]:
    """What the other packages call and a CPU build lacks: TRL's kernels, `torch.func`'s engine."""
    tensor = torch.tensor
    patches = [
        mock.patch("torch.func.grad_and_value", grad_and_value),
        # It allocates below the level that is seen.
        mock.patch("torch.tensor", lambda value, device="cpu": tensor(value).to(device)),
    ]
    if importlib.util.find_spec("trl") is not None:
        kernels = importlib.import_module("trl.kernels.chunked_logprob")
        stand_ins = {
            "_use_triton": lambda _device: True,
            "triton": SimpleNamespace(cdiv=lambda a, b: -(-a // b)),
            "_forward_kernel": Launcher(paper, "trl forward", 1),
            "_backward_kernel": Launcher(paper, "trl backward", 2),  # in place
        }
        patches += [
            mock.patch.object(kernels, *stand_in, create=True) for stand_in in stand_ins.items()
        ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def grad_and_value(function: Callable[..., Any], argnums: Sequence[int], has_aux: bool) -> Any:
    """`torch.func.grad_and_value` as Liger calls it; the gradients' operators are the same."""
    assert has_aux

    def call(*args: Any, **options: Any) -> Any:
        given = [
            arg.detach().requires_grad_() if index in argnums else arg
            for index, arg in enumerate(args)
        ]
        with torch.enable_grad():
            value, others = function(*given, **options)
        backward(value)
        detached = (other.detach() for other in others)
        return tuple(given[index].grad for index in argnums), (value.detach(), tuple(detached))

    return call


# -------------------------------------------------------------------------------------- the table


def title() -> str:
    """The first line of the file."""
    versions = ", ".join(f"{name} {record.version(name)}" for name in PACKAGES)
    return f"{PAIRS} pairs x 2 x {TOKENS} tokens, bfloat16, counted with {versions}"


def main(argv: Sequence[str] | None = None) -> None:
    """Predict every row and write results/roofline.csv."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args(argv)
    if (reason := refusal()) is not None:
        sys.exit(f"benchmarks.roofline {reason}")
    rows: list[dict[str, Any]] = []
    cells = [
        Cell(model, head, way)
        for model, head, way in product(options.models, HEADS, options.ways)
        if (head, way) != ("reference", "liger")  # its forward computes gradients
    ]
    for cell in cells:
        try:
            rows.append(asdict(cell) | predicted(cell))
        except UnavailableError:
            continue
        print(*(f"{name} {value}" for name, value in rows[-1].items()), sep=", ")
    if (options.models, options.ways) == (list(MODELS), list(WAYS)):
        record.write(record.RESULTS / "roofline.csv", title(), rows)


if __name__ == "__main__":
    main()
