"""Causal attention as two GPU kernels, forward and backward: the scores never leave the chip.

Written in Pallas for Triton. A program of the forward kernel holds one block of queries of one head
and walks the key blocks up to its own; a program of the backward kernel owns block p as keys, to
walk the query blocks from p on for their gradients, then as queries, to walk the key blocks up to
p, so that every program does the same work and nothing is added up between programs. jax 0.12 warns
that Pallas will lose Triton in some later version. Letters: J positions of a block, I blocks, M
query heads per key head. Knows arrays; must not know parameters, nor what runs where there is no
GPU.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from moe_jax.parallel.collectives import varying_like

BLOCK = 64  # positions: at 2,048 of 4 heads, 128 programs for the 132 processors of an H100
_NARROWEST = 16  # head width; Triton multiplies tiles of powers of two from here on
_WIDE = 128  # a head this wide takes twice the warps, for the accumulators to stay in registers
_MASKED = -1e30  # finite: a row with no key yet is no NaN, and its first key wipes it
_LOG2_E = math.log2(math.e)  # a GPU has an instruction for powers of two

# Names of the kernels in a compiled program.
FORWARD, BACKWARD = "flash_forward", "flash_backward"
# Matrix products over each pair of positions, of 2 H operations each: scores and output; then for
# dk and dv the scores again, dv, dweights and dk, and for dq the scores again, dweights and dq.
PRODUCTS = {FORWARD: 2, BACKWARD: 7}


def forward(
  q_bSNH, k_bSGH, v_bSGH, segments_bS, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
  """Returns attention's output `o_bSNH` and, of each query, the log of its weights' sum,
  [b, N, S] float32.

  Args:
    q_bSNH: queries; N is a multiple of G, and query head n reads key head n // (N / G).
    k_bSGH: keys; where there are more of them than queries, the queries are of the last positions.
    v_bSGH: values.
    segments_bS: document numbers of the keys within the row, int32.
    interpret: run as jax operations, on any device, in place of a kernel: for tests.

  Source: FlashAttention-2 (arXiv:2307.08691), algorithm 1.
  """
  _, S, _, head_dim = q_bSNH.shape
  num_before = k_bSGH.shape[1] - S
  scale = 1 / math.sqrt(head_dim)
  q_bSNH = _tiled(q_bSNH)
  b, padded, N, H = q_bSNH.shape
  # Keys up to the last padded query, which come after every query that counts.
  at_least = lambda x: jnp.pad(x, [(0, 0), (0, padded - S)] + [(0, 0)] * (x.ndim - 2))
  k_bSGH, v_bSGH = (_tiled(at_least(x)) for x in (k_bSGH, v_bSGH))
  segments_bS = varying_like(_padded(at_least(segments_bS), {1: BLOCK}), q_bSNH)
  num_blocks, M, num_keys = padded // BLOCK, N // k_bSGH.shape[2], k_bSGH.shape[1]
  # The last blocks have the most keys: they start first.
  queries = pl.BlockSpec((None, BLOCK, None, H), lambda p, n, b: (b, num_blocks - 1 - p, n, 0))
  keys = pl.BlockSpec((None, num_keys, None, H), lambda p, n, b: (b, 0, jax.lax.div(n, M), 0))
  o_bSNH, log_total_bNS = pl.pallas_call(
    functools.partial(_forward_kernel, scale=scale, num_before=num_before),
    name=FORWARD,
    grid=(num_blocks, N, b),
    in_specs=[queries, keys, keys, pl.BlockSpec((None, num_keys), lambda p, n, b: (b, 0))],
    out_specs=[
      queries,
      pl.BlockSpec((None, None, BLOCK), lambda p, n, b: (b, n, num_blocks - 1 - p)),
    ],
    out_shape=[_like(q_bSNH, q_bSNH.shape), _like(q_bSNH, (b, N, padded), jnp.float32)],
    compiler_params=_compiler_params(H),
    interpret=interpret,
  )(q_bSNH, k_bSGH, v_bSGH, segments_bS)
  return o_bSNH[:, :S, :, :head_dim], log_total_bNS[..., :S]


def backward(
  q_bSNH, k_bSGH, v_bSGH, segments_bS, o_bSNH, log_total_bNS, do_bSNH, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the gradients `dq_bSNH, dk_bSGH, dv_bSGH`.

  Args:
    q_bSNH, k_bSGH, v_bSGH, segments_bS: as `forward` took them.
    o_bSNH, log_total_bNS: as it returned them.
    do_bSNH: gradient of its output.
    interpret: as in `forward`.

  Source: FlashAttention-2 (arXiv:2307.08691), algorithm 2.
  """
  _, S, _, head_dim = q_bSNH.shape
  # Sum over keys of weight x its gradient, which the softmax subtracts.
  mean_dot_bSN = jnp.sum(o_bSNH.astype(jnp.float32) * do_bSNH.astype(jnp.float32), -1)
  scale = 1 / math.sqrt(head_dim)
  q_bSNH, k_bSGH, v_bSGH, do_bSNH = (_tiled(x) for x in (q_bSNH, k_bSGH, v_bSGH, do_bSNH))
  segments_bS = varying_like(_padded(segments_bS, {1: BLOCK}), q_bSNH)
  rows_bNS = (log_total_bNS, mean_dot_bSN.swapaxes(1, 2))
  log_total_bNS, mean_dot_bNS = (_padded(x, {2: BLOCK}) for x in rows_bNS)
  b, padded, N, H = q_bSNH.shape
  G = k_bSGH.shape[2]
  M = N // G
  group = pl.BlockSpec((None, padded, M, H), lambda p, g, b: (b, 0, g, 0))
  head = pl.BlockSpec((None, padded, None, H), lambda p, g, b: (b, 0, g, 0))
  rows = pl.BlockSpec((None, M, padded), lambda p, g, b: (b, g, 0))
  head_block = pl.BlockSpec((None, BLOCK, None, H), lambda p, g, b: (b, p, g, 0))
  dq_bSNH, dk_bSGH, dv_bSGH = pl.pallas_call(
    functools.partial(_backward_kernel, scale=scale),
    name=BACKWARD,
    grid=(padded // BLOCK, G, b),
    in_specs=[
      group, head, head, pl.BlockSpec((None, padded), lambda p, g, b: (b, 0)), group, rows, rows,
    ],
    out_specs=[
      pl.BlockSpec((None, BLOCK, M, H), lambda p, g, b: (b, p, g, 0)), head_block, head_block,
    ],
    out_shape=[_like(q_bSNH, x.shape) for x in (q_bSNH, k_bSGH, v_bSGH)],
    compiler_params=_compiler_params(H),
    interpret=interpret,
  )(q_bSNH, k_bSGH, v_bSGH, segments_bS, do_bSNH, log_total_bNS, mean_dot_bNS)  # fmt: skip
  return tuple(x[:, :S, :, :head_dim] for x in (dq_bSNH, dk_bSGH, dv_bSGH))


def kernel_flops(name: str, b: int, S: int, N: int, H: int, num_keys: int) -> float:
  """Returns the operations of a kernel's matrix products over `b` rows of S positions, N heads.

  Of I = ceil(S / J) blocks those on or below the diagonal are multiplied, whole:
  I (I + 1) / 2 x J^2 pairs of positions, for each PRODUCTS of 2 H operations. Keys in excess of S
  come before, and all blocks of them are multiplied.
  """
  num_blocks, num_before = math.ceil(S / BLOCK), math.ceil((num_keys - S) / BLOCK)
  pairs = num_blocks * (num_blocks + 1 + 2 * num_before) // 2 * BLOCK**2
  return 2.0 * PRODUCTS[name] * H * pairs * N * b


def _tiled(x_bSNH: jax.Array) -> jax.Array:
  """Returns `x_bSNH` with zeros up to whole blocks of positions and a width that Triton multiplies.

  Padded keys come after every query, padded queries bring no gradient, padded widths add zeros.
  """
  return _padded(x_bSNH, {1: BLOCK, 3: max(_NARROWEST, pl.next_power_of_2(x_bSNH.shape[3]))})


def _padded(x: jax.Array, multiples: dict[int, int]) -> jax.Array:
  """Returns `x` with zeros behind it, up to a multiple of `multiples` by axis."""
  widths = [(0, -size % multiples.get(axis, 1)) for axis, size in enumerate(x.shape)]
  return jnp.pad(x, widths) if any(after for _, after in widths) else x


def _like(x: jax.Array, shape: tuple[int, ...], dtype=None) -> jax.ShapeDtypeStruct:
  """Returns what a kernel is to return: varying over the mesh as `x` does."""
  varies = jax.typeof(x).manual_axis_type
  return jax.ShapeDtypeStruct(shape, dtype or x.dtype, manual_axis_type=varies)


def _compiler_params(H: int) -> triton.CompilerParams:
  return triton.CompilerParams(num_warps=8 if H >= _WIDE else 4, num_stages=2)


def _forward_kernel(
  q_ref, k_ref, v_ref, segments_ref, o_ref, log_total_ref, *, scale, num_before
):  # fmt: skip
  J, H = q_ref.shape
  i = pl.num_programs(0) - 1 - pl.program_id(0)
  q, q_at = q_ref[...], num_before + _positions(i)
  q_segments = segments_ref[pl.ds(num_before + i * BLOCK, BLOCK)]

  def walk(j, carry):
    o, high, total = carry  # unnormalised output, running maximum, running sum
    k, v = k_ref[_block(j), :], v_ref[_block(j), :]
    seen = q_at[:, None] >= _positions(j)[None, :]
    seen &= q_segments[:, None] == segments_ref[_block(j)][None, :]
    scores = jnp.where(seen, triton.dot(q, k, trans_b=True) * (scale * _LOG2_E), _MASKED)
    new_high = jnp.maximum(high, scores.max(1))
    weights = jnp.exp2(scores - new_high[:, None])
    keep = jnp.exp2(high - new_high)
    o = o * keep[:, None] + triton.dot(weights.astype(v.dtype), v)
    return o, new_high, total * keep + weights.sum(1)

  start = (
    jnp.zeros((J, H), jnp.float32),
    jnp.full((J,), _MASKED, jnp.float32),
    jnp.zeros((J,), jnp.float32),
  )
  num_seen = i + 1 + math.ceil(num_before / BLOCK)
  o, high, total = jax.lax.fori_loop(0, num_seen, walk, start)
  o_ref[...] = (o / total[:, None]).astype(o_ref.dtype)
  log_total_ref[...] = high / _LOG2_E + jnp.log(total)


def _backward_kernel(
  q_ref, k_ref, v_ref, segments_ref, do_ref, log_total_ref, mean_dot_ref, dq_ref, dk_ref, dv_ref,
  *, scale,
):  # fmt: skip
  """References hold one key head and its query heads; the gradients of block p alone."""
  p, num_blocks = pl.program_id(0), pl.num_programs(0)
  refs = (q_ref, k_ref, v_ref, segments_ref, do_ref, log_total_ref, mean_dot_ref)
  dk, dv = _gradients_of_keys(p, num_blocks, *refs, scale)
  dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
  dv_ref[...] = dv.astype(dv_ref.dtype)

  def head(m, _):
    dq = _gradient_of_queries(p, m, *refs, scale)
    dq_ref[:, m, :] = (dq * scale).astype(dq_ref.dtype)

  jax.lax.fori_loop(0, q_ref.shape[1], head, None)


def _gradients_of_keys(
  j, num_blocks, q_ref, k_ref, v_ref, segments_ref, do_ref, log_total_ref, mean_dot_ref, scale
):
  """Returns (dk / scale, dv) of key block j, float32. Tiles have a key a row, a query a column, so
  that products take them as they come.
  """
  k, v, k_at = k_ref[_block(j), :], v_ref[_block(j), :], _positions(j)
  k_segments = segments_ref[_block(j)]

  def walk(m, i, carry):
    dk, dv = carry
    q, do = q_ref[_block(i), m, :], do_ref[_block(i), m, :]
    seen = k_at[:, None] <= _positions(i)[None, :]
    seen &= k_segments[:, None] == segments_ref[_block(i)][None, :]
    log2_total = log_total_ref[m, _block(i)] * _LOG2_E
    scores = triton.dot(k, q, trans_b=True) * (scale * _LOG2_E)
    weights = jnp.where(seen, jnp.exp2(scores - log2_total[None, :]), 0.0)
    dv += triton.dot(weights.astype(do.dtype), do)
    dweights = triton.dot(v, do, trans_b=True)
    dscores = weights * (dweights - mean_dot_ref[m, _block(i)][None, :])
    return dk + triton.dot(dscores.astype(q.dtype), q), dv

  zeros = jnp.zeros(k.shape, jnp.float32)
  head = lambda m, carry: jax.lax.fori_loop(j, num_blocks, functools.partial(walk, m), carry)
  return jax.lax.fori_loop(0, q_ref.shape[1], head, (zeros, zeros))


def _gradient_of_queries(
  i, m, q_ref, k_ref, v_ref, segments_ref, do_ref, log_total_ref, mean_dot_ref, scale
):
  """Returns dq / scale of query block i of head m, float32."""
  q, do, q_at = q_ref[_block(i), m, :], do_ref[_block(i), m, :], _positions(i)
  q_segments = segments_ref[_block(i)]
  log2_total, mean_dot = log_total_ref[m, _block(i)] * _LOG2_E, mean_dot_ref[m, _block(i)]

  def walk(j, dq):
    k, v = k_ref[_block(j), :], v_ref[_block(j), :]
    seen = q_at[:, None] >= _positions(j)[None, :]
    seen &= q_segments[:, None] == segments_ref[_block(j)][None, :]
    scores = triton.dot(q, k, trans_b=True) * (scale * _LOG2_E)
    weights = jnp.where(seen, jnp.exp2(scores - log2_total[:, None]), 0.0)
    dscores = weights * (triton.dot(do, v, trans_b=True) - mean_dot[:, None])
    return dq + triton.dot(dscores.astype(k.dtype), k)

  return jax.lax.fori_loop(0, i + 1, walk, jnp.zeros(q.shape, jnp.float32))


def _block(i):
  return pl.ds(i * BLOCK, BLOCK)


def _positions(i):
  return i * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
