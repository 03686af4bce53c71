"""What a pipeline schedule is: a plain numpy table of units over (tick, stage), proved legal.

Every stage runs the same program in lockstep, and idle cells are masked. Virtual stage w (logical
order of the layers) lives on stage w % Z as its chunk w // Z. What the units of a tick read and
write is as if they ran in this order, whatever is run side by side:

  0. what the forward units of the tick before produced arrives on the next stage of the ring, what
     its backward units produced on the previous one; the last virtual stage's output arrives on
     stage 0 and waits there for the head
  1. the head (logits, loss and their gradient; every stage a vocabulary share) of one micro-batch
  2. backward units; that of the last virtual stage takes its cotangent from the head of this tick
  3. the embedding gradient (every stage) of the micro-batch whose first virtual stage ran backward
  4. the embedding (every stage) of the micro-batch whose first virtual stage runs forward
  5. forward units

So a stash slot that the backward of a tick reads can be written by the forward of the same tick.
This module knows ticks, stages and seconds; it must not know jax, the model, or how a tick is run.

Local letter: W virtual stages, W = Z * Y. Ticks, slots and indices are -1 where there is none.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Mapping

import numpy as np

from moe_jax.pipeline import legality, slots

KINDS = ("embed", "forward", "head", "backward", "embed_gradient")
# In units of one forward: the usual picture of a pipeline, in which the ends cost nothing.
CLASSIC_COSTS = {"embed": 0.0, "forward": 1.0, "head": 0.0, "backward": 2.0, "embed_gradient": 0.0}
_TEXT_COLUMNS = 100


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """Which (micro-batch, chunk) each stage runs forward and backward in each tick, -1 where idle.

  What is derived from these arrays (slots, costs) means something where `check` passes. A table
  without backward units is forward-only (evaluation, prefill): it stashes nothing, and the head of
  a micro-batch may come at any tick after its last forward.

  Args:
    name: of the schedule, for messages.
    forward_micro_QZ, forward_chunk_QZ: the forward unit of each cell, int32.
    backward_micro_QZ, backward_chunk_QZ: the backward unit of each cell, int32.
    head_micro_Q: the micro-batch whose head all stages share in each tick, int32.
  """

  name: str
  num_stages: int
  num_micro_batches: int
  num_chunks: int
  forward_micro_QZ: np.ndarray
  forward_chunk_QZ: np.ndarray
  backward_micro_QZ: np.ndarray
  backward_chunk_QZ: np.ndarray
  head_micro_Q: np.ndarray

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, np.ndarray):
        value.setflags(write=False)  # what is derived is cached

  @property
  def num_ticks(self) -> int:
    return len(self.head_micro_Q)

  @property
  def num_virtual_stages(self) -> int:
    return self.num_stages * self.num_chunks

  @functools.cached_property
  def is_forward_only(self) -> bool:
    return bool((self.backward_micro_QZ < 0).all())

  @functools.cached_property
  def layer_order(self) -> np.ndarray:
    """Virtual stage at each position of the stored order (stage-major, chunk-minor), [W]."""
    stage, chunk = np.divmod(np.arange(self.num_virtual_stages), self.num_chunks)
    return (chunk * self.num_stages + stage).astype(np.int32)

  @functools.cached_property
  def embed_micro_Q(self) -> np.ndarray:
    """The micro-batch that all stages embed in each tick."""
    return np.where(self.forward_chunk_QZ[:, 0] == 0, self.forward_micro_QZ[:, 0], np.int32(-1))

  @functools.cached_property
  def embed_gradient_micro_Q(self) -> np.ndarray:
    """The micro-batch whose embedding gradient all stages share in each tick."""
    return np.where(self.backward_chunk_QZ[:, 0] == 0, self.backward_micro_QZ[:, 0], np.int32(-1))

  # When each unit runs.

  @functools.cached_property
  def forward_tick_UW(self) -> np.ndarray:
    return self._tick_UW(self.forward_micro_QZ, self.forward_chunk_QZ)

  @functools.cached_property
  def backward_tick_UW(self) -> np.ndarray:
    return self._tick_UW(self.backward_micro_QZ, self.backward_chunk_QZ)

  @functools.cached_property
  def head_tick_U(self) -> np.ndarray:
    tick_U = np.full(self.num_micro_batches, -1, np.int32)
    (tick,) = np.nonzero(self.head_micro_Q >= 0)
    tick_U[self.head_micro_Q[tick]] = tick
    return tick_U

  @functools.cached_property
  def head_needs_broadcast(self) -> bool:
    """Whether a finished micro-batch must be sent round for its head, in which all stages take
    part. With two stages and each head in the next tick the last stage has just made it, and the
    transfer brings it to the first.
    """
    is_next_U = self.head_tick_U == self.forward_tick_UW[:, -1] + 1
    return self.num_stages > 1 and not (self.num_stages == 2 and is_next_U.all())

  def _tick_UW(self, micro_QZ, chunk_QZ):
    tick_UW = np.full((self.num_micro_batches, self.num_virtual_stages), -1, np.int32)
    tick, stage = np.nonzero(micro_QZ >= 0)
    tick_UW[micro_QZ[tick, stage], chunk_QZ[tick, stage] * self.num_stages + stage] = tick
    return tick_UW

  # Where each value waits: for a unit (slot_UW), then for each cell that writes or reads it.

  @functools.cached_property
  def stash_slot_UW(self) -> np.ndarray:
    """Slot of what a unit saves in its forward for its backward."""
    if self.is_forward_only:
      return np.full_like(self.forward_tick_UW, -1)
    return slots.color(slots.stashed(self.forward_tick_UW, self.backward_tick_UW, self.num_stages))

  @functools.cached_property
  def inbox_slot_UW(self) -> np.ndarray:
    """Slot, on the next stage of the ring, in which a unit's output waits for its reader."""
    return slots.color(slots.outputs(self.forward_tick_UW, self.head_tick_U, self.num_stages))

  @functools.cached_property
  def cotangent_slot_UW(self) -> np.ndarray:
    """Slot in which the cotangent of a unit's output waits; the last one's never waits."""
    slot_UW = np.full_like(self.backward_tick_UW, -1)
    if not self.is_forward_only:
      slot_UW[:, :-1] = slots.color(slots.cotangents(self.backward_tick_UW, self.num_stages))
    return slot_UW

  @property
  def peak_in_flight(self) -> int:
    """Stash slots that the program allocates, on every stage as many as the fullest one needs."""
    return int(self.stash_slot_UW.max()) + 1

  @property
  def num_inbox_slots(self) -> int:
    return max(1, int(self.inbox_slot_UW.max()) + 1)

  @property
  def num_cotangent_slots(self) -> int:
    return max(1, int(self.cotangent_slot_UW.max()) + 1)

  @functools.cached_property
  def forward_slot_QZ(self) -> np.ndarray:
    """Stash slot that the forward unit of a cell writes."""
    return self._of_forward(self.stash_slot_UW)

  @functools.cached_property
  def backward_slot_QZ(self) -> np.ndarray:
    """Stash slot that the backward unit of a cell reads."""
    return self._of_backward(self.stash_slot_UW)

  @functools.cached_property
  def arrival_slot_QZ(self) -> np.ndarray:
    """Inbox slot written at a tick's start with what the previous stage sent in the tick before."""
    return _next_tick(np.roll(self._of_forward(self.inbox_slot_UW), 1, axis=1))

  @functools.cached_property
  def forward_inbox_slot_QZ(self) -> np.ndarray:
    """Inbox slot that the forward unit of a cell reads; -1 also where it reads the embedding."""
    return self._of_forward(_of_previous(self.inbox_slot_UW))

  @functools.cached_property
  def head_inbox_slot_Q(self) -> np.ndarray:
    """Inbox slot of stage 0 that the head of a tick reads."""
    slot_Q = self.inbox_slot_UW[self.head_micro_Q, -1]
    return np.where(self.head_micro_Q >= 0, slot_Q, np.int32(-1))

  @functools.cached_property
  def cotangent_arrival_slot_QZ(self) -> np.ndarray:
    """Cotangent slot written at a tick's start with what the next stage sent in the tick before."""
    sent_QZ = self._of_backward(_of_previous(self.cotangent_slot_UW))
    return _next_tick(np.roll(sent_QZ, -1, axis=1))

  @functools.cached_property
  def backward_inbox_slot_QZ(self) -> np.ndarray:
    """Cotangent slot that the backward unit of a cell reads; -1 also where it reads the head's."""
    return self._of_backward(self.cotangent_slot_UW)

  def _of_forward(self, value_UW):
    return self._of_cells(value_UW, self.forward_micro_QZ, self.forward_chunk_QZ)

  def _of_backward(self, value_UW):
    return self._of_cells(value_UW, self.backward_micro_QZ, self.backward_chunk_QZ)

  def _of_cells(self, value_UW, micro_QZ, chunk_QZ):
    virtual_QZ = np.where(micro_QZ >= 0, chunk_QZ * self.num_stages + np.arange(self.num_stages), 0)
    return np.where(micro_QZ >= 0, value_UW[micro_QZ, virtual_QZ], np.int32(-1))

  # What it costs.

  @functools.cached_property
  def ticks_by_kind(self) -> dict[str, int]:
    """Number of ticks in which any stage runs a unit of each kind."""
    return {
      "embed": int((self.embed_micro_Q >= 0).sum()),
      "forward": int((self.forward_micro_QZ >= 0).any(axis=1).sum()),
      "head": int((self.head_micro_Q >= 0).sum()),
      "backward": int((self.backward_micro_QZ >= 0).any(axis=1).sum()),
      "embed_gradient": int((self.embed_gradient_micro_Q >= 0).sum()),
    }

  @functools.cached_property
  def units_by_kind(self) -> dict[str, int]:
    """Number of units of each kind that one stage runs."""
    micro_units = self.num_micro_batches
    chunk_units = micro_units * self.num_chunks
    trains = not self.is_forward_only
    return {
      "embed": micro_units,
      "forward": chunk_units,
      "head": micro_units,
      "backward": chunk_units * trains,
      "embed_gradient": micro_units * trains,
    }

  def step_seconds(self, costs: Mapping[str, float]) -> float:
    """Seconds of all ticks, each of which costs the union of the kinds that any stage runs in it.

    Args:
      costs: seconds of one unit of every kind in KINDS.

    Raises:
      ValueError: a kind is missing or unknown, or its cost is not a finite number from 0.
    """
    check_costs(costs)
    return sum(float(costs[kind]) * self.ticks_by_kind[kind] for kind in KINDS)

  def bubble_fraction(self, costs: Mapping[str, float]) -> float:
    """Share of `step_seconds` in which a stage runs no unit of its own.

    Args:
      costs: seconds of one unit of every kind in KINDS.

    Raises:
      ValueError: as `step_seconds`, and where nothing that runs costs anything.
    """
    step_s = self.step_seconds(costs)
    if not step_s > 0:
      raise ValueError(f"costs={dict(costs)} make a step of 0 seconds; give a cost above 0")
    idle_ticks = {kind: self.ticks_by_kind[kind] - self.units_by_kind[kind] for kind in KINDS}
    return sum(float(costs[kind]) * idle_ticks[kind] for kind in KINDS) / step_s


