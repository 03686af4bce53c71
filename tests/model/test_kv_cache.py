"""The cache as arrays: what is written is read, in every format; nothing is written nowhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config
from moe_jax.model import cached_attention, kv_cache
from tests.serve import case

L, A, J, G, H = 2, 6, 4, 2, 8
# Relative to the largest number of a head: half a step, with 8 bits of significand in bfloat16 and
# 4 in float8 (the leading one counted).
ERROR = {"float32": 0.0, "bfloat16": 2**-8, "int8": 0.51 / 127, "float8": 2**-4}


def empty(kv_dtype):
  settings = case.settings_of((1, 1, 1), kv_dtype=kv_dtype)
  shape = (L, A, G, J, H)
  resize = lambda leaf: jnp.zeros(shape[: leaf.ndim], leaf.dtype)
  return jax.tree.map(resize, kv_cache.abstract(settings))


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32)


@pytest.mark.parametrize("kv_dtype", kv_cache.FORMATS)
def test_what_is_written_is_read(kv_dtype):
  cache, layer = empty(kv_dtype), jnp.int32(1)
  k, v = normal(2, 2 * J, G, H), normal(2, 2 * J, G, H, seed=1)
  pages = jnp.asarray([[4, 0], [2, -1]], jnp.int32)
  cache = kv_cache.write_pages(cache, layer, pages, jnp.asarray(k), jnp.asarray(v))
  one_k, one_v = normal(2, G, H, seed=2), normal(2, G, H, seed=3)
  page, offset = jnp.asarray([0, -1], jnp.int32), jnp.asarray([3, 1], jnp.int32)
  cache = kv_cache.write_tokens(cache, layer, page, offset, jnp.asarray(one_k), jnp.asarray(one_v))
  k[0, J + 3], v[0, J + 3] = one_k[0], one_v[0]  # the other row's went nowhere
  found = kv_cache.read(cache, layer, pages, jnp.float32)
  for got, wanted in zip(found, (k, v), strict=True):
    got = np.asarray(got)
    bound = ERROR[kv_dtype] * np.abs(wanted).max(-1, keepdims=True)
    assert (np.abs(got[0] - wanted[0]) <= bound[0]).all()
    assert (np.abs(got[1, :J] - wanted[1, :J]) <= bound[1, :J]).all()
  untouched = np.asarray(cache.key_lAgJH.astype(jnp.float32))
  assert not untouched[0].any() and not untouched[1, [1, 3, 5]].any()


@pytest.mark.parametrize("kv_dtype", ["int8", "float8"])
def test_zeros_and_tiny_numbers_stay_finite(kv_dtype):
  cache = empty(kv_dtype)
  k = jnp.zeros((1, J, G, H)).at[0, 0].set(1e-38)
  cache = kv_cache.write_pages(cache, jnp.int32(0), jnp.zeros((1, 1), jnp.int32), k, k)
  found, _ = kv_cache.read(cache, jnp.int32(0), jnp.zeros((1, 1), jnp.int32), jnp.float32)
  assert jnp.isfinite(found).all() and jnp.abs(found).max() < 1e-37


def test_config_knows_the_same_formats():
  assert set(config.KV_DTYPES) == set(kv_cache.FORMATS)


@pytest.mark.parametrize("kv_dtype", kv_cache.FORMATS)
def test_bytes_follow_the_format(kv_dtype):
  settings = case.settings_of((2, 2, 2), kv_dtype=kv_dtype)
  head_dim = 32
  settings = dataclasses.replace(
    settings, model=dataclasses.replace(settings.model, head_dim=head_dim)
  )
  found = sum(leaf.size * leaf.dtype.itemsize for leaf in kv_cache.abstract(settings)[:4] if leaf)
  per_head = {"float32": 128, "bfloat16": 64, "int8": 36, "float8": 36}[kv_dtype]
  tokens = kv_cache.num_pages(settings) * 2 * settings.serve.page
  assert found == 2 * settings.model.layers * settings.model.kv_heads * tokens * per_head


def naive(q_SNH, k_MGH, v_MGH, is_seen_SM):
  k, v = (np.repeat(x, q_SNH.shape[1] // x.shape[1], 1) for x in (k_MGH, v_MGH))
  scores = np.einsum("snh,mnh->snm", q_SNH, k) / np.sqrt(q_SNH.shape[-1])
  weights = np.exp(np.where(is_seen_SM[:, None], scores, -np.inf))
  return np.einsum("snm,mnh->snh", weights / weights.sum(-1, keepdims=True), v)


def test_one_token_attends_to_what_is_cached():
  q, k, v = normal(3, 4, H), normal(3, 10, G, H, seed=1), normal(3, 10, G, H, seed=2)
  lengths = np.array([1, 10, 4], np.int32)
  pages = lambda x: x.reshape(3, 5, 2, G, H).swapaxes(2, 3)
  found = cached_attention.one_token(*map(jnp.asarray, (q, pages(k), pages(v), lengths)))
  for b, length in enumerate(lengths):
    expected = naive(q[b][None], k[b], v[b], np.arange(10)[None] < length)
    np.testing.assert_allclose(found[b], expected[0], atol=1e-5)


@pytest.mark.parametrize(("S", "M"), [(6, 0), (6, 4), (6, 12), (300, 200)])
def test_a_chunk_attends_to_the_context_and_to_itself(S, M):
  starts = np.minimum(np.array([0, M // 2, M], np.int32), M)
  q = normal(3, S, 4, H)
  k, v = normal(3, S, G, H, seed=1), normal(3, S, G, H, seed=2)
  context_k, context_v = normal(3, M, G, H, seed=3), normal(3, M, G, H, seed=4)
  found = cached_attention.chunk(*map(jnp.asarray, (q, k, v, context_k, context_v, starts)))
  for b, start in enumerate(starts):
    is_seen = np.concatenate(
      [np.broadcast_to(np.arange(M) < start, (S, M)), np.tri(S, dtype=bool)], 1
    )
    both = lambda old, new, b=b: np.concatenate([old[b], new[b]])
    expected = naive(q[b], both(context_k, k), both(context_v, v), is_seen)
    np.testing.assert_allclose(found[b], expected, atol=2e-5)
