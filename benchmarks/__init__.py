"""Speed and memory, as ratios against peers in one run; results are in `results/`."""
