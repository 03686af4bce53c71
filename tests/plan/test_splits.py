"""Splits: as XLA made them in train steps that were compiled for described H100s, jax 0.10.2."""

import pytest

from moe_jax.plan import splits

# (batch, rows, columns, summed) -> parts, of f32[4,256,128] = dot(...) and the like in the HLO.
SEEN = {
  # laptop.py and its like: queries, keys and values; output; logits; hidden units; weights.
  (1, 256, 128, 128): 4,
  (1, 256, 128, 64): 1,
  (1, 256, 64, 128): 4,
  (1, 64, 128, 256): 8,
  (4, 192, 128, 128): 1,
  (4, 128, 128, 192): 4,
  (4, 256, 128, 192): 1,
  (1, 256, 256, 128): 4,
  (1, 768, 128, 256): 4,
  (1, 768, 256, 128): 1,
  (1, 512, 128, 768): 8,
  (2, 384, 128, 256): 4,
  (1, 512, 64, 128): 1,
  (1, 1024, 96, 128): 1,
  # tiny.py: too small to be worth it.
  (1, 64, 48, 16): 1,
  (4, 16, 16, 128): 1,
  # pod64.py and pod64_10b.py.
  (2, 256, 512, 2560): 8,
  (2, 512, 512, 2560): 4,
  (1, 2048, 128, 512): 4,
  (1, 4096, 128, 512): 1,
  (1, 384, 512, 2048): 8,
  (1, 512, 128, 2048): 16,
  (1, 2048, 512, 4000): 2,
  (1, 2048, 4000, 512): 1,
  (1, 2048, 2048, 4000): 1,
}


@pytest.mark.parametrize(("product", "parts"), SEEN.items())
def test_as_xla_splits(product, parts):
  assert splits.parts(*product) == parts
