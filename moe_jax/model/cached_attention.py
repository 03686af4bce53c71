"""Attention to keys and values of a cache, forward only: of a chunk of a prompt, and of one token.

Letters: I query blocks, J positions of a block or page, W pages, M cached positions, T positions of
a chunk, of which S ask, R query heads per key head.
Knows arrays; must not know where the cache keeps them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.model import attention_core, blockwise, flash
from moe_jax.parallel.collectives import varying_like
from moe_jax.pipeline import buffers

_MASKED = -1e30  # finite: a row with no key yet is no NaN, and its first key wipes it


def one_token(q_bNH, k_bWGJH, v_bWGJH, lengths_b) -> jax.Array:
  """Returns `o_bNH`: each row's query attends to the first `lengths_b` cached positions.

  A product for each page and head, on which no array need be turned; their sum is the output.

  Args:
    q_bNH: queries; query head n reads key head n // (N / G).
    k_bWGJH, v_bWGJH: of W pages of J positions each, in order.
    lengths_b: with the position of the query itself, int32; a row of length 0 gives anything
      finite.
  """
  b, N, H = q_bNH.shape
  W, G, J = k_bWGJH.shape[1:4]
  q_b1GRH = blockwise.scaled(q_bNH).reshape(b, 1, G, N // G, H)
  q_bWGRH = jnp.broadcast_to(q_b1GRH, (b, W, G, N // G, H))
  product = lambda form, *x: jnp.einsum(form, *x, preferred_element_type=jnp.float32)
  scores = product("bwgrh,bwgjh->bwgrj", q_bWGRH, k_bWGJH)
  position_WJ = jnp.arange(W * J, dtype=jnp.int32).reshape(W, J)
  is_cached_bWJ = position_WJ[None] < lengths_b[:, None, None]
  weights = jax.nn.softmax(jnp.where(is_cached_bWJ[:, :, None, None], scores, _MASKED), (1, 4))
  o_bWGRH = product("bwgrj,bwgjh->bwgrh", weights.astype(v_bWGJH.dtype), v_bWGJH)
  return o_bWGRH.sum(1).astype(v_bWGJH.dtype).reshape(b, N, H)


def chunk(q_bSNH, k_bTGH, v_bTGH, context_k_bMGH, context_v_bMGH, starts_b) -> jax.Array:
  """Returns `o_bSNH`: each position attends to the row's cached ones and to earlier ones of the
  chunk.

  Args:
    q_bSNH: of the last S positions of the chunk.
    k_bTGH, v_bTGH: of the whole chunk, which begins at position `starts_b` of its sequence.
    context_k_bMGH, context_v_bMGH: cached; of them the first `starts_b` count. M = 0 for chunks
      that all begin their sequences.
    starts_b: int32.

  Source: FlashAttention-2 (arXiv:2307.08691), algorithm 1.
  """
  b, S = q_bSNH.shape[:2]
  M, T = context_k_bMGH.shape[1], k_bTGH.shape[1]
  if M:
    return _online(q_bSNH, k_bTGH, v_bTGH, context_k_bMGH, context_v_bMGH, starts_b)
  segments_bT = jnp.zeros((b, T), jnp.int32)
  if S == T:
    return attention_core.attention(q_bSNH, k_bTGH, v_bTGH, segments_bT)
  # The context is of no position: the loop walks the chunk's alone.
  return jax.lax.platform_dependent(
    q_bSNH, k_bTGH, v_bTGH,
    cuda=lambda q, k, v: flash.forward(q, k, v, segments_bT)[0],
    default=lambda q, k, v: _online(q, k, v, context_k_bMGH, context_v_bMGH, starts_b),
  )  # fmt: skip


def _online(q_bSNH, k_bTGH, v_bTGH, context_k_bMGH, context_v_bMGH, starts_b) -> jax.Array:
  """Returns what `chunk` does, by one loop over (query block, key block); the context's come
  first.
  """
  b, S, N, H = q_bSNH.shape
  G, J = k_bTGH.shape[2], blockwise.block_size(S)
  blocks = lambda x: _pad(x, J).reshape(b, -1, J, G, x.shape[2] // G, H).transpose(1, 0, 3, 4, 2, 5)
  q_IbGRJH = blocks(blockwise.scaled(q_bSNH))
  context = blocks(context_k_bMGH), blocks(context_v_bMGH)
  k_XbGJH, v_XbGJH = (
    jnp.concatenate([before, blocks(own)])[:, :, :, 0]
    for before, own in zip(context, (k_bTGH, v_bTGH), strict=True)
  )
  num_context, before = len(context[0]), k_bTGH.shape[1] - S
  offset = jnp.arange(J, dtype=jnp.int32)

  def pair(state, ij):
    o, high, total = state  # float32: unnormalised output, running maximum, running sum
    i, j = ij
    product = lambda form, *x: jnp.einsum(form, *x, preferred_element_type=jnp.float32)
    scores = product("bgrqh,bgkh->bgrqk", q_IbGRJH[i], k_XbGJH[j])
    is_cached_bqk = ((j * J + offset)[None, :] < starts_b[:, None])[:, None, :]
    own = j - num_context
    is_earlier_bqk = ((before + i * J + offset)[:, None] >= (own * J + offset)[None, :])[None]
    seen_bqk = jnp.where(own < 0, is_cached_bqk, is_earlier_bqk)
    scores = jnp.where(seen_bqk[:, None, None], scores, _MASKED)
    new_high = jnp.maximum(high[i], scores.max(-1))
    weights = jnp.where(seen_bqk[:, None, None], jnp.exp(scores - new_high[..., None]), 0.0)
    keep = jnp.exp(high[i] - new_high)
    update = product("bgrqk,bgkh->bgrqh", weights.astype(v_XbGJH.dtype), v_XbGJH[j])
    o = buffers.put(o, i, o[i] * keep[..., None] + update)
    total = buffers.put(total, i, total[i] * keep + weights.sum(-1))
    return (o, buffers.put(high, i, new_high), total), None

  shape = q_IbGRJH.shape[:-1]
  start = (jnp.zeros(q_IbGRJH.shape), jnp.full(shape, _MASKED), jnp.zeros(shape))
  start = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), start)
  last = len(k_XbGJH) - 1
  pairs = [
    (i, j)
    for i in range(len(q_IbGRJH))
    for j in range(min(num_context + (before + (i + 1) * J - 1) // J, last) + 1)
  ]
  index = tuple(np.array(pairs, np.int32).T)
  (o, _, total), _ = jax.lax.scan(pair, varying_like(start, q_IbGRJH), index)
  o_IbGRJH = (o / total[..., None]).astype(q_IbGRJH.dtype)
  return o_IbGRJH.transpose(1, 0, 4, 2, 3, 5).reshape(b, -1, N, H)[:, :S]


def _pad(x_bS, block: int):
  """Returns x with positions added up to whole blocks; they come after all others."""
  widths = [(0, 0)] * x_bS.ndim
  widths[1] = (0, -x_bS.shape[1] % block)
  return jnp.pad(x_bS, widths)
