"""Dispatch with a fixed number of rows per source device and expert; what does not fit is spilled,
by option, or dropped.

Shapes are static and even, so one batched matmul serves all experts. Priority goes by router
weight, not by position in the text: what is dropped is what matters least.

A spilled assignment goes to the best-ranked expert that its token did not choose but might, and
that has room left by the choices; among those that ask an expert at the same rank, the heaviest
come first. It keeps the weight of the choice that it replaces: a token's weights still sum to 1,
and the router learns from what the choice brought, not from an expert that it did not choose.

The rows of a rank's experts lie beside each other, those of equal rank together: so they stay as
they lie when the rows of several devices are joined, and nothing is turned round an exchange.

Local letters: A assignments, T x K; B rows that a device sends to each rank, e * C.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe import order, rows
from moe_jax.moe import plan as plans
from moe_jax.moe.experts import Weights, swiglu
from moe_jax.moe.plan import Plan, Setting
from moe_jax.moe.router import Routing, assignments_per_expert
from moe_jax.parallel.axes import EXPERT
from moe_jax.pipeline.saving import residual


class _Served(NamedTuple):
  """Who serves what: expert_TK, E where nobody; rank_TK, place among that expert's rows; and
  rows_E, how many it has.
  """

  expert_TK: jax.Array
  rank_TK: jax.Array
  rows_E: jax.Array


def rows_per_expert(
  num_tokens: int, num_choices: int, num_experts: int, capacity_factor: float
) -> int:
  """Returns C: rows that each device sends to each expert, at most one per token.

  Args:
    num_tokens: this device's tokens.
    capacity_factor: multiple of the even share, num_tokens x num_choices / num_experts.

  >>> rows_per_expert(256, 2, 16, 1.25)
  40
  """
  even_share = num_tokens * num_choices / num_experts
  return min(num_tokens, max(1, math.ceil(capacity_factor * even_share)))


def plan(setting: Setting, routing: Routing, ranking_tE: jax.Array) -> Plan:
  """Returns the plan that gives each expert its heaviest assignments.

  Args:
    routing: of this device's T tokens.
    ranking_tE: by which the experts that a token did not choose are ranked; none where it is -inf,
      as on the hosts that are not for the token.
  """
  num_rows = _rows_per_expert(setting)
  chosen = _choices(routing, setting.num_experts, num_rows)
  served = _OVERFLOW[setting.spill](chosen, routing, ranking_tE, num_rows)
  return plans.make(
    setting,
    served.expert_TK,
    (served.expert_TK < setting.num_experts) & (served.expert_TK != routing.experts_TK),
    setting.num_experts * num_rows,
    1,
    _layout(served, num_rows, _experts_per_rank(setting)),
  )


def most_rounds(setting: Setting) -> int:
  """Returns 1: what has no room does not travel."""
  del setting
  return 1


def send(setting: Setting, x_tD: jax.Array, plan: Plan, round_id: jax.Array | int) -> jax.Array:
  """Returns `rows_eRD`, all devices' rows for each expert of this device.

  Communication: the exchange's, with E = X and C = B.
  """
  del round_id
  rows_RD = rows.tokens_to_rows(x_tD, plan.places)
  num_here, width = _experts_per_rank(setting), x_tD.shape[-1]
  rows_XBD = rows_RD.reshape(setting.num_experts // num_here, -1, width)
  rows_1RD = setting.exchange.to_experts(rows_XBD)
  return rows_1RD.reshape(-1, num_here, width).swapaxes(0, 1)


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
  """Returns `y_tD`, the weighted sum of the rows of each token.

  Communication: the exchange's, with E = X and C = B.
  """
  del round_id
  width = rows_eRD.shape[-1]
  rows_XBD = residual(setting.exchange.to_tokens(rows_eRD.swapaxes(0, 1).reshape(1, -1, width)))
  return rows.rows_to_tokens(rows_XBD.reshape(-1, width), weights_TK, plan.places)


def _experts_per_rank(setting):
  return setting.num_experts // jax.lax.axis_size(EXPERT)


def _rows_per_expert(setting):
  return rows_per_expert(
    setting.num_tokens, setting.num_choices, setting.num_experts, setting.capacity_factor
  )


def _choices(routing: Routing, num_experts: int, num_rows: int) -> _Served:
  """Returns the heaviest assignments of each expert, ranked by falling weight."""
  expert_A = routing.experts_TK.reshape(-1)
  assigned_E = assignments_per_expert(routing.experts_TK, num_experts)
  rank_A = order.ranks(expert_A, routing.weights_TK.reshape(-1), assigned_E)
  rank_TK = rank_A.reshape(routing.experts_TK.shape)
  expert_TK = jnp.where(rank_TK < num_rows, routing.experts_TK, num_experts)
  return _Served(expert_TK, rank_TK, jnp.minimum(assigned_E, num_rows))


def _drop(chosen: _Served, routing, ranking_tE, num_rows) -> _Served:
  """Returns the choices as they are."""
  del routing, ranking_tE, num_rows
  return chosen


def _spill(chosen: _Served, routing: Routing, ranking_tE: jax.Array, num_rows: int) -> _Served:
  """Returns the choices, and what they left out served by lower-ranked experts that have room.

  Each step asks one rank further down, for the heaviest assignment of each token that is still
  without an expert: where that one finds no room, a lighter one of the same token would not either.
  """
  num_tokens, num_choices = routing.experts_TK.shape
  num_experts = ranking_tE.shape[1]
  score_tE, expert_tE = jax.lax.top_k(ranking_tE, num_experts)
  expert_tE = jnp.where(score_tE > -jnp.inf, expert_tE, num_experts)
  token_T = jnp.arange(num_tokens, dtype=jnp.int32)

  def ask(served: _Served, expert_T):
    waits_TK = served.expert_TK == num_experts
    weight_TK = jnp.where(waits_TK, routing.weights_TK, -1.0)
    choice_T = weight_TK.argmax(1).astype(jnp.int32)
    expert_T = jnp.where(waits_TK.any(1), expert_T, num_experts)
    asked_E = assignments_per_expert(expert_T[:, None], num_experts)
    rank_T = order.ranks(expert_T, weight_TK[token_T, choice_T], asked_E)
    rank_T += served.rows_E[jnp.minimum(expert_T, num_experts - 1)]
    is_served_TK = ((expert_T < num_experts) & (rank_T < num_rows))[:, None] & (
      choice_T[:, None] == jnp.arange(num_choices, dtype=jnp.int32)[None, :]
    )
    return _Served(
      jnp.where(is_served_TK, expert_T[:, None], served.expert_TK),
      jnp.where(is_served_TK, rank_T[:, None], served.rank_TK),
      jnp.minimum(served.rows_E + asked_E, num_rows),
    ), None

  lower_ranks = expert_tE[:, num_choices:].T.astype(jnp.int32)
  return jax.lax.scan(ask, chosen, lower_ranks)[0]


_OVERFLOW = {False: _drop, True: _spill}


def _layout(served: _Served, num_rows: int, num_here: int) -> rows.Layout:
  """Returns the layout in which a rank's rows follow each other, by their rank at the expert.

  Args:
    num_rows: C.
    num_here: e.
  """
  num_experts = served.rows_E.size
  place_TK = (served.expert_TK // num_here) * num_rows + served.rank_TK
  row_TK = place_TK * num_here + served.expert_TK % num_here
  row_TK = jnp.where(served.expert_TK < num_experts, row_TK, num_experts * num_rows)
  assignment_XCe = order.fillers(
    served.expert_TK.reshape(-1), served.rank_TK.reshape(-1), served.rows_E, num_rows, num_here
  )
  return rows.Layout(row_TK, assignment_XCe.reshape(-1))
