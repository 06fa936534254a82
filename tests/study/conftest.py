"""The benchmarks come from the checkout, the package as it is installed."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # behind all else, for the checkout has both
