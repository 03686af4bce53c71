"""The key-value cache: pages that any sequence of the rank may hold, so memory follows use.

Layers lie over `stage`, pages over `data` and `expert`, heads over `tensor`: a page belongs to the
rank of both that holds its sequence, and is numbered within it. Which sequence holds which page is
the caller's table; here a page of -1 is none: nothing is written to it, and what is read of it is
to be masked. int8 and float8 keep a float32 scale for each token and head. In a page a head's
tokens lie together, as products with one head's query read them.

Letters: A pages of a rank, J tokens of a page, W pages in a row of the table, M = W * J; g key
heads of this tensor rank, l layers of this stage. Knows arrays; must not know attention or who
gives out pages.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.parallel.axes import SEQUENCES, STAGE, TENSOR


class Cache(NamedTuple):
  """Keys and values of all layers, in the pipeline's placement; scales are None without them."""

  key_lAgJH: jax.Array
  value_lAgJH: jax.Array
  key_scale_lAgJ: jax.Array | None
  value_scale_lAgJ: jax.Array | None


class _Format(NamedTuple):
  """How a number is kept: as it is, or over a scale by which the largest becomes `largest`."""

  dtype: jnp.dtype
  largest: float | None


FORMATS = {
  "float32": _Format(jnp.dtype(jnp.float32), None),
  "bfloat16": _Format(jnp.dtype(jnp.bfloat16), None),
  "int8": _Format(jnp.dtype(jnp.int8), 127.0),
  # Source: FP8 Formats for Deep Learning (arXiv:2209.05433), table 1.
  "float8": _Format(jnp.dtype(jnp.float8_e4m3fn), 448.0),
}


def pages_of(num_tokens: int, page_tokens: int) -> int:
  """Returns how many pages hold `num_tokens`."""
  return -(-num_tokens // page_tokens)


def num_pages(settings: config.Config) -> int:
  """Returns A, the pages of each rank of `data` and `expert`: at least those of one longest
  sequence.
  """
  serve = settings.serve
  longest = pages_of(serve.max_tokens, serve.page)
  all_slots = serve.slots * settings.mesh.stage * longest
  return max(longest, round(serve.pages_fraction * all_slots))


def abstract(settings: config.Config) -> Cache:
  """Returns shapes and dtypes of the whole cache."""
  model, serve = settings.model, settings.serve
  format_ = FORMATS[serve.kv_dtype]
  num = num_pages(settings) * settings.mesh.sequence_shares
  shape = (model.layers, num, model.kv_heads, serve.page, model.head_dim)
  numbers = jax.ShapeDtypeStruct(shape, format_.dtype)
  scales = None if format_.largest is None else jax.ShapeDtypeStruct(shape[:-1], jnp.float32)
  return Cache(numbers, numbers, scales, scales)


def specs(settings: config.Config) -> Cache:
  """Returns the PartitionSpec of every array of the cache."""
  return jax.tree.map(lambda leaf: P(STAGE, SEQUENCES, TENSOR), abstract(settings))


def write_pages(
  cache: Cache, layer: jax.Array, pages_bW: jax.Array, k_bMgH: jax.Array, v_bMgH: jax.Array
) -> Cache:
  """Returns the cache with the rows' W pages of a layer filled.

  Args:
    cache: this device's.
    layer: index of the stage's layer.
    pages_bW: which page each W-th part of the row fills, int32; -1 for none.
    k_bMgH: keys, turned by their positions.
    v_bMgH: values.
  """
  J = cache.key_lAgJH.shape[3]
  b, W = pages_bW.shape
  split = lambda x: x.reshape(b, W, J, *x.shape[2:]).swapaxes(2, 3)
  return _write(cache, (layer, _or_nowhere(cache, pages_bW)), split(k_bMgH), split(v_bMgH))


def write_tokens(
  cache: Cache, layer: jax.Array, pages_b, offsets_b, k_bgH: jax.Array, v_bgH: jax.Array
) -> Cache:
  """Returns the cache with one token of each row written, at `offsets_b` of the page `pages_b`."""
  at = (layer, _or_nowhere(cache, pages_b), slice(None), offsets_b)
  return _write(cache, at, k_bgH, v_bgH)


def read(
  cache: Cache, layer: jax.Array, pages_bW: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
  """Returns keys and values `k_bMgH`, `v_bMgH` of the rows' pages, in the dtype given."""
  in_order = lambda x_bWgJH: x_bWgJH.swapaxes(2, 3).reshape(
    len(pages_bW), -1, x_bWgJH.shape[2], x_bWgJH.shape[4]
  )
  k_bWgJH, v_bWgJH = read_pages(cache, layer, pages_bW, dtype)
  return in_order(k_bWgJH), in_order(v_bWgJH)


def read_pages(
  cache: Cache, layer: jax.Array, pages_bW: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
  """Returns what `read` does as it lies in the pages, `k_bWgJH`, `v_bWgJH`."""
  pages_bW = jnp.maximum(pages_bW, 0)

  def one(numbers_lAgJH, scale_lAgJ):
    take = lambda x: x.at[layer, pages_bW].get(mode="promise_in_bounds")
    x_bWgJH = take(numbers_lAgJH)
    if scale_lAgJ is not None:
      x_bWgJH = x_bWgJH.astype(jnp.float32) * take(scale_lAgJ)[..., None]
    return x_bWgJH.astype(dtype)

  return (
    one(cache.key_lAgJH, cache.key_scale_lAgJ),
    one(cache.value_lAgJH, cache.value_scale_lAgJ),
  )


def _or_nowhere(cache: Cache, pages):
  """Returns the pages, where there is none an index past the last, at which nothing is written."""
  return jnp.where(pages >= 0, pages, cache.key_lAgJH.shape[1])


def _write(cache: Cache, index, k, v) -> Cache:
  def one(numbers_lAgJH, scale_lAgJ, x):
    put = lambda all, new: all.at[index].set(new.astype(all.dtype), mode="drop")
    if scale_lAgJ is None:
      return put(numbers_lAgJH, x), None
    x, scale = _scaled(x.astype(jnp.float32), numbers_lAgJH.dtype)
    return put(numbers_lAgJH, x), put(scale_lAgJ, scale)

  key, key_scale = one(cache.key_lAgJH, cache.key_scale_lAgJ, k)
  value, value_scale = one(cache.value_lAgJH, cache.value_scale_lAgJ, v)
  return Cache(key, value, key_scale, value_scale)


def _scaled(x, dtype):
  """Returns x over its scale, within the range of `dtype`, and the scale without the last axis."""
  largest = next(f.largest for f in FORMATS.values() if f.dtype == dtype)
  scale = jnp.maximum(jnp.abs(x).max(-1), jnp.finfo(jnp.float32).tiny * largest) / largest
  x = x / scale[..., None]
  return jnp.round(x) if jnp.issubdtype(dtype, jnp.integer) else x, scale
