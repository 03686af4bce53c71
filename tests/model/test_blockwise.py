"""Blockwise attention against plain attention: values, gradients, documents, lengths, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model import blockwise

# Relative L2 by dtype: rounding of the products, whose sums are float32 in both.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}
# (positions, query heads, key heads, block)
SHAPES = [
  (16, 4, 4, 16),
  (16, 4, 2, 4),
  (33, 6, 2, 8),
  (40, 2, 1, 16),
  (5, 2, 2, 8),
  (64, 3, 3, 16),
]


def arrays(S, N, G, dtype, num_documents, b=2, H=8):
  random = np.random.default_rng(S * N + G)
  normal = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
  starts = random.choice(np.arange(1, S), num_documents - 1, replace=False)
  segments = np.zeros((b, S), np.int32)
  for start in starts:
    segments[0, start:] += 1  # the second row stays one document
  qkv = normal(b, S, N, H), normal(b, S, G, H), normal(b, S, G, H)
  return *qkv, jnp.asarray(segments), normal(b, S, N, H)


def plain(q_bSNH, k_bSGH, v_bSGH, segments_bS):
  """Attention by the formula, float32."""
  q, k, v = (x.astype(jnp.float32) for x in (q_bSNH, k_bSGH, v_bSGH))
  repeats = q.shape[2] // k.shape[2]
  k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
  scores = jnp.einsum("bsnh,bmnh->bnsm", q, k) / q.shape[-1] ** 0.5
  S = q.shape[1]
  allowed = jnp.tril(jnp.ones((S, S), bool))[None] & (
    segments_bS[:, :, None] == segments_bS[:, None, :]
  )
  weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, -jnp.inf), axis=-1)
  return jnp.einsum("bnsm,bmnh->bsnh", weights, v)


def relative_l2(found, expected):
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("num_documents", [1, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("S", "N", "G", "block"), SHAPES)
def test_values_and_gradients_equal_plain_attention(
  monkeypatch, S, N, G, block, dtype, num_documents
):
  monkeypatch.setattr(blockwise, "BLOCK", block)
  *qkv, segments, cotangent = arrays(S, N, G, dtype, num_documents)
  found, vjp = jax.vjp(lambda *qkv: blockwise.attention(*qkv, segments), *qkv)
  wide = [x.astype(jnp.float32) for x in qkv]
  expected, expected_vjp = jax.vjp(lambda *qkv: plain(*qkv, segments), *wide)
  assert found.dtype == jnp.dtype(dtype)
  assert relative_l2(found, expected) < TOLERANCE[dtype]
  gradients = vjp(cotangent)
  for each, expected_each in zip(
    gradients, expected_vjp(cotangent.astype(jnp.float32)), strict=True
  ):
    assert each.dtype == jnp.dtype(dtype)
    assert relative_l2(each, expected_each) < TOLERANCE[dtype]


def test_large_scores_overflow_nothing():
  *qkv, segments, cotangent = arrays(33, 2, 2, "float32", 2)
  qkv = [100.0 * qkv[0], 100.0 * qkv[1], qkv[2]]
  found, vjp = jax.vjp(lambda *qkv: blockwise.attention(*qkv, segments), *qkv)
  assert relative_l2(found, plain(*qkv, segments)) < TOLERANCE["float32"]
  assert all(jnp.isfinite(leaf).all() for leaf in vjp(cotangent))


def test_memory_is_linear_in_the_sequence():
  """Twice the positions take twice the temporaries; the scores of plain attention four times.

  From 4,096 positions on: below, blocks grow with the sequence.
  """

  def temporary_bytes(function, S):
    struct = jax.ShapeDtypeStruct((1, S, 2, 16), jnp.float32)
    segments = jax.ShapeDtypeStruct((1, S), jnp.int32)
    loss = lambda q, k, v, segments: function(q, k, v, segments).sum()
    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    compiled = gradient.lower(struct, struct, struct, segments).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  growth = lambda function: temporary_bytes(function, 8192) / temporary_bytes(function, 4096)
  assert growth(blockwise.attention) < 2.05
  assert growth(plain) > 3.5


def test_only_blocks_on_or_below_the_diagonal_are_computed():
  """The loop runs n (n + 1) / 2 times over n blocks, forwards and backwards."""
  *qkv, segments, _ = arrays(5 * blockwise.BLOCK, 2, 1, "float32", 1, b=1)
  loss = lambda *qkv: blockwise.attention(*qkv, segments).sum()
  text = str(jax.make_jaxpr(jax.grad(loss))(*qkv))
  assert text.count("length=15") == 2
  assert text.count("length=") == 2
