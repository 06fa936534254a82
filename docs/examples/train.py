"""A complete preference run in plain PyTorch. It writes a tuned model, its curves and numbers.

    python train.py                                    # the pairs in this folder, a minute
    python train.py --pairs mine.jsonl --model Qwen/Qwen2.5-0.5B --loss spo --beta 0.1
    python train.py --fused                            # the same numbers without holding logits
    python train.py --help

README.md in this folder describes the pairs, the options and the output. This file checks the
command line and the pairs. The training itself is in loop.py, which you can copy.

Needs: pip install "spoloss[examples]"
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from arguments import parse_options
from errors import DivergedError, InputError
from objective import check_objective
from pairs import read_pairs, split_pairs


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example.

    Args:
      argv: the command line without the name of the script; None for the process's arguments.

    Returns:
      The exit code: 0, 2 for unusable input, or 1 for a run that diverged.
    """
    try:
        options = parse_options(argv)
        pairs = read_pairs(options.pairs, with_gap=options.reward_gap)
        check_objective(pairs, options)
        split = split_pairs(pairs, options)
        model = options.model or "a small new Qwen2"
        print(f"{len(pairs)} pairs read; loading PyTorch and {model} ...", flush=True)

        # PyTorch and Transformers take seconds to import, so check the input first.
        from loop import run

        run(split, options)
    except (InputError, DivergedError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