def check_costs(costs: Mapping[str, float]) -> None:
  """Refuses costs that do not give each kind of unit a finite number of seconds.

  Raises:
    ValueError: names the kind.
  """
  wrong = [f"{kind} is missing" for kind in KINDS if kind not in costs]
  wrong += [f"{kind} is unknown" for kind in costs if kind not in KINDS]
  if wrong:
    raise ValueError(f"costs: {', '.join(wrong)}; give seconds for exactly {', '.join(KINDS)}")
  for kind in KINDS:
    if not isinstance(costs[kind], numbers.Real) or not 0 <= costs[kind] < math.inf:
      raise ValueError(f"costs: {kind}={costs[kind]!r}; give finite seconds, 0 or more")


def check(table: Table) -> None:
  """Refuses a table that is not legal, by running through it tick by tick.

  Each unit runs once on its stage, in an earlier tick than what reads its result; the backward of
  the last virtual stage runs in the tick of its head; no slot is written while it holds a value.

  Raises:
    ValueError: a wrong shape, dtype or range, or the first tick, stage, unit and rule that fail.
  """
  legality.check_form(table)
  legality.check_order(table)
  slots.check_no_overrun(
    slots.outputs(table.forward_tick_UW, table.head_tick_U, table.num_stages),
    table.inbox_slot_UW,
  )
  if not table.is_forward_only:
    slots.check_no_overrun(
      slots.stashed(table.forward_tick_UW, table.backward_tick_UW, table.num_stages),
      table.stash_slot_UW,
    )
    slots.check_no_overrun(
      slots.cotangents(table.backward_tick_UW, table.num_stages), table.cotangent_slot_UW[:, :-1]
    )


