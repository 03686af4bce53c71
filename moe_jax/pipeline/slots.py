"""Where a value waits between the unit that makes it and the unit that reads it.

One SPMD program allocates the same slots on every stage, so there are as many as the fullest stage
needs. A slot is given by greedy interval colouring, which needs no more slots than values are ever
alive at once. This module knows ticks and stages; it must not know what a value is.

Local letter: W virtual stages, W = Z * Y; virtual stage w lives on stage w % Z.
"""

import heapq
from typing import NamedTuple

import numpy as np


class Waiting(NamedTuple):
  """Values on their stages: the slot is taken from tick `start` on and free again from `end` on."""

  what: str
  stage_UW: np.ndarray
  start_UW: np.ndarray
  end_UW: np.ndarray


def stashed(forward_tick_UW: np.ndarray, backward_tick_UW: np.ndarray, num_stages: int) -> Waiting:
  """Returns what each unit saves for its backward; a forward of that tick may reuse its slot."""
  return Waiting("stash", _stage_UW(forward_tick_UW, num_stages), forward_tick_UW, backward_tick_UW)


def outputs(forward_tick_UW: np.ndarray, head_tick_U: np.ndarray, num_stages: int) -> Waiting:
  """Returns each unit's output on the next stage; the last one's waits on stage 0 for the head.

  An arrival is written before its tick reads, so a slot read in a tick is free in the next one.
  """
  reader_UW = np.concatenate([forward_tick_UW[:, 1:], head_tick_U[:, None]], axis=1)
  stage_UW = (_stage_UW(forward_tick_UW, num_stages) + 1) % num_stages
  return Waiting("activation inbox", stage_UW, forward_tick_UW + 1, reader_UW + 1)


def cotangents(backward_tick_UW: np.ndarray, num_stages: int) -> Waiting:
  """Returns the cotangent of each unit's output, but for the last one's, which the head makes."""
  stage_UW = _stage_UW(backward_tick_UW, num_stages)[:, :-1]
  return Waiting(
    "cotangent inbox", stage_UW, backward_tick_UW[:, 1:] + 1, backward_tick_UW[:, :-1] + 1
  )


def color(waiting: Waiting) -> np.ndarray:
  """Returns a slot for each value: the lowest that is free on its stage when the value comes."""
  slot_UW = np.full(waiting.start_UW.shape, -1, np.int32)
  for stage in np.unique(waiting.stage_UW):
    values = np.argwhere(waiting.stage_UW == stage)
    values = values[np.argsort(waiting.start_UW[tuple(values.T)], kind="stable")]
    alive, free, num_slots = [], [], 0  # heaps of (end, slot) and of slots
    for micro, virtual in values:
      while alive and alive[0][0] <= waiting.start_UW[micro, virtual]:
        heapq.heappush(free, heapq.heappop(alive)[1])
      if not free:
        free.append(num_slots)
        num_slots += 1
      slot = heapq.heappop(free)
      slot_UW[micro, virtual] = slot
      heapq.heappush(alive, (waiting.end_UW[micro, virtual], slot))
  return slot_UW


def check_no_overrun(waiting: Waiting, slot_UW: np.ndarray) -> None:
  """Refuses slots of which one is written while it holds a value that is still to be read.

  Raises:
    ValueError: names the first tick, stage and slot.
  """
  if not slot_UW.size:
    return
  if slot_UW.min() < 0:
    micro, virtual = np.argwhere(slot_UW < 0)[0]
    raise ValueError(
      f"tick {waiting.start_UW[micro, virtual]}, stage {waiting.stage_UW[micro, virtual]}:"
      f" micro-batch {micro} of virtual stage {virtual} has no slot of the {waiting.what}"
    )
  stage, start, end, slot = (
    a.ravel() for a in (waiting.stage_UW, waiting.start_UW, waiting.end_UW, slot_UW)
  )
  order = np.lexsort((start, slot, stage))
  before, after = order[:-1], order[1:]
  overrun = (
    (stage[before] == stage[after]) & (slot[before] == slot[after]) & (end[before] > start[after])
  )
  if overrun.any():
    first = after[overrun][np.argmin(start[after[overrun]])]
    raise ValueError(
      f"tick {start[first]}, stage {stage[first]}: slot {slot[first]} of the {waiting.what} is"
      " written while it holds a value that is still to be read; give the new value a free slot"
    )


def _stage_UW(tick_UW, num_stages):
  return np.broadcast_to(np.arange(tick_UW.shape[1]) % num_stages, tick_UW.shape)
