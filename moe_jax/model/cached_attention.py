"""Attention to keys and values of a cache, forward only: of a chunk of a prompt, and of one token.

Letters: I query blocks, J positions of a block, M cached positions, R query heads per key head.
Knows arrays; must not know where the cache keeps them.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.model import attention_core, blockwise
from moe_jax.parallel.collectives import varying_like

_MASKED = -1e30  # finite, so that a row with no key yet gives 0, not NaN


def one_token(q_bNH, k_bMGH, v_bMGH, lengths_b) -> jax.Array:
  """Returns `o_bNH`: each row's query attends to the first `lengths_b` cached positions.

  Args:
    q_bNH: queries; query head n reads key head n // (N / G).
    lengths_b: with the position of the query itself, int32; a row of length 0 gives anything
      finite.
  """
  b, N, H = q_bNH.shape
  M, G = k_bMGH.shape[1:3]
  scale = jnp.asarray(1 / math.sqrt(H), q_bNH.dtype)
  q_bGRH = (q_bNH * scale).reshape(b, G, N // G, H)
  scores = jnp.einsum("bgrh,bmgh->bgrm", q_bGRH, k_bMGH, preferred_element_type=jnp.float32)
  is_cached_bM = jnp.arange(M, dtype=jnp.int32)[None, :] < lengths_b[:, None]
  weights = jax.nn.softmax(jnp.where(is_cached_bM[:, None, None], scores, _MASKED), axis=-1)
  o_bGRH = jnp.einsum("bgrm,bmgh->bgrh", weights.astype(v_bMGH.dtype), v_bMGH)
  return o_bGRH.reshape(b, N, H)


def chunk(q_bSNH, k_bSGH, v_bSGH, context_k_bMGH, context_v_bMGH, starts_b) -> jax.Array:
  """Returns `o_bSNH`: each position attends to the row's cached ones and to earlier ones of the
  chunk.

  Args:
    q_bSNH, k_bSGH, v_bSGH: of the chunk, which begins at position `starts_b` of its sequence.
    context_k_bMGH, context_v_bMGH: cached; of them the first `starts_b` count. M = 0 for chunks
      that all begin their sequences.
    starts_b: int32.

  Source: FlashAttention-2 (arXiv:2307.08691), algorithm 1.
  """
  b, S, N, H = q_bSNH.shape
  M, G = context_k_bMGH.shape[1:3]
  if M == 0:
    return attention_core.attention(q_bSNH, k_bSGH, v_bSGH, jnp.zeros((b, S), jnp.int32))
  J = blockwise.block_size(S)
  blocks = lambda x: _pad(x, J).reshape(b, -1, J, G, x.shape[2] // G, H).transpose(1, 0, 3, 4, 2, 5)
  q_IbGRJH = blocks(q_bSNH * jnp.asarray(1 / math.sqrt(H), q_bSNH.dtype))
  num_context = -(-M // J)
  both = lambda context, own: jnp.concatenate([blocks(context), blocks(own)])[:, :, :, 0]
  k_XbGJH, v_XbGJH = both(context_k_bMGH, k_bSGH), both(context_v_bMGH, v_bSGH)
  o_IbGRJH = _online(q_IbGRJH, k_XbGJH, v_XbGJH, num_context, starts_b)
  return o_IbGRJH.transpose(1, 0, 4, 2, 3, 5).reshape(b, -1, N, H)[:, :S]


def _online(q_IbGRJH, k_XbGJH, v_XbGJH, num_context: int, starts_b):
  """Returns o_IbGRJH by one loop over (query block, key block); context blocks come first."""
  num_blocks, J = q_IbGRJH.shape[0], q_IbGRJH.shape[4]
  offset = jnp.arange(J, dtype=jnp.int32)

  def pair(state, ij):
    o, high, total = state  # float32: unnormalised output, running maximum, running sum
    i, j = ij
    product = lambda form, *x: jnp.einsum(form, *x, preferred_element_type=jnp.float32)
    scores = product("bgrqh,bgkh->bgrqk", q_IbGRJH[i], k_XbGJH[j])
    is_cached_bqk = ((j * J + offset)[None, :] < starts_b[:, None])[:, None, :]
    own = j - num_context
    is_earlier_bqk = ((i * J + offset)[:, None] >= (own * J + offset)[None, :])[None]
    seen_bqk = jnp.where(own < 0, is_cached_bqk, is_earlier_bqk)
    scores = jnp.where(seen_bqk[:, None, None], scores, _MASKED)
    new_high = jnp.maximum(high[i], scores.max(-1))
    weights = jnp.where(seen_bqk[:, None, None], jnp.exp(scores - new_high[..., None]), 0.0)
    keep = jnp.exp(high[i] - new_high)
    update = product("bgrqk,bgkh->bgrqh", weights.astype(v_XbGJH.dtype), v_XbGJH[j])
    o = o.at[i].set(o[i] * keep[..., None] + update)
    total = total.at[i].set(total[i] * keep + weights.sum(-1))
    return (o, high.at[i].set(new_high), total), None

  shape = q_IbGRJH.shape[:-1]
  start = (jnp.zeros(q_IbGRJH.shape), jnp.full(shape, _MASKED), jnp.zeros(shape))
  start = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), start)
  pairs = [(i, j) for i in range(num_blocks) for j in range(num_context + i + 1)]
  index = tuple(np.array(pairs, np.int32).T)
  (o, _, total), _ = jax.lax.scan(pair, varying_like(start, q_IbGRJH), index)
  return (o / total[..., None]).astype(q_IbGRJH.dtype)


def _pad(x_bS, block: int):
  """Returns x with positions added up to whole blocks; they come after all others."""
  widths = [(0, 0)] * x_bS.ndim
  widths[1] = (0, -x_bS.shape[1] % block)
  return jnp.pad(x_bS, widths)
