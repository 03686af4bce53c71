"""What an expert computes: a SwiGLU feed-forward network, all experts of this device in one batch.

Letters: e experts of this device, R rows per expert, f this tensor rank's share of the hidden
units, g twice as many. Knows rows and weights; must not know where rows come from.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.parallel.collectives import varying_like
from moe_jax.pipeline.saving import residual


class Weights(NamedTuple):
  """Of this device's experts."""

  gate_eDf: jax.Array
  up_eDf: jax.Array
  down_efD: jax.Array


def swiglu(weights: Weights, rows_eRD: jax.Array) -> jax.Array:
  """Returns this tensor rank's partial sums `rows_eRD`; the sum over `tensor` is the experts'
  output.

  Source: GLU Variants Improve Transformer (arXiv:2002.05202), equation 6.
  """
  weights = varying_like(weights, rows_eRD)
  both_eRg = residual(_gate_and_up(rows_eRD, weights.gate_eDf, weights.up_eDf))
  return jnp.einsum("erf,efd->erd", _gated(both_eRg), weights.down_efD)


@jax.custom_vjp
def _gate_and_up(rows_eRD, gate_eDf, up_eDf) -> jax.Array:
  """Returns `both_eRg`; its gradient by the rows is one product, not a sum of two."""
  product = lambda weights_eDf: jnp.einsum("erd,edf->erf", rows_eRD, weights_eDf)
  return jnp.concatenate([product(gate_eDf), product(up_eDf)], -1)


def _gate_and_up_forward(rows_eRD, gate_eDf, up_eDf):
  return _gate_and_up(rows_eRD, gate_eDf, up_eDf), (rows_eRD, gate_eDf, up_eDf)


def _gate_and_up_backward(saved, d_eRg):
  rows_eRD, gate_eDf, up_eDf = saved
  d_eRD = jnp.einsum("erg,edg->erd", d_eRg, jnp.concatenate([gate_eDf, up_eDf], -1))
  return d_eRD, *jnp.split(jnp.einsum("erd,erg->edg", rows_eRD, d_eRg), 2, -1)


_gate_and_up.defvjp(_gate_and_up_forward, _gate_and_up_backward)


@jax.custom_vjp
def _gated(both_eRg: jax.Array) -> jax.Array:
  """Returns `hidden_eRf`, silu of the first half of the units times the second.

  Its gradient is one array made at once, where autodiff would join two.
  """
  gate_eRf, up_eRf = jnp.split(both_eRg, 2, -1)
  return jax.nn.silu(gate_eRf) * up_eRf


def _gated_forward(both_eRg):
  return _gated(both_eRg), both_eRg


def _gated_backward(both_eRg, d_eRf):
  # Each half reads the other, in place of halves made apart and joined: XLA:GPU fuses no joining.
  here_eR2f = both_eRg.reshape(*d_eRf.shape[:-1], 2, -1)
  there_eR2f = jnp.flip(here_eR2f, -2)
  is_gate_21 = (jnp.arange(2, dtype=jnp.int32) == 0)[:, None]
  gate_eR2f = jnp.where(is_gate_21, here_eR2f, there_eR2f)
  sigmoid_eR2f = jax.nn.sigmoid(gate_eR2f)
  of_gate_eR2f = there_eR2f * (1 + gate_eR2f * (1 - sigmoid_eR2f))
  slope_eR2f = sigmoid_eR2f * jnp.where(is_gate_21, of_gate_eR2f, gate_eR2f)
  return ((d_eRf[..., None, :] * slope_eR2f).reshape(both_eRg.shape),)


_gated.defvjp(_gated_forward, _gated_backward)
