"""A layer, embedding and head with a key-value cache: of chunks of prompts, and of one token each.

Per-device programs for inside the manual region; the mathematics is that of `model.transformer`.
In a chunk, positions lie over `tensor` between layers; where each sequence brings one token, the
sequences do, so that both look alike to norms, attention's collectives and the dispatch. What is
padding, or of an idle cell, is routed to no expert and writes to no page.

Letters: b rows of this rank of `data` and `expert`; c rows with empty ones added to a multiple of
`tensor`; W pages of a row. Knows the model; must not know schedules, requests or who gives out
pages.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.model import attention, cached_attention, kv_cache, transformer
from moe_jax.model.kv_cache import Cache
from moe_jax.model.layers import rms_norm
from moe_jax.model.transformer import Layer, Shared, experts_in_stack
from moe_jax.moe import few_tokens, layer, router
from moe_jax.moe.experts import Stacked
from moe_jax.parallel import collectives
from moe_jax.parallel.axes import EXPERT, STAGE, TENSOR

# What a layer's two parts read of it, beside the experts, which stay as they lie.
_ATTENTION, _ROUTER = ("attention_norm", "attention"), ("expert_norm", "router")


class Chunk(NamedTuple):
  """A micro-batch of prefill: chunks of prompts, one a row, padded on the right.

  Attributes:
    tokens_bS: int32; what stands behind a row's length is padding.
    starts_b: position of each row's first token, a multiple of the page, int32.
    lengths_b: tokens of the row; 0 for an empty row, int32.
    context_bW: the pages before the chunk, of which the first `starts_b` tokens are attended to,
      int32; W = 0 where all rows begin their sequences.
    pages_bW: the pages that the chunk fills, -1 for none, int32; W = S / page.
  """

  tokens_bS: jax.Array
  starts_b: jax.Array
  lengths_b: jax.Array
  context_bW: jax.Array
  pages_bW: jax.Array


class Tokens(NamedTuple):
  """A micro-batch of decode: a token of each row.

  Attributes:
    tokens_b: int32.
    positions_b: of the token in its sequence, int32.
    is_active_b: rows that run.
    pages_bW: the row's pages from its first on, -1 for none, int32.
  """

  tokens_b: jax.Array
  positions_b: jax.Array
  is_active_b: jax.Array
  pages_bW: jax.Array


class Report(NamedTuple):
  """What one layer says of one micro-batch on this device, int32.

  Attributes:
    assigned_E: assignments per expert, without padding.
    dropped: assignments that no expert served.
  """

  assigned_E: jax.Array
  dropped: jax.Array


class Model(NamedTuple):
  """The network with a cache, as per-device functions.

  Attributes:
    embed_chunk: (shared, Chunk) -> `x_bsD`.
    embed_tokens: (shared, Tokens) -> `x_1cD`.
    layer_of_chunk: (layers, index, x_bsD, Chunk, Cache, runs) -> (y, Cache, Report).
    attention_of_chunk: (layers, index, x_bsD, Chunk, before, Cache, runs) -> (x, Cache, keys and
      values), the first part of that layer; `before` are keys and values of positions between the
      cached ones and the chunk's, () for none.
    experts_of_chunk: (layers, index, x_bsD, Chunk, runs) -> (y, Report), the rest of it.
    last_layer_of_chunk: as `layer_of_chunk`, of which only what `pick_last` picks is asked.
    layer_of_tokens: (layers, index, x_1cD, Tokens, Cache, runs) -> (y, Cache, Report).
    pick_last: (y_bsD, Chunk) -> `y_bD`, each row's last token where this tensor rank holds it, else
      zero.
    last_logits: (shared, y_bD) -> `logits_bV`, float32, of the sum of `y_bD` over `tensor`.
    token_logits: (shared, y_1cD, Tokens) -> `logits_bV`.
  """

  embed_chunk: Callable
  embed_tokens: Callable
  layer_of_chunk: Callable
  attention_of_chunk: Callable
  experts_of_chunk: Callable
  last_layer_of_chunk: Callable
  layer_of_tokens: Callable
  pick_last: Callable
  last_logits: Callable
  token_logits: Callable


def functions(settings: config.Config) -> Model:
  """Returns the functions of a deployment's model; no token is dropped, whatever `moe.dispatch`."""
  model = settings.model
  layer_definition = nnx.graphdef(nnx.eval_shape(lambda: Layer(model, nnx.Rngs(0))))
  shared_definition = nnx.graphdef(nnx.eval_shape(lambda: Shared(model, nnx.Rngs(0))))
  merge = lambda shared: nnx.merge(shared_definition, shared)

  def weights_of(layers, index, names) -> Layer:
    """Returns a layer of which these parts are cut out of the stack, and no others may be read."""
    at = lambda name: jax.tree.map(lambda leaf: leaf[index], layers[name])
    return nnx.merge(
      layer_definition, nnx.State({n: at(n) if n in names else layers[n] for n in layers})
    )

  def attention_of_chunk(layers, index, x_bsD, chunk: Chunk, before, cache: Cache, runs):
    weights = weights_of(layers, index, _ATTENTION)
    attend = lambda h_bsD: _attend_chunk(weights, model, index, h_bsD, chunk, before, cache, runs)
    return _add_attention(weights, model, x_bsD, attend)

  def experts_of_chunk(layers, index, x_bsD, chunk: Chunk, runs):
    size = x_bsD.shape[1]
    place_s = jax.lax.axis_index(TENSOR) * size + jnp.arange(size, dtype=jnp.int32)
    is_real_bs = (place_s[None, :] < chunk.lengths_b[:, None]) & runs
    weights, experts = weights_of(layers, index, _ROUTER), experts_in_stack(layers, index)
    return _add_experts(weights, settings, experts, x_bsD, is_real_bs)

  def layer_of_chunk(layers, index, x_bsD, chunk: Chunk, cache: Cache, runs):
    x_bsD, cache, _ = attention_of_chunk(layers, index, x_bsD, chunk, (), cache, runs)
    y_bsD, report = experts_of_chunk(layers, index, x_bsD, chunk, runs)
    return y_bsD, cache, report

  def layer_of_tokens(layers, index, x_1cD, tokens: Tokens, cache: Cache, runs):
    weights = weights_of(layers, index, _ATTENTION + _ROUTER)
    experts = experts_in_stack(layers, index)
    attend = lambda h_1cD: _attend_tokens(weights, model, index, h_1cD, tokens, cache, runs)
    x_1cD, cache = _add_attention(weights, model, x_1cD, attend)
    is_real_1c = _my_share(tokens.is_active_b & runs)
    y_1cD, report = _add_experts(weights, settings, experts, x_1cD, is_real_1c)
    return y_1cD, cache, report

  def last_layer_of_chunk(layers, index, x_bsD, chunk: Chunk, cache: Cache, runs):
    # Of all tokens only keys and values, which later ones attend to; the rest of the last one.
    weights = weights_of(layers, index, _ATTENTION)
    with jax.named_scope("attention"):
      h_bsD = rms_norm(weights.attention_norm.scale[...], x_bsD, model.norm_epsilon)
      _, cache, _ = _write_chunk(weights, model, index, h_bsD, chunk, cache, runs)
    x_bD = jax.lax.psum(_pick_last(x_bsD, chunk), TENSOR)
    tokens = _last_tokens(chunk, settings.serve.page)
    y_1cD, cache, report = layer_of_tokens(layers, index, _my_share(x_bD), tokens, cache, runs)
    y_bD = collectives.gather(y_1cD, TENSOR, 1)[0, : x_bD.shape[0]]
    place_b, is_mine_b = _last_places(x_bsD, chunk)
    row_b = jnp.arange(x_bD.shape[0], dtype=jnp.int32)
    nowhere_b = jnp.where(is_mine_b, place_b, x_bsD.shape[1])
    return x_bsD.at[row_b, nowhere_b].set(y_bD, mode="drop"), cache, report

  return Model(
    embed_chunk=lambda shared, chunk: transformer.embed(merge(shared), chunk.tokens_bS),
    embed_tokens=lambda shared, t: transformer.embed(merge(shared), _padded(t.tokens_b)),
    layer_of_chunk=layer_of_chunk,
    attention_of_chunk=attention_of_chunk,
    experts_of_chunk=experts_of_chunk,
    last_layer_of_chunk=last_layer_of_chunk,
    layer_of_tokens=layer_of_tokens,
    pick_last=_pick_last,
    last_logits=lambda shared, y_bD: _last_logits(merge(shared), model, y_bD),
    token_logits=lambda shared, y_1cD, t: _token_logits(merge(shared), model, y_1cD, t),
  )


