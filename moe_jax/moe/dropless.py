"""Dispatch that drops nothing, whatever the routing, in buffers whose size the configuration sets.

A round sends at most B rows from each device to each rank of `expert`; what is left travels in
further rounds. B is `capacity_factor` x the even share of a rank, so an even load takes one round,
and the worst, every token of a device to one rank, X / capacity_factor of them. Within a rank's
rows the experts' follow each other, so that sizes alone say which row is whose.

Letters: A assignments, T x K; X ranks of `expert`; S source devices, X * tensor; e experts of this
device.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe import grouped, rows
from moe_jax.moe import plan as plans
from moe_jax.moe.experts import Weights
from moe_jax.moe.plan import Plan, Setting
from moe_jax.moe.router import Routing, assignments_per_expert
from moe_jax.parallel.axes import EXPERT, TENSOR
from moe_jax.pipeline.saving import residual


class _Places(NamedTuple):
  """Where assignments stand in the queue for each rank, and what arrives here, int32.

  Attributes:
    rank_TK: the rank of `expert` that holds the assignment's expert.
    queue_TK: its place in the queue for that rank.
    order_A: the assignments by expert, so by rank: all queues one after another.
    first_X: where each queue begins in `order_A`.
    length_X: of each queue.
    arriving_Se: rows that each source sends, in all rounds, to each expert of this device.
  """

  rank_TK: jax.Array
  queue_TK: jax.Array
  order_A: jax.Array
  first_X: jax.Array
  length_X: jax.Array
  arriving_Se: jax.Array


class _Arrived(NamedTuple):
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


def plan(setting: Setting, routing: Routing, logits_tE: jax.Array) -> Plan:
  """Returns the plan: every assignment served as the router chose, in as many rounds as it takes.

  Communication: the exchange's, with E = X, C = 1 and D = e; all-reduce over `expert` and `tensor`
  of one integer.
  """
  del logits_tE
  num_ranks, num_rows = jax.lax.axis_size(EXPERT), _rows_per_rank(setting)
  expert_A = routing.experts_TK.reshape(-1)
  number_A = jnp.arange(expert_A.size, dtype=jnp.int32)
  _, order_A = jax.lax.sort((expert_A, number_A), num_keys=1)
  # Sorting by the assignment number undoes the first sort; a scatter would run row by row on CPU.
  _, place_A = jax.lax.sort((order_A, number_A), num_keys=1)
  assigned_E = assignments_per_expert(routing.experts_TK, setting.num_experts)
  assigned_X1e = assigned_E.reshape(num_ranks, 1, -1)
  length_X = assigned_X1e.sum((1, 2), dtype=jnp.int32)
  first_X = jnp.cumsum(length_X, dtype=jnp.int32) - length_X
  rank_TK = routing.experts_TK // assigned_X1e.shape[2]
  places = _Places(
    rank_TK=rank_TK,
    queue_TK=place_A.reshape(rank_TK.shape) - first_X[rank_TK],
    order_A=order_A,
    first_X=first_X,
    length_X=length_X,
    arriving_Se=setting.exchange.to_experts(assigned_X1e)[0],
  )
  longest = jax.lax.pmax(length_X.max(), (EXPERT, TENSOR))
  num_rounds = jnp.maximum((longest + num_rows - 1) // num_rows, 1)
  nothing_TK = jnp.zeros(rank_TK.shape, bool)
  return plans.make(
    setting, routing.experts_TK, nothing_TK, num_ranks * num_rows, num_rounds, places
  )


def most_rounds(setting: Setting) -> int:
  """Returns the rounds of the worst routing: all of a device's assignments to one rank."""
  return -(-setting.num_assignments // _rows_per_rank(setting))


def send(setting: Setting, x_tD: jax.Array, plan: Plan, round_id: jax.Array | int) -> _Arrived:
  """Returns the rows of the round that reach this device, and the groups that they form.

  Communication: the exchange's, with E = X and C = B.
  """
  num_ranks, num_rows = jax.lax.axis_size(EXPERT), _rows_per_rank(setting)
  rows_RD = rows.tokens_to_rows(x_tD, _layout(plan.places, num_rows, round_id))
  rows_1RD = setting.exchange.to_experts(rows_RD.reshape(num_ranks, num_rows, -1))
  # Of the rows that a source has for this rank, those of the round are a window.
  end_Se = jnp.cumsum(plan.places.arriving_Se, 1, dtype=jnp.int32)
  end_Se = jnp.clip(end_Se - round_id * num_rows, 0, num_rows)
  sizes_Se = jnp.diff(end_Se, axis=1, prepend=0)
  return _Arrived(rows_1RD[0], grouped.groups(sizes_Se, num_rows))


def compute(weights: Weights, arrived: _Arrived) -> jax.Array:
  """Returns this tensor rank's partial sums `rows_RD`."""
  return grouped.grouped_swiglu(weights, arrived.rows_RD, arrived.groups)


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
  layout = _layout(plan.places, _rows_per_rank(setting), round_id)
  return rows.rows_to_tokens(rows_XBD.reshape(-1, rows_XBD.shape[-1]), weights_TK, layout)


def _rows_per_rank(setting):
  return rows_per_rank(
    setting.num_tokens, setting.num_choices, jax.lax.axis_size(EXPERT), setting.capacity_factor
  )


def _layout(places: _Places, num_rows: int, round_id) -> rows.Layout:
  """Returns where the assignments of a round lie among X x B rows."""
  num_assignments = places.order_A.size
  row_TK = places.queue_TK - round_id * num_rows
  is_now_TK = (row_TK >= 0) & (row_TK < num_rows)
  end = places.first_X.size * num_rows
  queue_B = round_id * num_rows + jnp.arange(num_rows, dtype=jnp.int32)
  place_XB = jnp.minimum(places.first_X[:, None] + queue_B[None, :], num_assignments - 1)
  is_filled_XB = queue_B[None, :] < places.length_X[:, None]
  assignment_XB = jnp.where(is_filled_XB, places.order_A[place_XB], num_assignments)
  return rows.Layout(
    jnp.where(is_now_TK, places.rank_TK * num_rows + row_TK, end), assignment_XB.reshape(-1)
  )
