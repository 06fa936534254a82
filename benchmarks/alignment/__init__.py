"""The paper's experiment at desk scale: `python -m benchmarks.alignment`."""
