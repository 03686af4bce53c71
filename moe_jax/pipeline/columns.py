"""A schedule's table as the program reads it: one row a tick, and runs of ticks that are alike.

Ticks that agree on having a forward and having a backward unit become one loop, whose body holds
only what its ticks need. The executor makes the loops, the rehearsal finds them again in the
compiled program. Knows tables; must not know what a unit computes.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.pipeline.table import Table


class Row(NamedTuple):
  """One tick of the table as this stage sees it; -1 is idle. Slots index the executor's buffers."""

  head_micro: jax.Array
  head_inbox_slot: jax.Array
  head_is_fresh: jax.Array  # 1 where the micro-batch finished in the tick before
  embed_micro: jax.Array
  embed_gradient_micro: jax.Array
  arrival_slot: jax.Array
  forward_micro: jax.Array
  forward_chunk: jax.Array
  forward_slot: jax.Array  # of an idle cell one that holds nothing, -1 where every slot does
  forward_is_reversed: jax.Array  # 1 where the layers' places in the slot are last to first
  forward_inbox_slot: jax.Array
  cotangent_arrival_slot: jax.Array
  backward_micro: jax.Array
  backward_chunk: jax.Array
  backward_slot: jax.Array
  backward_is_reversed: jax.Array
  backward_inbox_slot: jax.Array


def rows(table: Table, stage: jax.Array) -> Row:
  """Returns the table's columns of this stage, leaves [ticks]."""
  # What the backward unit of tick t sends is stored at the end of t: the arrival of t + 1.
  cotangent_QZ = np.roll(table.cotangent_arrival_slot_QZ, -1, axis=0)
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
    forward_micro=this_stage(table.forward_micro_QZ),
    forward_chunk=this_stage(table.forward_chunk_QZ),
    forward_slot=this_stage(slot_QZ),
    forward_is_reversed=this_stage(forward_QZ),
    forward_inbox_slot=this_stage(table.forward_inbox_slot_QZ),
    cotangent_arrival_slot=this_stage(cotangent_QZ),
    backward_micro=this_stage(table.backward_micro_QZ),
    backward_chunk=this_stage(table.backward_chunk_QZ),
    backward_slot=this_stage(table.backward_slot_QZ),
    backward_is_reversed=this_stage(backward_QZ),
    backward_inbox_slot=this_stage(table.backward_inbox_slot_QZ),
  )


def stash_slots(table: Table) -> np.ndarray:
  """Returns where the forward cell of each tick and stage writes, int32 [ticks, stages].

  That of an idle cell holds nothing that is still to be read, or what the backward unit beside it
  reads; so what an idle cell makes needs no mask. -1 where there is no such slot.
  """
  slot_QZ = table.forward_slot_QZ.copy()
  for stage in range(table.num_stages):
    held: set[int] = set()
    for tick in range(table.num_ticks):
      read = table.backward_slot_QZ[tick, stage]
      held.discard(read)
      if slot_QZ[tick, stage] < 0:
        free = [slot for slot in range(table.peak_in_flight) if slot not in held]
        # The slot that is read last, for that one is to be written layer by layer.
        slot_QZ[tick, stage] = min(free, key=lambda slot: (slot == read, slot), default=-1)
      else:
        held.add(slot_QZ[tick, stage])
  return slot_QZ


def directions(table: Table, slot_QZ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns in which ticks a stage's forward unit writes, and its backward unit reads, a slot of
  the stash whose layers lie last to first, bool [ticks, stages].

  Args:
    slot_QZ: of `stash_slots`.

  A backward unit reads the layers last to first, and a forward unit beside it writes the same slot
  first to last: each layer where the one just read lay. So one slot does for both.
  """
  forward_QZ = np.zeros(slot_QZ.shape, bool)
  backward_QZ = np.zeros(table.backward_slot_QZ.shape, bool)
  for stage in range(table.num_stages):
    is_reversed: dict[int, bool] = {}
    for tick in range(table.num_ticks):
      read, written = table.backward_slot_QZ[tick, stage], slot_QZ[tick, stage]
      if read >= 0:
        backward_QZ[tick, stage] = is_reversed[read]
      if written >= 0:
        is_reversed[written] = written == read and not is_reversed[read]
        forward_QZ[tick, stage] = is_reversed[written]
  return forward_QZ, backward_QZ


def units(table: Table) -> dict[str, np.ndarray]:
  """Returns, for each kind of unit, in which ticks any stage runs it.

  full: all run a forward unit; free: those that do not have a slot to write.
  """
  return {
    "arrival": (table.arrival_slot_QZ >= 0).any(1),
    "head": table.head_micro_Q >= 0,
    "backward": (table.backward_micro_QZ >= 0).any(1),
    "embed_gradient": (table.embed_gradient_micro_Q >= 0) & (not table.is_forward_only),
    "embed": table.embed_micro_Q >= 0,
    "forward": (table.forward_micro_QZ >= 0).any(1),
    "full": (table.forward_micro_QZ >= 0).all(1),
    "free": (stash_slots(table) >= 0).all(1),
  }


def segments(table: Table) -> Iterator[tuple[int, int]]:
  """Yields [start, stop) of the longest runs of ticks that agree on having a forward and having a
  backward unit.
  """
  at = units(table)
  halves = np.stack([at["forward"], at["backward"]], 1)
  edges = np.flatnonzero((halves[1:] != halves[:-1]).any(1)) + 1
  yield from itertools.pairwise([0, *edges.tolist(), table.num_ticks])


def presence(at_Q: np.ndarray) -> str:
  """Returns whether a unit runs never, always or sometimes in a run of ticks."""
  return "always" if at_Q.all() else "sometimes" if at_Q.any() else "never"
