"""Programs, run with `python -m launch.<verb>`, and what they share: flags, environment, HTTP."""
