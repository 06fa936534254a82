"""Speed, memory and accuracy; each command is run in the checkout and writes benchmarks/results.

losses      the losses against the same formulas by hand, and `import spoloss`
accuracy    values and slopes against 60-digit arithmetic
fused       from hidden states to gradients in PyTorch, beside peers and the bare products
fused_jax   the same in JAX
trainers    a training step of TRL's DPOTrainer
versions    this checkout's fused head against that of another checkout

`python -m benchmarks.losses --help` has its options. `studies` is what the losses do in training.
"""
