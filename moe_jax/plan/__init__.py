"""Choose before running: hardware, cost, memory, simulation, search. Imports without jax."""
