"""Programs: one verb per file, run with `python -m launch.<verb>`."""
