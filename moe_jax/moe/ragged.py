"""Dropless dispatch whose empty rows stay at home: the plan and the rounds of `dropless`, by an
exchange that is told how many rows of each buffer are filled.

What a link carries is then what the routing asks for, not what the buffers could hold. On a
platform that has no such exchange the whole buffers travel, with equal results
(`collectives.exchange_filled`). On GPU `ragged_all_to_all` has been reported slow, and to crash
past 32 ranks: measure before choosing it.
"""

import jax
import jax.numpy as jnp

from moe_jax.moe import dropless, grouped, queues, rows
from moe_jax.moe.exchange import EXCHANGE
from moe_jax.moe.plan import Plan, Setting
from moe_jax.moe.router import Routing
from moe_jax.parallel import collectives
from moe_jax.parallel.axes import EXPERT, TENSOR
from moe_jax.pipeline.saving import residual

compute = dropless.compute
most_rounds = dropless.most_rounds


def plan(setting: Setting, routing: Routing, ranking_tE: jax.Array) -> Plan:
  """Returns the plan of `dropless`; of the rows that it counts as padded none travels on GPU.

  Communication: that of `dropless.plan` with the hierarchical exchange.
  """
  setting = setting._replace(exchange=EXCHANGE["hierarchical"])
  return dropless.plan(setting, routing, ranking_tE)


def send(
  setting: Setting, x_tD: jax.Array, plan: Plan, round_id: jax.Array | int
) -> dropless.Arrived:
  """Returns the rows of the round that reach this device, and the groups that they form.

  Communication: all-to-all over `expert`, (X - 1) * B * D elements, or where the platform has it
  ragged-all-to-all over `expert`, as many elements at most; then all-gather over `tensor`,
  (tensor - 1) * X * B * D elements.
  """
  num_rows = dropless.rows_of_round(setting)
  layout = queues.layout(plan.places.queues, num_rows, round_id)
  sizes_Se = queues.window(plan.places.arriving_Se, num_rows, round_id)
  sent_X, received_X = _filled(plan, sizes_Se, num_rows, round_id)
  rows_RD = rows.tokens_to_rows(x_tD, layout)
  rows_RD = _exchange(rows_RD, sent_X, received_X)
  rows_RD = collectives.gather(rows_RD, TENSOR, 0)
  return dropless.Arrived(rows_RD, grouped.groups(sizes_Se, num_rows))


def back(
  setting: Setting,
  rows_RD: jax.Array,
  weights_TK: jax.Array,
  plan: Plan,
  round_id: jax.Array | int,
) -> jax.Array:
  """Returns `y_tD`, the weighted sum of each token's rows of the round.

  Communication: reduce-scatter over `tensor`, (tensor - 1) * X * B * D elements; then all-to-all
  over `expert`, (X - 1) * B * D elements, or where the platform has it ragged-all-to-all over
  `expert`, as many elements at most.
  """
  num_rows = dropless.rows_of_round(setting)
  sizes_Se = queues.window(plan.places.arriving_Se, num_rows, round_id)
  sent_X, received_X = _filled(plan, sizes_Se, num_rows, round_id)
  rows_RD = collectives.reduce_scatter(rows_RD, TENSOR, 0)
  rows_RD = residual(_exchange(rows_RD, received_X, sent_X))
  layout = queues.layout(plan.places.queues, num_rows, round_id)
  return rows.rows_to_tokens(rows_RD, weights_TK, layout)


def _filled(plan, sizes_Se, num_rows, round_id):
  """Returns how many rows this device sends to each rank in the round, and gets of each, int32."""
  sent_X = jnp.clip(plan.places.queues.length_Q - round_id * num_rows, 0, num_rows)
  received_S = sizes_Se.sum(1, dtype=jnp.int32)
  by_tensor = received_S.reshape(jax.lax.axis_size(TENSOR), -1)
  return sent_X, jnp.take(by_tensor, jax.lax.axis_index(TENSOR), 0)


def _exchange(rows_RD, sent_X, received_X):
  rows_XBD = rows_RD.reshape(sent_X.size, -1, rows_RD.shape[1])
  return collectives.exchange_filled(rows_XBD, sent_X, received_X, EXPERT).reshape(rows_RD.shape)
