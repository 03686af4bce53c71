"""Dispatch of every token to every expert, weighted by who serves it: the oracle of the others.

E / K times the work and the bytes, and nothing to get wrong: no rows, no order, no room. What it
combines by is the plan's `expert_TK` alone, so that it takes the plan of any other dispatch.
"""

import jax
import jax.numpy as jnp

from moe_jax.moe import plan as plans
from moe_jax.moe.experts import Weights, swiglu
from moe_jax.moe.plan import Plan, Setting
from moe_jax.moe.router import Routing
from moe_jax.pipeline.saving import residual


def plan(setting: Setting, routing: Routing, ranking_tE: jax.Array) -> Plan:
  """Returns the plan in which every assignment is served as the router chose."""
  del ranking_tE
  num_rows = setting.num_experts * setting.num_tokens
  nothing_TK = jnp.zeros(routing.experts_TK.shape, bool)
  return plans.make(setting, routing.experts_TK, nothing_TK, num_rows, 1, ())


def most_rounds(setting: Setting) -> int:
  """Returns 1: all rows travel at once."""
  del setting
  return 1


def send(setting: Setting, x_tD: jax.Array, plan: Plan, round_id: jax.Array | int) -> jax.Array:
  """Returns `rows_eRD`: all tokens of all devices, for each expert of this device.

  Communication: the exchange's, with C = t.
  """
  del plan, round_id
  return setting.exchange.to_experts(
    jnp.broadcast_to(x_tD[None], (setting.num_experts, *x_tD.shape))
  )


def compute(weights: Weights, plan: Plan, rows_eRD: jax.Array) -> jax.Array:
  """Returns this tensor rank's partial sums `rows_eRD`."""
  del plan
  return swiglu(weights, rows_eRD)


def back(
  setting: Setting,
  rows_eRD: jax.Array,
  weights_TK: jax.Array,
  plan: Plan,
  round_id: jax.Array | int,
) -> jax.Array:
  """Returns `y_tD`, the sum over assignments of weight x what the serving expert made of the token.

  Communication: the exchange's, with C = t.
  """
  del round_id
  rows_EtD = residual(setting.exchange.to_tokens(rows_eRD))
  # An assignment that nobody serves names expert E, whose row of a one-hot is zero.
  serves_TKE = jax.nn.one_hot(plan.expert_TK, setting.num_experts, dtype=weights_TK.dtype)
  weight_TE = jnp.einsum("tk,tke->te", weights_TK, serves_TKE)
  y_tD = jnp.einsum("te,etd->td", weight_TE, rows_EtD.astype(weights_TK.dtype))
  return y_tD.astype(rows_EtD.dtype)
