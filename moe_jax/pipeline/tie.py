"""Which steps of a forward unit run beside which steps of a backward unit.

The two units need nothing of each other, and while one communicates the other should compute. XLA
lays every product behind the last collective that it finds, or behind none, so they are tied slot
by slot: a slot ends when both streams are through. In a slot one exchange between hosts may travel,
and beside it what the other stream computes and sends inside the host; two streams never share a
link. Which steps share a slot is found by dynamic programming over the time that slots take, so a
long exchange gets several products and a short gather a part of one. Weights' gradients, which no
stream waits for, go where a slot has room; so does reading what the next layer saved.

Knows what steps cost; must not know what they do.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from moe_jax.pipeline.steps import Step
from moe_jax.plan.calibration import LAUNCH_S
from moe_jax.plan.hardware import CHIPS

# Ratios matter, and these are right to a factor of 1.5 for both configs of the rehearsal with
# registered memory: products of a layer run at half of the peak and collectives at three quarters
# of a link; most arrays are made inside fusions, of which few reach memory; ten equations make a
# kernel.
_CHIP = CHIPS["h100"]
_FLOPS_PER_S = 0.5 * _CHIP.peak_flops_per_s["bfloat16"]
_MADE_BYTES_PER_S = 6 * _CHIP.memory_bytes_per_s
_EQUATION_S = 0.1e-6
_OF_LINK = 0.75
_LATENCY_S = 5e-6
_SLOT_S = 2e-6  # of a barrier: what cannot move across it
_MOST_STEPS = 6  # of one stream in a slot
# Gradients of a product are two products.
_OF_FORWARD = 2.0
# What sends in a slot after weights' gradients are made hides them there while it takes so many
# times as long as their products: they are summed in parts, and their operands made again.
_OF_GRADIENTS = 2.0


class Cost(NamedTuple):
  """Seconds of a step's computation, and of its communication over each link; and of the
  computation those of its weights' gradients, which nothing in the layer waits for.
  """

  compute_s: float
  inside_s: float
  between_s: float
  free_s: float = 0.0

  @property
  def total_s(self) -> float:
    return self.compute_s + self.inside_s + self.between_s


def cost(step: Step, is_backward: bool) -> Cost:
  """Returns about what a step takes on an H100."""
  compute_s = (
    step.flops / _FLOPS_PER_S
    + step.made_bytes / _MADE_BYTES_PER_S
    + step.num_equations * _EQUATION_S
  )
  has_weights = is_backward and step.flops > 0 and step.uses
  return Cost(
    compute_s * (_OF_FORWARD if is_backward else 1.0),
    _link_s(step.inside_bytes, _CHIP.inside_bytes_per_s),
    _link_s(step.between_bytes, _CHIP.between_bytes_per_s),
    compute_s if has_weights else 0.0,
  )


def side_by_side(
  forward: Sequence[Cost],
  backward: Sequence[Cost],
  after: tuple[int, int] = (0, 0),
  exchange_first: bool = False,
) -> tuple[tuple[int, int], ...]:
  """Returns, slot by slot, how many steps of the forward and of the backward stream it holds.

  Args:
    forward: of the steps in the order in which they run.
    backward: likewise, so from the layer's last step to its first.
    after: (f, b): all but the first b steps of the backward stream need what the first f steps of
      the forward stream make, in earlier slots.
    exchange_first: whether an exchange between hosts may only be the first step of its stream in a
      slot, so that it can begin with the slot.
  """
  best = {(0, 0): (0.0, ())}
  for f in range(len(forward) + 1):
    for b in range(len(backward) + 1):
      ways = []
      for more_f in range(min(f, _MOST_STEPS) + 1):
        for more_b in range(min(b, _MOST_STEPS) + 1):
          if more_b and b > after[1] and f - more_f < after[0]:
            continue
          later = (*forward[f - more_f + 1 : f], *backward[b - more_b + 1 : b])
          if exchange_first and any(each.between_s for each in later):
            continue
          before = best.get((f - more_f, b - more_b))
          seconds = _slot_s(forward[f - more_f : f], backward[b - more_b : b])
          if more_f + more_b and before and seconds is not None:
            ways.append((before[0] + seconds, (*before[1], (more_f, more_b))))
      if ways:
        best[f, b] = min(ways)
  return best[len(forward), len(backward)][1]


def due(
  slots: Sequence[tuple[int, int]], forward: Sequence[Cost], backward: Sequence[Cost]
) -> tuple[int, ...]:
  """Returns of how many backward steps, from the first on, the weights' gradients must be there at
  the end of each slot: those of a step one slot after it, in its own slot where its stream sends
  inside the host after it, or later where more of them is hidden.

  XLA would put them as late as it may. They are wanted beside communication: in slots that have
  room for them beside what their streams compute themselves.

  Args:
    slots: as `side_by_side` returns them.
    forward, backward: as it takes them.
  """
  return _filled(slots, forward, backward)[0]


def reads(
  slots: Sequence[tuple[int, int]],
  forward: Sequence[Cost],
  backward: Sequence[Cost],
  copying_s: Sequence[float],
) -> int:
  """Returns the slot beside which is read what the backward unit's next layer saved: the first, if
  its exchange between hosts lasts so much longer than what is computed beside it that half of the
  reading fits, else the one with the most room.

  Args:
    slots: as `side_by_side` returns them.
    forward, backward: as it takes them.
    copying_s: seconds of writing what each forward step keeps, which is done a slot later; reading
      all of it takes as long as writing it.
  """
  ahead, back = next(_of_slots(slots, forward, backward))
  both = (*ahead, *map(_without_free, back))
  if sum(each.between_s - each.compute_s for each in both) >= sum(copying_s) / 2:
    return 0
  _, room_s = _filled(slots, forward, backward)
  f = 0
  for number, (more_f, _) in enumerate(slots[:-1]):
    room_s[number + 1] -= sum(copying_s[f : f + more_f])
    f += more_f
  return max(range(len(slots)), key=lambda slot: (room_s[slot], -slot))


def copy_s(bytes_of: Sequence[int]) -> float:
  """Returns about what copying arrays of so many bytes takes on an H100, a kernel for each."""
  return len(bytes_of) * LAUNCH_S + 2 * sum(bytes_of) / _CHIP.memory_bytes_per_s


def parted(bytes_of: Sequence[int], seconds: float) -> tuple[list[int], list[int]]:
  """Returns which arrays, the largest first, are copied until so many seconds are over, and which
  are left.
  """
  order = sorted(range(len(bytes_of)), key=lambda i: -bytes_of[i])
  first: list[int] = []
  while order and copy_s([bytes_of[i] for i in first]) < seconds:
    first.append(order.pop(0))
  return first, order


def _filled(
  slots, forward, backward, is_followed: bool = False
) -> tuple[tuple[int, ...], list[float]]:
  """Returns `due`, and the room that weights' gradients leave in each slot; the last one has also
  that of the first, if another layer follows.
  """
  room_s, made = [], []  # of each slot; (first slot, seconds) of each backward step
  for number, (ahead, back) in enumerate(_of_slots(slots, forward, backward)):
    own_s = 0.0
    for place, each in enumerate(back):
      own_s += each.free_s
      sends_s = sum(later.inside_s for later in back[place + 1 :])
      is_hidden = 0.0 < sends_s >= _OF_GRADIENTS * own_s
      made.append((number if is_hidden else number + 1, each.free_s))
    back = [_without_free(each) for each in back]
    busy_s = _SLOT_S + sum(each.compute_s for each in (*ahead, *back))
    # A slot that must not be, as none of `side_by_side` is, has no room.
    room_s.append((_slot_s(ahead, back) or 0.0) - busy_s)
  if is_followed:
    room_s[-1] += room_s[0]
  due_in = _laid(made, room_s)
  for slot, (_, seconds) in zip(due_in, made, strict=True):
    room_s[slot] -= seconds
  return tuple(sum(slot <= number for slot in due_in) for number in range(len(slots))), room_s


def _laid(made: Sequence[tuple[int, float]], room_s: Sequence[float]) -> list[int]:
  """Returns the slots of pieces, (first slot, seconds), in their order: of all ways to fill the
  most room the one in which they come earliest.
  """
  last = len(room_s) - 1
  firsts = [*itertools.accumulate((min(first, last) for first, _ in made), max)]
  pieces = [(first, seconds) for first, (_, seconds) in zip(firsts, made, strict=True) if seconds]

  def rank(way: tuple[int, ...]) -> tuple[int, int]:
    laid_s = [0.0] * len(room_s)
    for slot, (_, seconds) in zip(way, pieces, strict=True):
      laid_s[slot] += seconds
    filled_s = sum(map(min, room_s, laid_s))
    return round(filled_s * 1e9), -sum(way)

  ways = itertools.combinations_with_replacement(range(len(room_s)), len(pieces))
  is_legal = lambda way: all(slot >= first for slot, (first, _) in zip(way, pieces, strict=True))
  of_pieces = iter(max(filter(is_legal, ways), key=rank))
  slots: list[int] = []
  for first, (_, seconds) in zip(firsts, made, strict=True):
    slots.append(next(of_pieces) if seconds else max([first, *slots[-1:]]))
  return slots


def _of_slots(slots, forward, backward):
  """Yields the forward and the backward steps of each slot."""
  f = b = 0
  for more_f, more_b in slots:
    yield forward[f : f + more_f], backward[b : b + more_b]
    f, b = f + more_f, b + more_b


def _without_free(step: Cost) -> Cost:
  return step._replace(compute_s=step.compute_s - step.free_s)


def due_alone(backward: Sequence[Cost], is_followed: bool) -> tuple[int, ...]:
  """Returns `due` of a backward stream with no other beside it, each step a slot.

  Args:
    backward: as `side_by_side` takes it.
    is_followed: whether the unit has a layer more. What is left for the last slot need not be there
      at its end then: it may go beside that layer's first exchange.
  """
  found, _ = _filled(((0, 1),) * len(backward), (), backward, is_followed)
  return (*found[:-1], *(found[-2:-1] or (0,))) if is_followed else found


def quiet(
  slots: Sequence[tuple[int, int]], forward: Sequence[Cost], backward: Sequence[Cost]
) -> tuple[int, int]:
  """Returns the first and the last of the slots beside which more may be sent between hosts: those
  in a row that send nothing there and compute longest; all, where there are none.

  Args:
    slots: as `side_by_side` returns them.
    forward, backward: as it takes them.
  """
  best, most_s, first, seconds = (0, len(slots) - 1), 0.0, 0, 0.0
  for number, (ahead, back) in enumerate(_of_slots(slots, forward, backward)):
    both = (*ahead, *back)
    if any(each.between_s for each in both):
      first, seconds = number + 1, 0.0
      continue
    seconds += sum(each.compute_s for each in both)
    if seconds > most_s:
      best, most_s = (first, number), seconds
  return best


def _slot_s(forward: Sequence[Cost], backward: Sequence[Cost]) -> float | None:
  """Returns the seconds of a slot, None if it must not be."""
  both = (*forward, *backward)
  if sum(each.between_s > 0 for each in both) > 1:
    return None
  if any(each.inside_s for each in forward) and any(each.inside_s for each in backward):
    return None
  return _SLOT_S + max(
    _beside_s(forward, backward),
    _beside_s(backward, forward),
    sum(each.compute_s for each in both),
    sum(each.inside_s for each in both),
    sum(each.between_s for each in both),
  )


def _beside_s(stream: Sequence[Cost], other: Sequence[Cost]) -> float:
  """Returns the seconds of a stream, and of what computation beside it finds no place behind its
  last collective, where XLA lays all of it.
  """
  sent_s = [each.total_s - each.compute_s for each in stream if each.total_s > each.compute_s]
  seconds = sum(each.total_s for each in stream)
  if len(sent_s) < 2 or any(each.total_s > each.compute_s for each in other):
    return seconds
  return seconds + max(sum(each.compute_s for each in other) - sent_s[-1], 0.0)


def _link_s(num_bytes: float, bytes_per_s: float) -> float:
  return _LATENCY_S + num_bytes / (_OF_LINK * bytes_per_s) if num_bytes else 0.0
