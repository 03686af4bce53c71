"""What every implementation of attention is tested with: inputs, plain attention, a distance."""

import jax
import jax.numpy as jnp
import numpy as np

# Relative L2 by dtype: rounding of the products, whose sums are float32 in both.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}


def arrays(S, N, G, dtype, num_documents, b=2, H=8):
  """Returns queries, keys, values, segments and a gradient of the output."""
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


def check_against_plain(attention, qkv, segments, cotangent):
  """Holds values and gradients of `attention` against plain attention's."""
  dtype = qkv[0].dtype
  found = values_and_gradients(attention, qkv, segments, cotangent)
  wide = [x.astype(jnp.float32) for x in (*qkv, cotangent)]
  expected = values_and_gradients(plain, wide[:3], segments, wide[3])
  for each, expected_each in zip(found, expected, strict=True):
    assert each.dtype == dtype
    assert relative_l2(each, expected_each) < TOLERANCE[dtype.name]


def values_and_gradients(attention, qkv, segments, cotangent):
  """Returns the output and the gradients of queries, keys and values."""

  def run(qkv, segments, cotangent):
    found, vjp = jax.vjp(lambda *qkv: attention(*qkv, segments), *qkv)
    return found, *vjp(cotangent)

  return jax.jit(run)(qkv, segments, cotangent)
