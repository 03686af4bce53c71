"""Training: data, optimizer, state, step, loop and checkpoints."""
