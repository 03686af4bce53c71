"""The attention phase: this tensor rank's heads over whole sequences.

Local letters: n query heads and g key heads of this tensor rank, s positions of this tensor rank.
Knows attention's parameters; must not know the layer around it.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.model import blockwise
from moe_jax.model.layers import rotary
from moe_jax.parallel import collectives
from moe_jax.parallel.axes import TENSOR
from moe_jax.parallel.parameters import parameter


class Attention(nnx.Module):
  """Parameters: query [D, N, H], key and value [D, G, H], out [N, H, D]."""

  def __init__(self, model: config.Model, rngs: nnx.Rngs):
    D, N, G, H = model.d_model, model.heads, model.kv_heads, model.head_dim
    self.query = parameter(rngs, (D, N, H), ("model", "heads", "head_dim"), fan_in=D)
    self.key = parameter(rngs, (D, G, H), ("model", "kv_heads", "head_dim"), fan_in=D)
    self.value = parameter(rngs, (D, G, H), ("model", "kv_heads", "head_dim"), fan_in=D)
    self.out = parameter(rngs, (N, H, D), ("heads", "head_dim", "model"), fan_in=N * H)


def attend(
  weights: Attention,
  x_bsD: jax.Array,
  positions_bS: jax.Array,
  segments_bS: jax.Array,
  rope_theta: float,
) -> jax.Array:
  """Returns `y_bsD`, the attention output of this tensor rank's positions.

  Args:
    x_bsD: normed activations of this tensor rank's positions.
    positions_bS: of the whole sequence, restarting at each document.
    segments_bS: of the whole sequence.

  Communication: all-gather over `tensor`, (tensor - 1) * x.size elements; reduce-scatter over
  `tensor`, as many.
  """
  x_bSD = collectives.gather(x_bsD, TENSOR, 1)
  q_bSnH = jnp.einsum("bsd,dnh->bsnh", x_bSD, weights.query[...])
  k_bSgH = jnp.einsum("bsd,dgh->bsgh", x_bSD, weights.key[...])
  v_bSgH = jnp.einsum("bsd,dgh->bsgh", x_bSD, weights.value[...])
  q_bSnH = rotary(q_bSnH, positions_bS, rope_theta)
  k_bSgH = rotary(k_bSgH, positions_bS, rope_theta)
  o_bSnH = blockwise.attention(q_bSnH, k_bSgH, v_bSgH, segments_bS)
  y_bSD = jnp.einsum("bsnh,nhd->bsd", o_bSnH, weights.out[...])
  return collectives.reduce_scatter(y_bSD, TENSOR, 1)
