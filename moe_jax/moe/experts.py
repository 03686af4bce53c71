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
  gate_eRf, up_eRf = map(residual, _gate_and_up(rows_eRD, weights.gate_eDf, weights.up_eDf))
  return jnp.einsum("erf,efd->erd", _gated(gate_eRf, up_eRf), weights.down_efD)


@jax.custom_vjp
def _gate_and_up(rows_eRD, gate_eDf, up_eDf) -> tuple[jax.Array, jax.Array]:
  """Returns the two products of the rows, whose gradient by the rows is one, not a sum of two."""
  product = lambda weights_eDf: jnp.einsum("erd,edf->erf", rows_eRD, weights_eDf)
  return product(gate_eDf), product(up_eDf)


def _gate_and_up_forward(rows_eRD, gate_eDf, up_eDf):
  return _gate_and_up(rows_eRD, gate_eDf, up_eDf), (rows_eRD, gate_eDf, up_eDf)


def _gate_and_up_backward(saved, gradients):
  rows_eRD, gate_eDf, up_eDf = saved
  # `_gated` makes slices of one array: where no slot ends in between, XLA joins them by no copy.
  d_eRg = jnp.concatenate(gradients, -1)
  d_eRD = jnp.einsum("erg,edg->erd", d_eRg, jnp.concatenate([gate_eDf, up_eDf], -1))
  return d_eRD, *jnp.split(jnp.einsum("erd,erg->edg", rows_eRD, d_eRg), 2, -1)


_gate_and_up.defvjp(_gate_and_up_forward, _gate_and_up_backward)


@jax.custom_vjp
def _gated(gate_eRf, up_eRf) -> jax.Array:
  """Returns `hidden_eRf`, silu of the one times the other; its gradients are made as one array."""
  return jax.nn.silu(gate_eRf) * up_eRf


def _gated_forward(gate_eRf, up_eRf):
  return _gated(gate_eRf, up_eRf), (gate_eRf, up_eRf)


def _gated_backward(saved, d_eRf):
  # Both halves by one formula, in place of two arrays that are joined: XLA:GPU fuses no joining.
  gate_eR1f, up_eR1f = (each[..., None, :] for each in saved)
  is_gate_21 = (jnp.arange(2, dtype=jnp.int32) == 0)[:, None]
  sigmoid_eR1f = jax.nn.sigmoid(gate_eR1f)
  of_gate_eR1f = up_eR1f * (1 + gate_eR1f * (1 - sigmoid_eR1f))
  slope_eR2f = sigmoid_eR1f * jnp.where(is_gate_21, of_gate_eR1f, gate_eR1f)
  d_eRg = (d_eRf[..., None, :] * slope_eR2f).reshape(*d_eRf.shape[:-1], -1)
  return tuple(jnp.split(d_eRg, 2, -1))


_gated.defvjp(_gated_forward, _gated_backward)
