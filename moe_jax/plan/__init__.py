"""Choose before running: hardware, cost, memory. Imports without jax."""
