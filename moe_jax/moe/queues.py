"""Assignments waiting in queues, one a destination, and the window of each that a round takes.

Sorting puts all queues one after another; from then on every question is arithmetic of places.
Knows numbers of queues and places; must not know what a destination is.

Letters: A assignments, T x K; Q queues; S sources, e keys of one queue; B rows of each queue in a
round.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe import order, rows
from moe_jax.moe.router import assignments_per_expert


class Queues(NamedTuple):
  """Where assignments wait, int32.

  Attributes:
    queue_TK: the queue of each assignment; Q for one that waits in none.
    place_TK: its place there.
    order_A: the assignments by key, so by queue: all queues one after another.
    first_Q: where each queue begins in `order_A`.
    length_Q: of each queue.
    sizes_Qe: assignments of each key.
  """

  queue_TK: jax.Array
  place_TK: jax.Array
  order_A: jax.Array
  first_Q: jax.Array
  length_Q: jax.Array
  sizes_Qe: jax.Array


def make(key_TK: jax.Array, num_keys: int, num_queues: int) -> Queues:
  """Returns the queues of assignments, each sorted by key and then by number.

  Args:
    key_TK: from 0 to num_keys - 1, as many keys a queue, those of the first queue first; num_keys
      waits in none. int32.
  """
  order_A, place_A = order.by_key(key_TK.reshape(-1))
  sizes_Qe = assignments_per_expert(key_TK, num_keys).reshape(num_queues, -1)
  length_Q = sizes_Qe.sum(1, dtype=jnp.int32)
  first_Q = jnp.cumsum(length_Q, dtype=jnp.int32) - length_Q
  queue_TK = key_TK // sizes_Qe.shape[1]
  place_TK = place_A.reshape(key_TK.shape) - first_Q[jnp.minimum(queue_TK, num_queues - 1)]
  return Queues(queue_TK, place_TK, order_A, first_Q, length_Q, sizes_Qe)


def layout(queues: Queues, num_rows: int, round_id: jax.Array | int) -> rows.Layout:
  """Returns where the assignments of a round lie among Q x B rows, those of a queue together."""
  num_queues, num_assignments = queues.first_Q.size, queues.order_A.size
  row_TK = queues.place_TK - round_id * num_rows
  is_now_TK = (row_TK >= 0) & (row_TK < num_rows) & (queues.queue_TK < num_queues)
  place_B = round_id * num_rows + jnp.arange(num_rows, dtype=jnp.int32)
  place_QB = jnp.minimum(queues.first_Q[:, None] + place_B[None, :], num_assignments - 1)
  is_filled_QB = place_B[None, :] < queues.length_Q[:, None]
  assignment_QB = jnp.where(is_filled_QB, queues.order_A[place_QB], num_assignments)
  return rows.Layout(
    jnp.where(is_now_TK, queues.queue_TK * num_rows + row_TK, num_queues * num_rows),
    assignment_QB.reshape(-1),
  )


def window(sizes_Se: jax.Array, num_rows: int, round_id: jax.Array | int) -> jax.Array:
  """Returns how many of each key lie in a round's window of every source's queue, int32 [S, e].

  Args:
    sizes_Se: of each key in the whole queue.
  """
  end_Se = jnp.cumsum(sizes_Se, 1, dtype=jnp.int32)
  return jnp.diff(jnp.clip(end_Se - round_id * num_rows, 0, num_rows), axis=1, prepend=0)
