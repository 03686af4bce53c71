"""What an expert computes: a SwiGLU feed-forward network, all experts of this device in one batch.

Letters: e experts of this device, R rows per expert, f this tensor rank's share of the hidden
units. Knows rows and weights; must not know where rows come from.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

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
  gate_eRf = residual(jnp.einsum("erd,edf->erf", rows_eRD, weights.gate_eDf))
  up_eRf = residual(jnp.einsum("erd,edf->erf", rows_eRD, weights.up_eDf))
  return jnp.einsum("erf,efd->erd", jax.nn.silu(gate_eRf) * up_eRf, weights.down_efD)
