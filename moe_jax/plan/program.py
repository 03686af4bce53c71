"""A training step as the operations that every device runs, tick by tick, and what each waits for.

One SPMD program: an operation is run by every device at its own pace, on its own stage's cell of
the schedule's table. Made of the same table that the executor runs and the steps of `phases`, so
neither can say otherwise. What XLA cannot carry over a turn of a loop ends there: operations of one
block may overlap, blocks may not. Knows tables and steps; must not know time or
chips.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.config import Config, Pipeline
from moe_jax.pipeline import segments
from moe_jax.pipeline.table import Table
from moe_jax.plan import memory, phases, units
from moe_jax.plan.steps import Step

# Before and after the ticks; and the two directions between stages.
BEGIN, END, ARRIVE, RETURN = "begin", "end", "arrive", "return"
NOT_WAITED_FOR = units.NOT_WAITED_FOR | phases.AHEAD
_MOST_PIECES = 4


class Op(NamedTuple):
  """One operation.

  Attributes:
    step: what it does.
    unit: that it is part of: a kind of pipeline.table.KINDS, or one of the names above.
    layer: of the unit's chunk, counted from its first; 0 outside of layers.
    after: operations of the same block that it waits for, by place in the block.
  """

  step: Step
  unit: str
  layer: int
  after: tuple[int, ...]


Block = tuple[Op, ...]


class Tick(NamedTuple):
  """Which units any stage runs in a tick, and whether the head waits for a broadcast; alike ticks
  cost alike.
  """

  arrive: bool
  broadcast: bool
  head: bool
  backward: bool
  embed_gradient: bool
  returns: bool
  embed: bool
  forward: bool


def ticks(table: Table) -> list[Tick]:
  """Returns what each tick runs.

  The executor makes one loop of each run of ticks that agree on having a forward and a backward
  unit; a transfer that any tick of a loop needs is in all of them.
  """
  at, has_others = segments.units(table), table.num_stages > 1
  arrives = [
    np.full(each.at["arrival"].shape, each.at["arrival"].any()) for each in segments.segments(table)
  ]
  columns = (
    np.concatenate(arrives) & has_others,
    at["head"] & table.head_needs_broadcast,
    at["head"],
    at["backward"],
    at["embed_gradient"] & at["backward"],
    at["backward"] & has_others,
    at["embed"],
    at["forward"],
  )
  return [Tick(*row) for row in np.stack(columns, 1).tolist()]


def train(settings: Config, tied: bool = True) -> list[tuple[int, tuple[Block, ...]]]:
  """Returns a training step as (tick, blocks) in the order in which they run.

  Tick -1 and the number of ticks are what stands before and after.

  Args:
    settings: the deployment.
    tied: whether the layers of a tick's forward unit run beside those of its backward unit.
  """
  table = memory.table(settings.pipeline, settings.mesh.stage)
  return [
    (-1, begin(settings)),
    *((tick, tick_blocks(settings, runs, tied)) for tick, runs in enumerate(ticks(table))),
    (table.num_ticks, end(settings)),
  ]


def counted(settings: Config, tied: bool = True) -> list[tuple[int, tuple[Block, ...]]]:
  """Returns the same as (how often, blocks), alike ticks together, in no order."""
  return [
    (1, begin(settings)),
    *(
      (times, tick_blocks(settings, runs, tied))
      for runs, times in tick_counts(settings.pipeline, settings.mesh.stage)
    ),
    (1, end(settings)),
  ]


@functools.lru_cache(maxsize=4096)
def tick_counts(pipeline: Pipeline, stages: int) -> tuple[tuple[Tick, int], ...]:
  """Returns how many ticks of each kind a schedule has."""
  kinds = np.asarray(ticks(memory.table(pipeline, stages)), bool)
  kinds, count = np.unique(kinds, axis=0, return_counts=True)
  return tuple(
    (Tick(*kind), times) for kind, times in zip(kinds.tolist(), count.tolist(), strict=True)
  )


def begin(settings: Config) -> tuple[Block, ...]:
  """Returns the blocks before the first tick: compute copies of the weights."""
  return (_chains((BEGIN, 0, units.begin(settings))),)


def end(settings: Config) -> tuple[Block, ...]:
  """Returns the blocks after the last tick: gradients summed, weights updated."""
  return (_chains((END, 0, units.end(settings))),)


@functools.lru_cache(maxsize=4096)
def tick_blocks(settings: Config, runs: Tick, tied: bool) -> tuple[Block, ...]:
  """Returns the blocks of a tick: before its layers, one layer after another, and behind them."""
  num_layers = units.layers_per_unit(settings)
  blocks = [before_layers(settings, runs)]
  if tied and runs.forward and runs.backward:
    for layer in range(num_layers):
      blocks.append(tied_layers(settings, num_layers - 1 - layer, layer))
  else:
    if runs.backward:
      blocks += [
        one_layer(settings, "backward", layer, tied) for layer in reversed(range(num_layers))
      ]
    if runs.forward:
      blocks += [one_layer(settings, "forward", layer, tied) for layer in range(num_layers)]
  blocks.append(behind_layers(settings, runs))
  return tuple(block for block in blocks if block)


def before_layers(settings: Config, runs: Tick) -> Block:
  """Returns a tick's head and embedding, and beside them the transfer from the stage before, which
  the head waits for unless it has a broadcast of its own.
  """
  head = (units.broadcast(settings),) if runs.broadcast else ()
  chains = []
  if runs.arrive:
    chains.append((ARRIVE, 0, (units.transfer(settings, "to the next stage"),)))
  if runs.head:
    chains.append(("head", 0, (*head, *units.unit(settings, "head"))))
  if runs.embed:
    chains.append(("embed", 0, units.unit(settings, "embed")))
  block = _chains(*chains)
  if runs.arrive and runs.head and not runs.broadcast:
    arrival, first, *others = block
    block = (arrival, first._replace(after=(0,)), *others)
  return block


def behind_layers(settings: Config, runs: Tick) -> Block:
  """Returns a tick's embedding gradient, and beside it the transfer to the stage before."""
  chains = []
  if runs.embed_gradient:
    chains.append(("embed_gradient", 0, units.unit(settings, "embed_gradient")))
  if runs.returns:
    chains.append((RETURN, 0, (units.transfer(settings, "to the previous stage"),)))
  return _chains(*chains)


