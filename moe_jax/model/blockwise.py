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
from moe_jax.pipeline import buffers

BLOCK = 128  # positions; 64 and 128 are the fastest at 512 positions on CPU
_MASKED = -1e30  # finite: a row with no key yet is no NaN, and its first key wipes it


def forward(q_bSNH, k_bSGH, v_bSGH, segments_bS) -> tuple[jax.Array, jax.Array]:
  """Returns attention's output `o_bSNH` and, of each query, the log of its weights' sum,
  [b, N, S] float32.

  Args:
    q_bSNH: queries; N is a multiple of G, and query head n reads key head n // (N / G).
    k_bSGH: keys.
    v_bSGH: values.
    segments_bS: document numbers within the row, int32.

  Source: FlashAttention-2 (arXiv:2307.08691), algorithm 1.
  """
  S = q_bSNH.shape[1]
  q, k, v, segments_IbJ = _blocks(q_bSNH, k_bSGH, v_bSGH, segments_bS)

  def pair(carry, ij):
    o, high, total = carry  # float32: unnormalised output, running maximum, running sum
    i, j = ij
    scores = jnp.einsum("bgmqh,bgkh->bgmqk", q[i], k[j], preferred_element_type=jnp.float32)
    scores = jnp.where(_is_seen(segments_IbJ, i, j)[:, None, None], scores, _MASKED)
    new_high = jnp.maximum(high[i], scores.max(-1))
    weights = jnp.exp(scores - new_high[..., None])
    keep = jnp.exp(high[i] - new_high)
    update = jnp.einsum(
      "bgmqk,bgkh->bgmqh", weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32
    )
    o = buffers.put(o, i, o[i] * keep[..., None] + update)
    total = buffers.put(total, i, total[i] * keep + weights.sum(-1))
    return (o, buffers.put(high, i, new_high), total), None

  shape = q.shape[:-1]
  start = (
    jnp.zeros(q.shape, jnp.float32),
    jnp.full(shape, _MASKED, jnp.float32),
    jnp.zeros(shape, jnp.float32),
  )
  (o, high, total), _ = jax.lax.scan(pair, varying_like(start, q), _pairs(q.shape[0]))
  o_bSNH = _from_blocks((o / total[..., None]).astype(q.dtype))
  log_total_bSN1 = _from_blocks((high + jnp.log(total))[..., None])
  return o_bSNH[:, :S], log_total_bSN1[:, :S, :, 0].swapaxes(1, 2)


