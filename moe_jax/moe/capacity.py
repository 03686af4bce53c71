"""Dispatch with a fixed number of rows per source device and expert; what does not fit is dropped.

Shapes are static and even, so one batched matmul serves all experts. Priority goes by router
weight,
not by position in the text: what is dropped is what matters least.
"""

import math

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch import Plan
from moe_jax.moe.router import Routing, assignments_per_expert


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


def plan(routing: Routing, num_experts: int, num_rows: int) -> Plan:
  """Returns the plan that gives each expert its `num_rows` heaviest assignments.

  Args:
    routing: of this device's T tokens.
    num_rows: C, rows of each expert's share. Rows are ordered by expert, then by falling weight.
  """
  num_assignments = routing.experts_TK.size
  expert_A = routing.experts_TK.reshape(-1)
  assignment_A = jnp.arange(num_assignments, dtype=jnp.int32)
  sorted_expert_A, _, order_A = jax.lax.sort(
    (expert_A, -routing.weights_TK.reshape(-1), assignment_A), num_keys=2
  )
  assigned_E = assignments_per_expert(routing.experts_TK, num_experts)
  first_E = jnp.cumsum(assigned_E, dtype=jnp.int32) - assigned_E

  place_EC = first_E[:, None] + jnp.arange(num_rows, dtype=jnp.int32)[None, :]
  kept_E = jnp.minimum(assigned_E, num_rows)
  filled_EC = jnp.arange(num_rows, dtype=jnp.int32)[None, :] < kept_E[:, None]
  assignment_EC = jnp.where(
    filled_EC, order_A[jnp.minimum(place_EC, num_assignments - 1)], num_assignments
  )

  rank_A = assignment_A - first_E[sorted_expert_A]
  sorted_row_A = jnp.where(
    rank_A < num_rows, sorted_expert_A * num_rows + rank_A, num_experts * num_rows
  )
  # Sorting by the assignment number undoes the first sort; a scatter would run row by row on CPU.
  _, row_A = jax.lax.sort((order_A, sorted_row_A), num_keys=1)
  return Plan(row_A.reshape(routing.experts_TK.shape), assignment_EC.reshape(-1), kept_E)
