"""Prove before renting: compile for a described pod, read the compiled schedule, check claims."""