def backward(
  q_bSNH, k_bSGH, v_bSGH, segments_bS, o_bSNH, log_total_bNS, do_bSNH
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the gradients `dq_bSNH, dk_bSGH, dv_bSGH`.

  Args:
    q_bSNH, k_bSGH, v_bSGH, segments_bS: as `forward` took them.
    o_bSNH, log_total_bNS: as it returned them.
    do_bSNH: gradient of its output.

  Source: FlashAttention-2 (arXiv:2307.08691), algorithm 2.
  """
  _, S, _, H = q_bSNH.shape
  G = k_bSGH.shape[2]
  q, k, v, segments_IbJ = _blocks(q_bSNH, k_bSGH, v_bSGH, segments_bS)
  # Sum over keys of weight x its gradient, which the softmax subtracts.
  mean_dot_bSN = jnp.sum(o_bSNH.astype(jnp.float32) * do_bSNH.astype(jnp.float32), -1)
  mean_dot, log_total = (
    _to_blocks(x[..., None], G)[..., 0] for x in (mean_dot_bSN, log_total_bNS.swapaxes(1, 2))
  )
  do = _to_blocks(do_bSNH, G)
  k_IbGHJ = k.swapaxes(-1, -2)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def pair(carry, ij):
    dq, dk, dv = carry
    i, j = ij
    # Keys before queries: so every product finds its factors as they lie, and none is turned.
    scores = product("bgkh,bgmqh->bgkmq", k[j], q[i])
    is_seen_bkq = _is_seen(segments_IbJ, i, j).swapaxes(1, 2)
    scores = jnp.where(is_seen_bkq[:, None, :, None], scores, _MASKED)
    weights = jnp.exp(scores - log_total[i][:, :, None])
    dweights = product("bgkh,bgmqh->bgkmq", v[j], do[i])
    dscores = (weights * (dweights - mean_dot[i][:, :, None])).astype(q.dtype)
    dv = buffers.add(dv, j, product("bgkmq,bgmqh->bgkh", weights.astype(q.dtype), do[i]))
    dk = buffers.add(dk, j, product("bgkmq,bgmqh->bgkh", dscores, q[i]))
    dq = buffers.add(dq, i, product("bghk,bgkmq->bghmq", k_IbGHJ[j], dscores))
    return (dq, dk, dv), None

  dq = jnp.zeros((*q.shape[:3], H, *q.shape[3:5]), jnp.float32)
  start = varying_like((dq, *(jnp.zeros(x.shape, jnp.float32) for x in (k, v))), q)
  (dq, dk, dv), _ = jax.lax.scan(pair, start, _pairs(q.shape[0]))
  dq_bSNH = _from_blocks(jnp.moveaxis(dq, 3, -1) / math.sqrt(H))
  return tuple(
    x[:, :S].astype(q.dtype) for x in (dq_bSNH, *(_from_blocks(x[:, :, :, None]) for x in (dk, dv)))
  )


def scaled(q: jax.Array) -> jax.Array:
  """Returns queries over the root of their width, divided in float32: a root that is rounded to
  bfloat16 is off by up to 0.4%, and with it every score.
  """
  return (q.astype(jnp.float32) / math.sqrt(q.shape[-1])).astype(q.dtype)


def _blocks(q_bSNH, k_bSGH, v_bSGH, segments_bS):
  """Returns scaled queries [I, b, G, M, J, H], keys and values [I, b, G, J, H], `segments_IbJ`."""
  S, G, J = q_bSNH.shape[1], k_bSGH.shape[2], block_size(q_bSNH.shape[1])
  q = _to_blocks(scaled(q_bSNH), G)
  k, v = (_to_blocks(x, G)[:, :, :, 0] for x in (k_bSGH, v_bSGH))
  segments_bS = jnp.pad(segments_bS, ((0, 0), (0, -S % J)))
  return q, k, v, segments_bS.reshape(len(segments_bS), -1, J).swapaxes(0, 1)


def _to_blocks(x_bSNH: jax.Array, G: int) -> jax.Array:
  """Returns `x_bSNH` as [I, b, G, M, J, H]. Padded keys come after every query; padded queries
  bring no gradient, and are cut off.
  """
  b, S, N, H = x_bSNH.shape
  J = block_size(S)
  x = jnp.pad(x_bSNH, ((0, 0), (0, -S % J), (0, 0), (0, 0)))
  return x.reshape(b, -1, J, G, N // G, H).transpose(1, 0, 3, 4, 2, 5)


def _from_blocks(x_IbGMJH: jax.Array) -> jax.Array:
  """Returns `_to_blocks` undone, its padding still there."""
  num_blocks, b, G, M, J, H = x_IbGMJH.shape
  return x_IbGMJH.transpose(1, 0, 4, 2, 3, 5).reshape(b, num_blocks * J, G * M, H)


def block_size(num_positions: int) -> int:
  """Returns J, the positions of a block."""
  return min(num_positions, BLOCK)


def _pairs(num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns (query block, key block) of every pair on or below the diagonal."""
  return tuple(x.astype(np.int32) for x in np.tril_indices(num_blocks))


def _is_seen(segments_IbJ, i, j):
  """Returns [b, J, J]: whether each query of block i sees each key of block j."""
  offset = jnp.arange(segments_IbJ.shape[2], dtype=jnp.int32)
  causal_qk = (i * offset.size + offset)[:, None] >= (j * offset.size + offset)[None, :]
  return causal_qk[None] & (segments_IbJ[i][:, :, None] == segments_IbJ[j][:, None, :])
