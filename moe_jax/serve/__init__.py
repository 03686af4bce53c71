"""A trained model in service: paged cache, prefill, decode, continuous batching."""
