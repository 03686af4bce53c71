"""Sharded Mixture-of-Experts transformers in JAX. Import the modules; this file stays empty."""
