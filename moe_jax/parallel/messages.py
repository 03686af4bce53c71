"""Several arrays in one message: what is so short, or goes so far, that beginning a collective
counts.

To each device goes a message of its own, where a ring passes through n - 1 of them. As in
`collectives`, every function takes and returns this device's part and names what it sends. Knows
axes and arrays; must not know tokens, experts or stages.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.parallel import collectives


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_few(tree, inside: str, between: str):
  """Returns the parts of all devices along two axes, joined at the first dimension, `between`
  major, of arrays so small that mostly latency counts.

  All of them in one message, and along `between` one to each device, where a ring passes through
  n - 1 of them.

  Args:
    tree: arrays [t, ...] with the same t.

  Communication: all-gather over `inside`, (n - 1) * the arrays' elements, of as many bytes as those
  of the narrowest array; then all-to-all over `between`, (m - 1) * n * as many.
  """
  leaves, structure = jax.tree.flatten(tree)
  unit = min(leaf.dtype.itemsize for leaf in leaves)
  packed_tw = jnp.concatenate([_to_words(leaf, unit) for leaf in leaves], 1)
  of_host = collectives.gather(packed_tw, inside, 0)
  copies = jnp.broadcast_to(of_host[None], (jax.lax.axis_size(between), *of_host.shape))
  all_Mw = collectives.exchange(copies, between).reshape(-1, packed_tw.shape[1])
  parts, place = [], 0
  for leaf in leaves:
    width = leaf[0].size * leaf.dtype.itemsize // unit
    parts.append(_from_words(all_Mw[:, place : place + width], leaf))
    place += width
  return jax.tree.unflatten(structure, parts)


def _gather_few_forward(tree, inside, between):
  return gather_few(tree, inside, between), tree


def _gather_few_backward(inside, between, tree, gradients):
  home = lambda leaf, gradient: (
    reduce_scatter_few(gradient, inside, between)
    if jnp.issubdtype(leaf.dtype, jnp.inexact)
    else np.zeros(leaf.shape, jax.dtypes.float0)
  )
  return (jax.tree.map(home, tree, gradients),)


gather_few.defvjp(_gather_few_forward, _gather_few_backward)


def _to_words(x, num_bytes: int):
  """Returns the bits of `x`, [t, ...], as unsigned integers of so many bytes, [t, words]."""
  words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * num_bytes}"))
  return words.reshape(len(x), -1)


def _from_words(words_Mw, like):
  """Returns `_to_words` undone: [M, ...] as `like` is [t, ...]."""
  num_bytes, shape = words_Mw.dtype.itemsize, (len(words_Mw), *like.shape[1:])
  ratio = like.dtype.itemsize // num_bytes
  words = words_Mw.reshape(*shape, ratio) if ratio > 1 else words_Mw.reshape(shape)
  return jax.lax.bitcast_convert_type(words, like.dtype)


def reduce_scatter_few(x, inside: str, between: str):
  """Returns this device's piece, as `gather_few` joins them, of the sum over both axes, of so few
  bytes that mostly latency counts.

  Along `between` a direct message to each device, where a ring passes through n - 1 of them: 16 us
  against 45 us of 128 kB over 8 hosts by NCCL's own formulas.

  Communication: all-to-all over `between`, (m - 1) / m * x.size elements; then reduce-scatter over
  `inside`, (n - 1) / n * x.size / m elements.
  """
  x_m = x.reshape(jax.lax.axis_size(between), -1, *x.shape[1:])
  sum_of_hosts = collectives.exchange(x_m, between).sum(0, dtype=x.dtype)
  return collectives.reduce_scatter(sum_of_hosts, inside, 0)


def sum_few(tree, axes: str | tuple[str, ...]):
  """Returns the sums over `axes` of numbers so few that only latency counts, float32 or int32.

  Integers travel as two floats each, for XLA to send all of them in one message. Over up to 4,096
  devices their sums are exact all the same, if they are counts, and int32 holds the sum.

  Communication: all-reduce over `axes`, of the floats' and twice the integers' elements.
  """
  bits = 12  # of the lower part: sums of either stay below 2 ** 24, past which floats have gaps

  def total(x):
    if jnp.issubdtype(x.dtype, jnp.inexact):
      return jax.lax.psum(x, axes)
    low, high = x & (2**bits - 1), x >> bits
    low, high = (jax.lax.psum(part.astype(jnp.float32), axes) for part in (low, high))
    return (high.astype(x.dtype) << bits) + low.astype(x.dtype)

  return jax.tree.map(total, tree)


def send_together(leaves: list, axis_name: str) -> jax.Array:
  """Returns the arrays, of one dtype, of all devices along `axis_name`, flat, [n, elements]; a
  message to each device.

  Among many hosts a ring's steps take longer than as many messages: 141 us against 67 over 16 hosts
  by NCCL's own formulas, besides what the bytes take.

  Communication: all-to-all over `axis_name`, (n - 1) * w elements, w those of all arrays.
  """
  mine_w = jnp.concatenate([leaf.reshape(-1) for leaf in leaves])
  copies_nw = jnp.broadcast_to(mine_w, (jax.lax.axis_size(axis_name), mine_w.size))
  return collectives.exchange(copies_nw, axis_name)


def joined(all_nw: jax.Array, like: Sequence, dimensions: Sequence[int]) -> list:
  """Returns what `collectives.gather` does of each of the arrays that `send_together` sent, at its
  dimension.

  Args:
    all_nw: as it returned them.
    like: arrays or shapes, as they were sent.
  """
  num, found = len(all_nw), []
  parts = jnp.split(all_nw, np.cumsum([leaf.size for leaf in like])[:-1], 1)
  for part_nw, leaf, dimension in zip(parts, like, dimensions, strict=True):
    d = dimension % leaf.ndim
    shape = (*leaf.shape[:d], num * leaf.shape[d], *leaf.shape[d + 1 :])
    found.append(jnp.moveaxis(part_nw.reshape(num, *leaf.shape), 0, d).reshape(shape))
  return found


def reduce_scatter_together(leaves: list, axis_name: str, dimensions: Sequence[int]) -> list:
  """Returns what `collectives.reduce_scatter` does of several arrays of one dtype, each at its
  dimension, in one message to each device, as `send_together` does; added up in float32.

  Communication: all-to-all over `axis_name`, (n - 1) / n * w elements, w those of all arrays.
  """
  num = jax.lax.axis_size(axis_name)
  pieces, shapes = [], []
  for leaf, dimension in zip(leaves, dimensions, strict=True):
    d = dimension % leaf.ndim
    shapes.append((*leaf.shape[:d], leaf.shape[d] // num, *leaf.shape[d + 1 :]))
    cut = leaf.reshape(*leaf.shape[:d], num, *shapes[-1][d:])
    pieces.append(jnp.moveaxis(cut, d, 0).reshape(num, -1))
  found_nw = collectives.exchange(jnp.concatenate(pieces, 1), axis_name)
  sum_w = found_nw.sum(0, dtype=jnp.float32).astype(found_nw.dtype)
  parts = jnp.split(sum_w, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
  return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
