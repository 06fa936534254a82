"""A language model's head with its hidden states of real text, for `bench_fused --real-head`.

    python -m benchmarks.real_head FOLDER states.npz
    python -m benchmarks.bench_fused --real-head states.npz

FOLDER is a Transformers folder with safetensors, such as `python -m benchmarks.smollm2` makes. The
text is that of the example's preference pairs. The file holds the hidden states and labels of the
answers, about a megabyte, and the folder's place, from which the head itself is read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

TEXT = Path(__file__).parents[1] / "docs" / "examples" / "pairs.jsonl"
IGNORED = -100
"""The label of tokens that do not count."""
HEAD_NAMES = ("lm_head.weight", "model.embed_tokens.weight")
"""The head's name in a file of weights; a tied head has only that of the embedding."""


@dataclass(frozen=True)
class RealHead:
    """What a file of this script holds.

    Attributes:
      name: the model's.
      folder: a Transformers folder with the model's weights.
      hidden: chosen, then rejected sequences, [2P, T, D], float16; 0 where the label is ignored.
      labels: position t predicts label t, [2P, T], int64.
    """

    name: str
    folder: Path
    hidden: np.ndarray
    labels: np.ndarray

    @classmethod
    def load(cls, path: Path) -> RealHead:
        """Read a file."""
        with np.load(path) as file:
            folder = Path(str(file["folder"]))
            return cls(str(file["name"]), folder, file["hidden"], file["labels"])

    def save(self, path: Path) -> None:
        """Write a file."""
        np.savez_compressed(
            path,
            name=self.name,
            folder=str(self.folder),
            hidden=self.hidden,
            labels=self.labels,
        )

    @property
    def ignored(self) -> float:
        """The share of the labels that are ignored."""
        return float((self.labels == IGNORED).mean())

    def weight(self) -> Tensor:
        """The head's weight, [V, D], from the folder.

        Raises:
          FileNotFoundError: no file of weights there holds it.
        """
        from safetensors import safe_open

        for name in HEAD_NAMES:
            for path in sorted(self.folder.glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    if name in file.keys():  # noqa: SIM118 (a file, not a dictionary)
                        return file.get_tensor(name)
        raise FileNotFoundError(
            f"{self.folder}: expected safetensors with {' or '.join(HEAD_NAMES)}"
        )


def make(folder: Path, text: Path, pairs: int) -> RealHead:
    """Run the model of a folder over the first pairs of a text."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [json.loads(line) for line in text.read_text().splitlines()[:pairs]]
    found = [
        _sequence(model, tokenizer, row["prompt"], row[side])
        for side in ("chosen", "rejected")
        for row in rows
    ]
    shape = (len(found), max(len(labels) for _, labels in found))
    hidden = np.zeros((*shape, model.config.hidden_size), dtype=np.float16)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for row, (states, targets) in enumerate(found):
        labels[row, : len(targets)] = targets
        hidden[row, : len(targets)] = np.where(targets[:, None] == IGNORED, 0.0, states)
    return RealHead(folder.name, folder.resolve(), hidden, labels)


def _sequence(
    model: torch.nn.Module, tokenizer: object, prompt: str, answer: str
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [T, D] and labels [T] of a prompt with its answer."""
    turns = [{"role": "user", "content": prompt}]
    start = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    end = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        states = model(torch.tensor([start + end])).last_hidden_state[0, :-1]
    labels = np.array([IGNORED] * (len(start) - 1) + end)
    return states.numpy(), labels


def main(argv: Sequence[str] | None = None) -> None:
    """Make a file and say what it holds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, help="a Transformers folder")
    add("output", type=Path, help="the file to write, .npz")
    add("--text", type=Path, default=TEXT, help=f"JSON lines of preference pairs: {TEXT.name}")
    add("--pairs", type=int, default=16, help="how many of them; default: 16")
    options = parser.parse_args(argv)
    head = make(options.folder, options.text, options.pairs)
    head.save(options.output)
    size = options.output.stat().st_size / 1e3
    print(f"{head.name}: {head.labels.shape}, {head.ignored:.0%} ignored, {size:.0f} kB")


if __name__ == "__main__":
    main()