def _add_attention(weights: Layer, model: config.Model, x, attend: Callable):
  with jax.named_scope("attention"):
    h = rms_norm(weights.attention_norm.scale[...], x, model.norm_epsilon)
    y, *others = attend(h)
    return x + y, *others


def _attend_chunk(weights: Layer, model, index, h_bsD, chunk: Chunk, before, cache: Cache, runs):
  """Returns attention's output, the cache with the chunk written, and keys and values.

  Args:
    before: keys and values of positions between the cached ones and the chunk's, or ().

  Communication: `_write_chunk`'s; reduce-scatter over `tensor`, (tensor - 1) * x.size elements.
  """
  q_bSnH, cache, own = _write_chunk(weights, model, index, h_bsD, chunk, cache, runs)
  S = q_bSnH.shape[1]
  context = kv_cache.read(cache, index, chunk.context_bW, h_bsD.dtype)
  keys = [jnp.concatenate(parts, 1) for parts in zip(before, own, strict=True)] if before else own
  num_cached_b = chunk.starts_b - (keys[0].shape[1] - S)
  o_bSnH = cached_attention.chunk(q_bSnH, *keys, *context, num_cached_b)
  return attention.output(weights.attention, o_bSnH), cache, tuple(own)


def _write_chunk(weights: Layer, model, index, h_bsD, chunk: Chunk, cache: Cache, runs):
  """Returns the chunk's queries, the cache with its keys and values written, and these.

  Communication: all-gather over `tensor`, (tensor - 1) * x.size elements; `attention.project`'s.
  """
  S = h_bsD.shape[1] * jax.lax.axis_size(TENSOR)
  positions_bS = chunk.starts_b[:, None] + jnp.arange(S, dtype=jnp.int32)[None, :]
  q_bSnH, *own = attention.project(weights.attention, model, attention.gather(h_bsD), positions_bS)
  pages_bW = jnp.where(runs, chunk.pages_bW, -1)
  return q_bSnH, kv_cache.write_pages(cache, index, pages_bW, *own), own