def to_text(table: Table) -> str:
  """Returns the table as lines of text: blocks of ticks, in each a row per stage.

  F is a forward and B a backward unit; a number is a micro-batch, `.1` after it is chunk 1.
  """

  def unit(letter, micro, chunk):
    if micro < 0:
      return ""
    return f"{letter}{micro}.{chunk}" if table.num_chunks > 1 else f"{letter}{micro}"

  ticks = range(table.num_ticks)
  rows = {"tick": [str(tick) for tick in ticks], "head": [_digits(u) for u in table.head_micro_Q]}
  cells = zip(
    *(table.backward_micro_QZ.T, table.backward_chunk_QZ.T),
    *(table.forward_micro_QZ.T, table.forward_chunk_QZ.T),
    strict=True,
  )
  for stage, columns in enumerate(cells):
    rows[f"stage {stage}"] = [
      f"{unit('B', b, y)} {unit('F', f, x)}".strip() for b, y, f, x in zip(*columns, strict=True)
    ]
  rows["embed"] = [_digits(u) for u in table.embed_micro_Q]
  if not table.is_forward_only:
    rows["embed grad"] = [_digits(u) for u in table.embed_gradient_micro_Q]
  return _header(table) + _blocks(rows)


def _header(table):
  return (
    f"{table.name}: stages={table.num_stages} micro_batches={table.num_micro_batches}"
    f" chunks={table.num_chunks}; {table.num_ticks} ticks\n"
    f"slots: {table.peak_in_flight} of the stash, {table.num_inbox_slots} of the activation inbox,"
    f" {table.num_cotangent_slots} of the cotangent inbox\n"
  )


def _blocks(rows):
  label = max(map(len, rows))
  width = 2 + max(len(cell) for cells in rows.values() for cell in cells)
  per_block = max(1, (_TEXT_COLUMNS - label) // width)
  text = ""
  for first in range(0, len(rows["tick"]), per_block):
    text += "\n"
    for name, cells in rows.items():
      shown = "".join(f"  {cell or '.':<{width - 2}}" for cell in cells[first : first + per_block])
      text += f"{name:<{label}}{shown}".rstrip() + "\n"
  return text


def _digits(micro):
  return "" if micro < 0 else str(micro)


def _of_previous(value_UW):
  return np.concatenate([np.full_like(value_UW[:, :1], -1), value_UW[:, :-1]], axis=1)


def _next_tick(value_QZ):
  return np.concatenate([np.full_like(value_QZ[:1], -1), value_QZ[:-1]])
