"""Which units the ticks of a table run, where they save, and the runs of ticks that are alike.

Ticks that agree on having a forward and a backward unit, and weights that come or gradients that
leave, become one loop, whose body holds only what its ticks need. The executor makes the loops, the
plan counts them, the rehearsal finds them again in the compiled program. Knows tables; must not
know jax, or what a unit computes.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from moe_jax.pipeline import ends
from moe_jax.pipeline.table import Table


class Segment(NamedTuple):
  """A run of ticks that agree on which halves they have, and on what comes or leaves beside them.

  Attributes:
    ticks: of the table.
    at: for each kind of unit, in which of them any stage runs it, bool [ticks of the run].
  """

  ticks: slice
  at: dict[str, np.ndarray]

  def presence(self) -> dict[str, str]:
    """Returns, for each kind of unit, whether the run has it never, always or sometimes."""
    return {kind: _presence(at_Q) for kind, at_Q in self.at.items()}


def segments(table: Table) -> Iterator[Segment]:
  """Yields the longest such runs, in their order."""
  at = units(table)
  kinds = np.stack([at[kind] for kind in ("forward", "backward", "comes", "leaves", "last")], 1)
  edges = np.flatnonzero((kinds[1:] != kinds[:-1]).any(1)) + 1
  for start, stop in itertools.pairwise([0, *edges.tolist(), table.num_ticks]):
    ticks = slice(start, stop)
    yield Segment(ticks, {kind: at_Q[ticks] for kind, at_Q in at.items()})


def has_room_beside_heads(table: Table) -> bool:
  """Says whether one tick stands before that of the first head, and one has the last, apart from
  others: XLA lays messages beside what stands in no loop, but not beside a loop.
  """
  found = list(segments(table))
  heads = [number for number, each in enumerate(found) if each.at["head"].any()]
  is_one = lambda number: found[number].ticks.stop - found[number].ticks.start == 1
  return heads[0] > 0 and is_one(heads[0] - 1) and is_one(heads[-1])


@functools.lru_cache(maxsize=256)
def units(table: Table) -> Mapping[str, np.ndarray]:
  """Returns, for each kind of unit, in which ticks any stage runs it.

  arrival: an output is there at the tick's start; departure: one arrives at its end. comes: a
  chunk's weights do; leaves: a chunk's gradients; last: the first chunk's too, as `ends.last`
  says. full: all run a forward unit; free: those that do not have a slot to write.
  """
  return {
    "arrival": (table.arrival_slot_QZ >= 0).any(1),
    "departure": np.roll((table.arrival_slot_QZ >= 0).any(1), -1),
    "comes": ends.coming(table) >= 0,
    "head": table.head_micro_Q >= 0,
    "backward": (table.backward_micro_QZ >= 0).any(1),
    "embed_gradient": (table.embed_gradient_micro_Q >= 0) & (not table.is_forward_only),
    "embed": table.embed_micro_Q >= 0,
    "forward": (table.forward_micro_QZ >= 0).any(1),
    "full": (table.forward_micro_QZ >= 0).all(1),
    "free": (stash_slots(table) >= 0).all(1),
    "leaves": ends.leaving(table) >= 0,
    "last": ends.last(table),
  }


def stash_slots(table: Table) -> np.ndarray:
  """Returns where the forward cell of each tick and stage writes, int32 [ticks, stages].

  That of an idle cell holds nothing that is still to be read, or what the backward unit beside it
  reads; so what an idle cell makes needs no mask. -1 where there is no such slot.
  """
  slot_QZ, num_slots = table.forward_slot_QZ.copy(), table.peak_in_flight
  for stage in range(table.num_stages):
    held: set[int] = set()
    written_Q, read_Q = slot_QZ[:, stage].tolist(), table.backward_slot_QZ[:, stage].tolist()
    for tick, (written, read) in enumerate(zip(written_Q, read_Q, strict=True)):
      held.discard(read)
      if written < 0:
        free = (slot for slot in range(num_slots) if slot not in held and slot != read)
        # The slot that is read comes last, for that one is to be written layer by layer.
        slot_QZ[tick, stage] = next(free, read if 0 <= read < num_slots else -1)
      else:
        held.add(written)
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


def _presence(at_Q: np.ndarray) -> str:
  return "always" if at_Q.all() else "sometimes" if at_Q.any() else "never"