def _attend_tokens(weights: Layer, model, index, h_1cD, tokens: Tokens, cache: Cache, runs):
  """Returns attention's output and the cache with the tokens written.

  Communication: as `_attend_chunk`, of c rows.
  """
  b = tokens.tokens_b.shape[0]
  h_b1D = collectives.gather(h_1cD, TENSOR, 1)[0, :b, None]
  positions_b = tokens.positions_b
  q_b1nH, k_b1gH, v_b1gH = attention.project(
    weights.attention, model, attention.swapped(h_b1D), positions_b[:, None]
  )
  page_tokens = cache.key_lAgJH.shape[3]
  place_b1 = jnp.minimum(positions_b // page_tokens, tokens.pages_bW.shape[1] - 1)[:, None]
  page_b = jnp.take_along_axis(tokens.pages_bW, place_b1, 1)[:, 0]
  page_b = jnp.where(tokens.is_active_b & runs, page_b, -1)
  offset_b = positions_b % page_tokens
  cache = kv_cache.write_tokens(cache, index, page_b, offset_b, k_b1gH[:, 0], v_b1gH[:, 0])
  k_bWgJH, v_bWgJH = kv_cache.read_pages(cache, index, tokens.pages_bW, h_b1D.dtype)
  o_bnH = cached_attention.one_token(q_b1nH[:, 0], k_bWgJH, v_bWgJH, positions_b + 1)
  y_bD = jnp.einsum("bnh,nhd->bd", o_bnH, weights.attention.out[...])
  return collectives.reduce_scatter(_padded(y_bD), TENSOR, 1), cache


def _add_experts(weights: Layer, settings: config.Config, experts: Stacked, x_bsD, is_real_bs):
  """Returns x plus what the experts make of the real tokens, and the report.

  Communication: the dispatch's, of `gathered` where few tokens make it the cheaper one, else of
  `dropless`.
  """
  model, num_experts = settings.model, settings.model.experts
  h_bsD = rms_norm(weights.expert_norm.scale[...], x_bsD, model.norm_epsilon)
  h_tD = h_bsD.reshape(-1, h_bsD.shape[-1])
  with jax.named_scope("dispatch"):
    routing, logits_tE = router.route(
      weights.router.kernel[...], h_tD, model.experts_per_token, model.normalize_choices,
      router.limit_to_hosts(settings.moe.expert_ranks_per_host, settings.moe.hosts_per_token),
      weights.router.choice_bias(),
    )  # fmt: skip
    is_real_t1 = is_real_bs.reshape(-1, 1)
    routing = routing._replace(experts_TK=jnp.where(is_real_t1, routing.experts_TK, num_experts))
    assigned_E = router.assignments_per_expert(routing.experts_TK, num_experts)
  num_tokens = h_tD.shape[0] * jax.lax.axis_size(EXPERT) * jax.lax.axis_size(TENSOR)
  moe = few_tokens.way(settings.moe, num_tokens, h_tD.shape[1], h_tD.dtype.itemsize)
  y_tD, plan = layer.serve(experts, moe, routing, logits_tE, h_tD)
  dropped = jnp.sum((plan.expert_TK == num_experts) & is_real_t1, dtype=jnp.int32)
  return x_bsD + y_tD.reshape(x_bsD.shape), Report(assigned_E, dropped)


def _last_places(y_bsD, chunk: Chunk) -> tuple[jax.Array, jax.Array]:
  """Returns where each row's last token lies on this tensor rank, and whether it does."""
  size = y_bsD.shape[1]
  last_b = jnp.maximum(chunk.lengths_b - 1, 0) - jax.lax.axis_index(TENSOR) * size
  return jnp.clip(last_b, 0, size - 1), (last_b >= 0) & (last_b < size)


def _pick_last(y_bsD, chunk: Chunk) -> jax.Array:
  """Returns `y_bD`, each row's last token where this tensor rank holds it, else zero."""
  place_b, is_mine_b = _last_places(y_bsD, chunk)
  y_bD = jnp.take_along_axis(y_bsD, place_b[:, None, None], 1)[:, 0]
  return jnp.where(is_mine_b[:, None], y_bD, jnp.zeros_like(y_bD))


def _last_tokens(chunk: Chunk, page: int) -> Tokens:
  """Returns each row's last token, as decode takes it; its pages are those of the context that
  count, then the chunk's own.
  """
  last_b = jnp.maximum(chunk.lengths_b - 1, 0)
  num_context = chunk.context_bW.shape[1]
  pages_bW = jnp.concatenate([chunk.context_bW, chunk.pages_bW], 1)
  place_bW = jax.lax.broadcasted_iota(jnp.int32, pages_bW.shape, 1)
  before_b1 = chunk.starts_b[:, None] // page
  own_bW = jnp.minimum(num_context + place_bW - before_b1, pages_bW.shape[1] - 1)
  at_bW = jnp.where(place_bW < before_b1, place_bW, own_bW)
  return Tokens(
    tokens_b=jnp.take_along_axis(chunk.tokens_bS, last_b[:, None], 1)[:, 0],
    positions_b=chunk.starts_b + last_b,
    is_active_b=chunk.lengths_b > 0,
    pages_bW=jnp.take_along_axis(pages_bW, at_bW, 1),
  )


def _last_logits(shared: Shared, model: config.Model, y_bD) -> jax.Array:
  """Returns `logits_bV` of the next token, on every device, of the sum of `y_bD` over `tensor`.

  Communication: all-reduce over `tensor` of b * D elements; then `_whole`'s.
  """
  h_bD = rms_norm(shared.final_norm.scale[...], jax.lax.psum(y_bD, TENSOR), model.norm_epsilon)
  return _whole(
    jnp.einsum("bd,dv->bv", h_bD, shared.head_kernel(), preferred_element_type=jnp.float32)
  )


def _token_logits(shared: Shared, model: config.Model, y_1cD, tokens: Tokens) -> jax.Array:
  """Returns `logits_bV` of the token after each row's, on every device.

  Communication: `transformer.head_logits`'s; then `_whole`'s.
  """
  logits_1cv = transformer.head_logits(shared, model, y_1cD)
  return _whole(logits_1cv[0, : tokens.tokens_b.shape[0]])


def _whole(logits_bv: jax.Array) -> jax.Array:
  """Returns the logits of the whole vocabulary.

  Communication: all-gather over `tensor`, then over `stage`, of b * V / n elements each device.
  """
  return collectives.gather(collectives.gather(logits_bv, TENSOR, 1), STAGE, 1)


def _padded(x_b: jax.Array) -> jax.Array:
  """Returns `x_1c`: with empty rows added, to a multiple of `tensor`."""
  widths = [(0, -x_b.shape[0] % jax.lax.axis_size(TENSOR))] + [(0, 0)] * (x_b.ndim - 1)
  return jnp.pad(x_b, widths)[None]


def _my_share(x_b: jax.Array) -> jax.Array:
  """Returns this tensor rank's part of `_padded(x_b)`, along its rows."""
  x_1c = _padded(x_b)
  size = x_1c.shape[1] // jax.lax.axis_size(TENSOR)
  return jax.lax.dynamic_slice_in_dim(x_1c, jax.lax.axis_index(TENSOR) * size, size, 1)
