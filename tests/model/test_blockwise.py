"""Blockwise attention against plain attention: values, gradients, documents, lengths, memory."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.model import attention_core, blockwise
from tests.model.attention_cases import TOLERANCE, arrays, check_against_plain, plain, relative_l2

# (positions, query heads, key heads, block)
SHAPES = [
  (16, 4, 4, 16),
  (16, 4, 2, 4),
  (33, 6, 2, 8),
  (40, 2, 1, 16),
  (5, 2, 2, 8),
  (64, 3, 3, 16),
]

attention = attention_core.differentiable(blockwise.forward, blockwise.backward)


@pytest.mark.parametrize("num_documents", [1, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("S", "N", "G", "block"), SHAPES)
def test_values_and_gradients_equal_plain_attention(
  monkeypatch, S, N, G, block, dtype, num_documents
):
  monkeypatch.setattr(blockwise, "BLOCK", block)
  *qkv, segments, cotangent = arrays(S, N, G, dtype, num_documents)
  check_against_plain(attention, qkv, segments, cotangent)


def test_large_scores_overflow_nothing():
  *qkv, segments, cotangent = arrays(33, 2, 2, "float32", 2)
  qkv = [100.0 * qkv[0], 100.0 * qkv[1], qkv[2]]
  found, vjp = jax.vjp(lambda *qkv: attention(*qkv, segments), *qkv)
  assert relative_l2(found, plain(*qkv, segments)) < TOLERANCE["float32"]
  assert all(jnp.isfinite(leaf).all() for leaf in vjp(cotangent))


def test_memory_is_linear_in_the_sequence():
  """Twice the positions take twice the temporaries; the scores of plain attention four times."""

  def temporary_bytes(function, S):
    struct = jax.ShapeDtypeStruct((1, S, 2, 16), jnp.float32)
    segments = jax.ShapeDtypeStruct((1, S), jnp.int32)
    loss = lambda q, k, v, segments: function(q, k, v, segments).sum()
    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    compiled = gradient.lower(struct, struct, struct, segments).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  growth = lambda function: temporary_bytes(function, 4096) / temporary_bytes(function, 2048)
  assert growth(attention_core.attention) < 2.05
  assert growth(plain) > 3.5


def test_only_blocks_on_or_below_the_diagonal_are_computed():
  """The loop runs n (n + 1) / 2 times over n blocks, forwards and backwards."""
  *qkv, segments, _ = arrays(5 * blockwise.BLOCK, 2, 1, "float32", 1, b=1)
  loss = lambda *qkv: attention(*qkv, segments).sum()
  text = str(jax.make_jaxpr(jax.grad(loss))(*qkv))
  assert text.count("length=15") == 2
  assert text.count("length=") == 2
