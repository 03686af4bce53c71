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
  weights: Attention, model: config.Model, x_bSD: jax.Array, positions_bS: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns queries `q_bSnH`, keys `k_bSgH` and values `v_bSgH` as attention takes them: normed,
  clipped and turned.

  Communication: `qk_norm.over_projection`'s, for queries and for keys, where `model.qk_norm` is
  projection, else none.
  """
  q_bSnH, k_bSgH, v_bSgH = _products(
    x_bSD, (weights.query[...], weights.key[...], weights.value[...])
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
def _products(x_bSD: jax.Array, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
  """Returns the products of x with each of the weights [D, heads, H].

  XLA makes one product of them. Not so of x's gradient, a sum of products, so it is written as one.
  """
  return tuple(jnp.einsum("bsd,dnh->bsnh", x_bSD, weight) for weight in weights)


def _products_backward(saved, gradients):
  x_bSD, weights = saved
  d_bSj = jnp.concatenate([each.reshape(*each.shape[:2], -1) for each in gradients], -1)
  weights_Dj = jnp.concatenate([each.reshape(len(each), -1) for each in weights], -1)
  d_Dj = jnp.einsum("bsd,bsj->dj", x_bSD, d_bSj)
  ends = list(itertools.accumulate(weight[0].size for weight in weights))
  parts = zip(jnp.split(d_Dj, ends[:-1], 1), weights, strict=True)
  return jnp.einsum("bsj,dj->bsd", d_bSj, weights_Dj), tuple(d.reshape(w.shape) for d, w in parts)


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

  Communication: all-gather over `tensor`, (tensor - 1) * x.size elements; reduce-scatter over
  `tensor`, as many; between them `project`'s.
  """
  x_bSD = residual(collectives.gather(x_bsD, TENSOR, 1))
  q_bSnH, k_bSgH, v_bSgH = project(weights, model, x_bSD, positions_bS)
  o_bSnH = attention_core.attention(q_bSnH, k_bSgH, v_bSgH, segments_bS)
  y_bSD = jnp.einsum("bsnh,nhd->bsd", o_bSnH, weights.out[...])
  return collectives.reduce_scatter(y_bSD, TENSOR, 1)
