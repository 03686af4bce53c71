"""What an expert computes: a SwiGLU feed-forward network, all experts of this device in one batch.

Letters: e experts of this device, R rows per expert, f this tensor rank's share of the hidden
units; 2 stands for gates and what they let through. Knows rows and weights; must not know where
rows come from.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.parallel.collectives import varying_like
from moe_jax.pipeline.saving import residual


class Weights(NamedTuple):
  """Of this device's experts.

  Gate and up are one array, for they multiply the same rows: two would be joined, and their
  gradients cut apart, in every layer.
  """

  gate_up_eD2f: jax.Array
  down_efD: jax.Array

  @property
  def num_experts(self) -> int:
    return self.down_efD.shape[-3]

  @property
  def num_hidden(self) -> int:
    """f."""
    return self.down_efD.shape[-2]


class Stacked(NamedTuple):
  """Weights of one layer where they lie: kernels read them there, what else there is cuts them out.

  Attributes:
    stack: of several layers, leaves [L, e, ...].
    layer: which of them.
  """

  stack: Weights
  layer: jax.Array | int

  @property
  def num_experts(self) -> int:
    return self.stack.num_experts

  @property
  def num_hidden(self) -> int:
    """f."""
    return self.stack.num_hidden

  def cut(self) -> Weights:
    """Returns the layer's weights."""
    return jax.tree.map(lambda w: w[self.layer], self.stack)


def swiglu(weights: Weights, rows_eRD: jax.Array) -> jax.Array:
  """Returns this tensor rank's partial sums `rows_eRD`; the sum over `tensor` is the experts'
  output.

  Source: GLU Variants Improve Transformer (arXiv:2002.05202), equation 6.
  """
  weights = varying_like(weights, rows_eRD)
  gate_up_eR2f = residual(_gate_up(rows_eRD, weights.gate_up_eD2f))
  return jnp.einsum("erf,efd->erd", _gated(gate_up_eR2f), weights.down_efD)


def joined(x_2f: jax.Array) -> jax.Array:
  """Returns `x_g`, gates and what they let through beside each other, g = 2 f."""
  return x_2f.reshape(*x_2f.shape[:-2], -1)


@jax.custom_vjp
def _gate_up(rows_eRD, gate_up_eD2f) -> jax.Array:
  """Returns the product `gate_up_eR2f`: of matrices, for XLA turns arrays of more dimensions; and
  what its gradient keeps are the weights, not their matrices.
  """
  product_eRg = jnp.einsum("erd,edg->erg", rows_eRD, joined(gate_up_eD2f))
  return product_eRg.reshape(*rows_eRD.shape[:2], *gate_up_eD2f.shape[2:])


def _gate_up_backward(kept, d_eR2f):
  rows_eRD, gate_up_eD2f = kept
  d_eRg = joined(d_eR2f)
  d_eRD = jnp.einsum("erg,edg->erd", d_eRg, joined(gate_up_eD2f))
  return d_eRD, jnp.einsum("erd,erg->edg", rows_eRD, d_eRg).reshape(gate_up_eD2f.shape)


_gate_up.defvjp(lambda *given: (_gate_up(*given), given), _gate_up_backward)


@jax.custom_vjp
def _gated(gate_up_2f: jax.Array) -> jax.Array:
  """Returns `hidden_f` [..., f], silu of the gates of `gate_up_2f` [..., 2, f] times the rest."""
  return jax.nn.silu(gate_up_2f[..., 0, :]) * gate_up_2f[..., 1, :]


def _gated_backward(gate_up_2f, d_f):
  # Both by one formula, in place of two arrays that are joined: XLA:GPU fuses no joining.
  gate_1f, up_1f = gate_up_2f[..., :1, :], gate_up_2f[..., 1:, :]
  is_gate_21 = jax.lax.broadcasted_iota(jnp.int32, (*gate_up_2f.shape[:-1], 1), d_f.ndim - 1) == 0
  sigmoid_1f = jax.nn.sigmoid(gate_1f)
  of_gate_1f = up_1f * (1 + gate_1f * (1 - sigmoid_1f))
  slope_2f = sigmoid_1f * jnp.where(is_gate_21, of_gate_1f, gate_1f)
  return (d_f[..., None, :] * slope_2f,)


_gated.defvjp(lambda gate_up_2f: (_gated(gate_up_2f), gate_up_2f), _gated_backward)
