"""The attention phase: this tensor rank's heads over whole sequences.

Local letters: n query heads and g key heads of this tensor rank, s positions of this tensor rank.
Knows attention's parameters; must not know the layer around it.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.model import attention_core, qk_norm
from moe_jax.model.layers import rotary
from moe_jax.parallel import collectives
from moe_jax.parallel.axes import TENSOR
from moe_jax.parallel.parameters import parameter
from moe_jax.pipeline.saving import residual


class Attention(nnx.Module):
  """Parameters: query [D, N, H], key and value [D, G, H], out [N, H, D], norms of query and key."""

  def __init__(self, model: config.Model, rngs: nnx.Rngs):
    D, N, G, H = model.d_model, model.heads, model.kv_heads, model.head_dim
    self.query = parameter(rngs, (D, N, H), ("model", "heads", "head_dim"), fan_in=D)
    self.key = parameter(rngs, (D, G, H), ("model", "kv_heads", "head_dim"), fan_in=D)
    self.value = parameter(rngs, (D, G, H), ("model", "kv_heads", "head_dim"), fan_in=D)
    self.out = parameter(rngs, (N, H, D), ("heads", "head_dim", "model"), fan_in=N * H)
    self.query_norm = qk_norm.make(model, N, "heads")
    self.key_norm = qk_norm.make(model, G, "kv_heads")


def project(
  weights: Attention, model: config.Model, x_SbD: jax.Array, positions_bS: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns queries `q_bSnH`, keys `k_bSgH` and values `v_bSgH` as attention takes them: normed,
  clipped and turned.

  Args:
    x_SbD: as `gather` returns it.
    positions_bS: of all of x.

  Communication: `qk_norm.over_projection`'s, for queries and for keys, where `model.qk_norm` is
  projection, else none.
  """
  q_bSnH, k_bSgH, v_bSgH = _products(
    x_SbD, (weights.query[...], weights.key[...], weights.value[...])
  )
  q_bSnH = qk_norm.apply(weights.query_norm, model, q_bSnH)
  k_bSgH = qk_norm.apply(weights.key_norm, model, k_bSgH)
  if model.clip_qkv:
    clip = lambda x: jnp.clip(x, -model.clip_qkv, model.clip_qkv)
    q_bSnH, k_bSgH, v_bSgH = map(clip, (q_bSnH, k_bSgH, v_bSgH))
  q_bSnH = rotary(q_bSnH, positions_bS, model.rope_theta)
  k_bSgH = rotary(k_bSgH, positions_bS, model.rope_theta)
  return q_bSnH, k_bSgH, v_bSgH


@jax.custom_vjp
def _products(x_SbD: jax.Array, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
  """Returns the products of x with each of the weights [D, heads, H], [b, S, heads, H].

  XLA makes one product of them. Not so of x's gradient, a sum of products, so it is written as one.
  """
  return tuple(swapped(jnp.einsum("sbd,dnh->sbnh", x_SbD, weight)) for weight in weights)


def _products_backward(saved, gradients):
  x_SbD, weights = saved
  d_bSj = jnp.concatenate([each.reshape(*each.shape[:2], -1) for each in gradients], -1)
  d_Sbj = swapped(d_bSj)
  weights_Dj = jnp.concatenate([each.reshape(len(each), -1) for each in weights], -1)
  d_Dj = jnp.einsum("sbd,sbj->dj", x_SbD, d_Sbj)
  ends = list(itertools.accumulate(weight[0].size for weight in weights))
  parts = zip(jnp.split(d_Dj, ends[:-1], 1), weights, strict=True)
  return jnp.einsum("sbj,dj->sbd", d_Sbj, weights_Dj), tuple(d.reshape(w.shape) for d, w in parts)


_products.defvjp(lambda *given: (_products(*given), given), _products_backward)


def attend(
  weights: Attention,
  model: config.Model,
  x_bsD: jax.Array,
  positions_bS: jax.Array,
  segments_bS: jax.Array,
) -> jax.Array:
  """Returns `y_bsD`, the attention output of this tensor rank's positions.

  Args:
    x_bsD: normed activations of this tensor rank's positions.
    positions_bS: of the whole sequence, restarting at each document.
    segments_bS: of the whole sequence.

  Communication: that of `gather`, `project` and `output`: all-gather over `tensor`,
  (tensor - 1) * x.size elements; reduce-scatter over `tensor`, as many; between them `project`'s.
  """
  q_bSnH, k_bSgH, v_bSgH = project(weights, model, gather(x_bsD), positions_bS)
  return output(weights, attention_core.attention(q_bSnH, k_bSgH, v_bSgH, segments_bS))


def gather(x_bsD: jax.Array) -> jax.Array:
  """Returns `x_SbD`, all positions, `swapped`.

  Communication: all-gather over `tensor`, (tensor - 1) * x.size elements.
  """
  return residual(collectives.gather(swapped(x_bsD), TENSOR, 0))


def output(weights: Attention, o_bSnH: jax.Array) -> jax.Array:
  """Returns `y_bsD`, the output of this tensor rank's positions, of what its heads found at all.

  Communication: reduce-scatter over `tensor`, (tensor - 1) * y.size elements.
  """
  y_SbD = _product(o_bSnH, weights.out[...])
  return swapped(collectives.reduce_scatter(y_SbD, TENSOR, 0))


@jax.custom_vjp
def _product(o_bSnH: jax.Array, out_nHD: jax.Array) -> jax.Array:
  """Returns `y_SbD`. Its gradient keeps o as attention's own does, or both would be saved."""
  return jnp.einsum("sbnh,nhd->sbd", swapped(o_bSnH), out_nHD)


def _product_backward(saved, dy_SbD):
  o_bSnH, out_nHD = saved
  do_SbnH = jnp.einsum("sbd,nhd->sbnh", dy_SbD, out_nHD)
  return swapped(do_SbnH), jnp.einsum("sbnh,sbd->nhd", swapped(o_bSnH), dy_SbD)


_product.defvjp(lambda *given: (_product(*given), given), _product_backward)


def swapped(x: jax.Array) -> jax.Array:
  """Returns `x_bS...` as `x_Sb...`, or back: XLA gathers and sums along the outermost axis, and
  would turn several sequences round for it. As it is where nothing is gathered, in spite of names.
  """
  return x.swapaxes(0, 1) if jax.lax.axis_size(TENSOR) > 1 else x
