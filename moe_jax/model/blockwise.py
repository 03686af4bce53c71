"""Causal attention in blocks with an online softmax: memory linear in the sequence, and only the
blocks on or below the diagonal are computed.

One scan over the list of (query block, key block) pairs, which is fixed when the program is
compiled: a loop whose length the device decided would make a GPU wait for the host at every turn.
Letters: I query blocks, J positions of a block, M query heads per key head. Knows arrays; must not
know parameters.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.parallel.collectives import varying_like
from moe_jax.pipeline.saving import residual

BLOCK = 128  # positions, at least; 64 and 128 are the fastest at 512 positions on CPU
_LARGEST_BLOCK = 512
_BLOCKS = 8  # of a longer sequence: each pair is a handful of kernels, which a GPU must launch
_MASKED = -1e30  # finite, so that a row with no key yet gives 0, not NaN


def attention(q_bSNH, k_bSGH, v_bSGH, segments_bS) -> jax.Array:
  """Returns `o_bSNH`: each position attends to itself and earlier positions of its own segment.

  Args:
    q_bSNH: queries; N is a multiple of G, and query head n reads key head n // (N / G).
    k_bSGH: keys.
    v_bSGH: values.
    segments_bS: document numbers within the row, int32.

  Source: FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2.
  """
  b, S, N, H = q_bSNH.shape
  G = k_bSGH.shape[2]
  J = block_size(S)
  padding = -S % J
  if padding:  # padded keys come after every query; padded queries are cut off
    widths = ((0, 0), (0, padding), (0, 0), (0, 0))
    q_bSNH, k_bSGH, v_bSGH = (jnp.pad(x, widths) for x in (q_bSNH, k_bSGH, v_bSGH))
    segments_bS = jnp.pad(segments_bS, widths[:2])
  num_blocks = (S + padding) // J
  scale = jnp.asarray(1 / math.sqrt(H), q_bSNH.dtype)
  q = (q_bSNH * scale).reshape(b, num_blocks, J, G, N // G, H).transpose(1, 0, 3, 4, 2, 5)
  k, v = (x.reshape(b, num_blocks, J, G, H).transpose(1, 0, 3, 2, 4) for x in (k_bSGH, v_bSGH))
  segments_IbJ = segments_bS.reshape(b, num_blocks, J).swapaxes(0, 1)
  o_IbGMJH = _attend(q, k, v, segments_IbJ)
  return o_IbGMJH.transpose(1, 0, 4, 2, 3, 5).reshape(b, S + padding, N, H)[:, :S]


def block_size(num_positions: int) -> int:
  """Returns J, the positions of a block.

  >>> block_size(16), block_size(512), block_size(2048), block_size(10_240)
  (16, 128, 256, 512)
  """
  return min(num_positions, _LARGEST_BLOCK, max(BLOCK, num_positions // _BLOCKS))


def _pairs(num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns (query block, key block) of every pair on or below the diagonal."""
  return tuple(x.astype(np.int32) for x in np.tril_indices(num_blocks))


def _scores(q, k, segments_IbJ, i, j):
  """Returns masked scores [b, G, M, J, J], float32, of query block i against key block j."""
  scores = jnp.einsum("bgmqh,bgkh->bgmqk", q[i], k[j], preferred_element_type=jnp.float32)
  J = q.shape[-2]
  offset = jnp.arange(J, dtype=jnp.int32)
  causal_qk = (i * J + offset)[:, None] >= (j * J + offset)[None, :]
  same_bqk = segments_IbJ[i][:, :, None] == segments_IbJ[j][:, None, :]
  return jnp.where((causal_qk[None] & same_bqk)[:, None, None], scores, _MASKED)


@jax.custom_vjp
def _attend(q, k, v, segments_IbJ):
  return _attend_forward(q, k, v, segments_IbJ)[0]


def _attend_forward(q, k, v, segments_IbJ):
  def pair(carry, ij):
    o, high, total = carry  # float32: unnormalised output, running maximum, running sum
    i, j = ij
    scores = _scores(q, k, segments_IbJ, i, j)
    new_high = jnp.maximum(high[i], scores.max(-1))
    weights = jnp.exp(scores - new_high[..., None])
    keep = jnp.exp(high[i] - new_high)
    update = jnp.einsum(
      "bgmqk,bgkh->bgmqh", weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32
    )
    o = o.at[i].set(o[i] * keep[..., None] + update)
    total = total.at[i].set(total[i] * keep + weights.sum(-1))
    return (o, high.at[i].set(new_high), total), None

  shape = q.shape[:-1]
  start = (
    jnp.zeros(q.shape, jnp.float32),
    jnp.full(shape, _MASKED, jnp.float32),
    jnp.zeros(shape, jnp.float32),
  )
  (o, high, total), _ = jax.lax.scan(pair, varying_like(start, q), _pairs(q.shape[0]))
  o = residual((o / total[..., None]).astype(q.dtype))
  q, k, v = map(residual, (q, k, v))
  return o, (q, k, v, segments_IbJ, o, residual(high + jnp.log(total)))


def _attend_backward(saved, gradient):
  q, k, v, segments_IbJ, o, log_total = saved
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  # Sum over keys of weight x its gradient, which the softmax subtracts.
  mean_dot = jnp.sum(o.astype(jnp.float32) * gradient.astype(jnp.float32), -1)

  def pair(carry, ij):
    dq, dk, dv = carry
    i, j = ij
    weights = jnp.exp(_scores(q, k, segments_IbJ, i, j) - log_total[i][..., None])
    dweights = product("bgmqh,bgkh->bgmqk", gradient[i], v[j])
    dscores = (weights * (dweights - mean_dot[i][..., None])).astype(q.dtype)
    dv = dv.at[j].add(product("bgmqk,bgmqh->bgkh", weights.astype(q.dtype), gradient[i]))
    dq = dq.at[i].add(product("bgmqk,bgkh->bgmqh", dscores, k[j]))
    dk = dk.at[j].add(product("bgmqk,bgmqh->bgkh", dscores, q[i]))
    return (dq, dk, dv), None

  start = varying_like(tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)), q)
  (dq, dk, dv), _ = jax.lax.scan(pair, start, _pairs(q.shape[0]))
  no_gradient = np.zeros(segments_IbJ.shape, jax.dtypes.float0)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), no_gradient


_attend.defvjp(_attend_forward, _attend_backward)
