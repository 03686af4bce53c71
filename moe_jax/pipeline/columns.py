"""A schedule's table as the program reads it: one row a tick, of this stage.

Knows tables; must not know what a unit computes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.pipeline import ends
from moe_jax.pipeline.segments import directions, stash_slots
from moe_jax.pipeline.table import Table


class Row(NamedTuple):
  """One tick of the table as this stage sees it; -1 is idle. Slots index the executor's buffers."""

  head_micro: jax.Array
  head_inbox_slot: jax.Array
  head_is_fresh: jax.Array  # 1 where the micro-batch finished in the tick before
  embed_micro: jax.Array
  embed_gradient_micro: jax.Array
  arrival_slot: jax.Array  # of what is there at the tick's start
  next_arrival_slot: jax.Array  # and at its end
  forward_micro: jax.Array
  forward_chunk: jax.Array
  forward_slot: jax.Array  # of an idle cell one that holds nothing, -1 where every slot does
  forward_is_reversed: jax.Array  # 1 where the layers' places in the slot are last to first
  forward_inbox_slot: jax.Array
  next_cotangent_slot: jax.Array
  backward_micro: jax.Array
  backward_chunk: jax.Array
  backward_slot: jax.Array
  backward_is_reversed: jax.Array
  leaving_chunk: jax.Array
  next_backward_slot: jax.Array
  next_backward_is_reversed: jax.Array
  backward_inbox_slot: jax.Array


def rows(table: Table, stage: jax.Array) -> Row:
  """Returns the table's columns of this stage, leaves [ticks]."""
  # What tick t sends is stored at its end: the arrival of t + 1.
  next_tick = lambda at_QZ: np.roll(at_QZ, -1, axis=0)
  finished_Q = table.forward_tick_UW[table.head_micro_Q, -1]
  is_fresh_Q = (table.head_micro_Q >= 0) & (finished_Q == np.arange(table.num_ticks) - 1)
  slot_QZ = stash_slots(table)
  forward_QZ, backward_QZ = directions(table, slot_QZ)
  every_stage = lambda at_Q: jnp.asarray(at_Q, jnp.int32)
  this_stage = lambda at_QZ: jnp.asarray(at_QZ, jnp.int32)[:, stage]
  return Row(
    head_micro=every_stage(table.head_micro_Q),
    head_inbox_slot=every_stage(table.head_inbox_slot_Q),
    head_is_fresh=every_stage(is_fresh_Q),
    embed_micro=every_stage(table.embed_micro_Q),
    embed_gradient_micro=every_stage(table.embed_gradient_micro_Q),
    arrival_slot=this_stage(table.arrival_slot_QZ),
    next_arrival_slot=this_stage(next_tick(table.arrival_slot_QZ)),
    forward_micro=this_stage(table.forward_micro_QZ),
    forward_chunk=this_stage(table.forward_chunk_QZ),
    forward_slot=this_stage(slot_QZ),
    forward_is_reversed=this_stage(forward_QZ),
    forward_inbox_slot=this_stage(table.forward_inbox_slot_QZ),
    next_cotangent_slot=this_stage(next_tick(table.cotangent_arrival_slot_QZ)),
    backward_micro=this_stage(table.backward_micro_QZ),
    backward_chunk=this_stage(table.backward_chunk_QZ),
    backward_slot=this_stage(table.backward_slot_QZ),
    backward_is_reversed=this_stage(backward_QZ),
    leaving_chunk=every_stage(ends.leaving(table)),
    next_backward_slot=this_stage(next_tick(table.backward_slot_QZ)),
    next_backward_is_reversed=this_stage(next_tick(backward_QZ)),
    backward_inbox_slot=this_stage(table.backward_inbox_slot_QZ),
  )
