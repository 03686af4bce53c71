"""Dispatch that drops nothing, whatever the routing, in buffers whose size the configuration sets.

A round sends at most B rows from each device to each rank of `expert`; what is left travels in
further rounds. B is `capacity_factor` x the even share of a rank, so an even load takes one round,
and the worst, every token of a device to one rank, X / capacity_factor of them. Within a rank's
rows the experts' follow each other, so that sizes alone say which row is whose.

Letters: X ranks of `expert`; S source devices, X * tensor; e experts of this device.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe import grouped, queues, rows
from moe_jax.moe import plan as plans
from moe_jax.moe.experts import Stacked, Weights
from moe_jax.moe.plan import Plan, Setting
from moe_jax.moe.router import Routing
from moe_jax.parallel.axes import EXPERT
from moe_jax.pipeline.saving import residual


class _Places(NamedTuple):
  """The queues for each rank of `expert`, and the rows that each source has in them, in all rounds,
  for each expert of this device.
  """

  queues: queues.Queues
  arriving_Se: jax.Array


class Arrived(NamedTuple):
  """Rows from all sources, and which of this device's experts they are for."""

  rows_RD: jax.Array
  groups: grouped.Groups


def rows_per_rank(num_tokens: int, num_choices: int, num_ranks: int, capacity_factor: float) -> int:
  """Returns B: rows that each device sends to each rank of `expert` in a round.

  Args:
    num_tokens: this device's tokens.
    capacity_factor: multiple of the even share, num_tokens x num_choices / num_ranks.

  >>> rows_per_rank(256, 2, 8, 1.25)
  80
  """
  num_assignments = num_tokens * num_choices
  return min(num_assignments, max(1, math.ceil(capacity_factor * num_assignments / num_ranks)))


def plan(setting: Setting, routing: Routing, ranking_tE: jax.Array) -> Plan:
  """Returns the plan: every assignment served as the router chose, in as many rounds as it takes.

  Communication: the exchange's, with E = X, C = 1 and D = e + 1.
  """
  del ranking_tE
  num_ranks, num_rows = jax.lax.axis_size(EXPERT), rows_of_round(setting)
  waiting = queues.make(routing.experts_TK, setting.num_experts, num_ranks)
  # With its sizes every source tells all devices its longest queue, so no reduction has to.
  longest_Q1 = jnp.broadcast_to(waiting.length_Q.max(), (num_ranks, 1))
  told_Q1e = jnp.concatenate([waiting.sizes_Qe, longest_Q1], 1)[:, None, :]
  told_Se = setting.exchange.to_experts(told_Q1e)[0]
  places, longest = _Places(waiting, told_Se[:, :-1]), told_Se[:, -1].max()
  num_rounds = jnp.maximum((longest + num_rows - 1) // num_rows, 1)
  nothing_TK = jnp.zeros(routing.experts_TK.shape, bool)
  return plans.make(
    setting, routing.experts_TK, nothing_TK, num_ranks * num_rows, num_rounds, places
  )


def most_rounds(setting: Setting) -> int:
  """Returns the rounds of the worst routing: all of a device's assignments to one rank."""
  return -(-setting.num_assignments // rows_of_round(setting))


def send(setting: Setting, x_tD: jax.Array, plan: Plan, round_id: jax.Array | int) -> Arrived:
  """Returns the rows of the round that reach this device, and the groups that they form.

  Communication: the exchange's, with E = X and C = B.
  """
  num_ranks, num_rows = jax.lax.axis_size(EXPERT), rows_of_round(setting)
  rows_RD = rows.tokens_to_rows(x_tD, queues.layout(plan.places.queues, num_rows, round_id))
  rows_1RD = setting.exchange.to_experts(rows_RD.reshape(num_ranks, num_rows, -1))
  # Of the rows that a source has for this rank, those of the round are a window.
  sizes_Se = queues.window(plan.places.arriving_Se, num_rows, round_id)
  return Arrived(rows_1RD[0], grouped.groups(sizes_Se, num_rows))


def compute(weights: Weights | Stacked, plan: Plan, arrived: Arrived) -> jax.Array:
  """Returns this tensor rank's partial sums `rows_RD`."""
  return grouped.grouped_swiglu(weights, arrived.rows_RD, arrived.groups, plan.stacked)


def back(
  setting: Setting,
  rows_RD: jax.Array,
  weights_TK: jax.Array,
  plan: Plan,
  round_id: jax.Array | int,
) -> jax.Array:
  """Returns `y_tD`, the weighted sum of each token's rows of the round.

  Communication: the exchange's, with E = X and C = B.
  """
  rows_XBD = residual(setting.exchange.to_tokens(rows_RD[None]))
  layout = queues.layout(plan.places.queues, rows_of_round(setting), round_id)
  return rows.rows_to_tokens(rows_XBD.reshape(-1, rows_XBD.shape[-1]), weights_TK, layout)


def rows_of_round(setting: Setting) -> int:
  """Returns B inside the region."""
  return rows_per_rank(
    setting.num_tokens, setting.num_choices, jax.lax.axis_size(EXPERT), setting.capacity_factor
  )