def one_layer(settings: Config, kind: str, layer: int = 0, tied: bool = True) -> Block:
  """Returns a layer of a forward or backward unit by itself; not tied, step after step."""
  return _chains(
    (kind, layer, units.unit(settings, kind)), late=phases.LATE if tied else frozenset()
  )


def tied_layers(settings: Config, back_layer: int = 0, layer: int = 0) -> Block:
  """Returns a layer of a backward unit beside one of a forward unit, step beside step."""
  return _chains(
    ("backward", back_layer, units.unit(settings, "backward")),
    ("forward", layer, units.unit(settings, "forward")),
    late=phases.LATE,
  )


def _chains(*chains: tuple[str, int, Sequence[Step]], late: frozenset[str] = frozenset()) -> Block:
  """Returns the block of chains of steps that need nothing of each other.

  Args:
    chains: (unit, layer, steps) of each.
    late: names of steps that nothing waits for. They stand last, in pieces, and so fill the time in
      which chains communicate.
  """
  ops: list[Op] = []
  behind: list[tuple[Step, str, int, tuple[int, ...]]] = []
  for unit, layer, steps in chains:
    last: tuple[int, ...] = ()
    for step in steps:
      if step.name in late:
        behind.append((step, unit, layer, () if step.name in phases.STASHED else last))
        continue
      ops.append(Op(step, unit, layer, last))
      if step.name not in NOT_WAITED_FOR:
        last = (len(ops) - 1,)
  for step, unit, layer, after in behind:
    number = max(1, min(_MOST_PIECES, step.kernels))
    part = dataclasses.replace(
      step, flops=step.flops / number, num_bytes=step.num_bytes / number,
      kernels=step.kernels / number,
    )  # fmt: skip
    for _ in range(number):
      ops.append(Op(part, unit, layer, after))
      after = (len(ops) - 1,)
  return tuple(ops)
