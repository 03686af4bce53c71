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
from moe_jax.plan.steps import Step, sizes

# Before and after the ticks, and at the begin of each; and transfers to the next stage, to the one
# before, and both in one.
BEGIN, END, TICK = "begin", "end", "tick"
ARRIVE, RETURN, BOTH = "arrive", "return", "arrive and return"
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

  broadcast: bool
  head: bool
  backward: bool
  embed_gradient: bool
  embed: bool
  forward: bool
  sends: bool  # to the next stage
  returns: bool
  comes: bool  # weights of a chunk
  leaves: bool  # gradients of a chunk
  last: bool  # and of the first one, but for its first layer's


def ticks(table: Table) -> list[Tick]:
  """Returns what each tick runs.

  The executor makes one loop of each of `segments.segments`; a transfer that any tick of a loop
  needs is in all of them.
  """
  at, has_others = segments.units(table), table.num_stages > 1
  sends = [
    np.full(each.at["departure"].shape, each.at["departure"].any())
    for each in segments.segments(table)
  ]
  columns = (
    at["head"] & table.head_needs_broadcast,
    at["head"],
    at["backward"],
    at["embed_gradient"] & at["backward"],
    at["embed"],
    at["forward"],
    np.concatenate(sends) & has_others,
    at["backward"] & has_others,
    at["comes"],
    at["leaves"],
    at["last"],
  )
  return [Tick(*row) for row in np.stack(columns, 1).tolist()]


def train(settings: Config, tied: bool = True) -> list[tuple[int, tuple[Block, ...]]]:
  """Returns a training step as (tick, blocks) in the order in which they run.

  Tick -1 and the number of ticks are what stands before and after.

  Args:
    settings: the deployment.
    tied: whether the layers of a tick's forward unit run beside those of its backward unit.
  """
  table, (begin, end) = memory.table(settings.pipeline, settings.mesh.stage), ends(settings)
  return [
    (-1, (begin,)),
    *((tick, tick_blocks(settings, runs, tied)) for tick, runs in enumerate(ticks(table))),
    (table.num_ticks, (end,)),
  ]


def counted(settings: Config, tied: bool = True) -> list[tuple[int, tuple[Block, ...]]]:
  """Returns the same as (how often, blocks), alike ticks together, in no order."""
  return [
    (1, ends(settings)),
    *(
      (times, tick_blocks(settings, runs, tied))
      for runs, times in tick_counts(settings.pipeline, settings.mesh.stage)
    ),
  ]


@functools.lru_cache(maxsize=4096)
def tick_counts(pipeline: Pipeline, stages: int) -> tuple[tuple[Tick, int], ...]:
  """Returns how many ticks of each kind a schedule has."""
  kinds = np.asarray(ticks(memory.table(pipeline, stages)), bool)
  kinds, count = np.unique(kinds, axis=0, return_counts=True)
  return tuple(
    (Tick(*kind), times) for kind, times in zip(kinds.tolist(), count.tolist(), strict=True)
  )


def ends(settings: Config) -> tuple[Block, Block]:
  """Returns the block before the first tick, compute copies of the weights, and the one after the
  last: gradients summed, weights updated.
  """
  return ends_of(settings, *shares(settings))


def ends_of(
  settings: Config, gathered: float, summed: float, is_head_late: bool
) -> tuple[Block, Block]:
  """Returns the same with these `shares`."""
  begin, end = units.begin(settings, gathered, is_head_late), units.end(settings, summed)
  return _chains((BEGIN, 0, begin)), _chains((END, 0, end))


def shares(settings: Config) -> tuple[float, float, bool]:
  """Returns which share of the weights that may come beside ticks is gathered before them, which
  share of their gradients is summed behind them: the first chunk's, or all; and whether the
  pipeline gathers the head's weights itself, which is planned as before the ticks.
  """
  of_ticks = tick_counts(settings.pipeline, settings.mesh.stage)
  share = lambda some: 1 / settings.pipeline.chunks if some else 1.0
  comes, leaves = (any(getattr(runs, way) for runs, _ in of_ticks) for way in ("comes", "leaves"))
  is_head_late = _has_room_beside_heads(settings.pipeline, settings.mesh.stage)
  summed = share(leaves)
  if all_leave_but_one(settings):
    summed = 1 / settings.model.layers
  return share(comes and not settings.pipeline.prefetch_layers), summed, is_head_late


def all_leave_but_one(settings: Config) -> bool:
  """Says whether the gradients of all layers but the first leave beside ticks."""
  of_ticks = tick_counts(settings.pipeline, settings.mesh.stage)
  return travels_by_chunk(settings) and any(runs.last for runs, _ in of_ticks)


def moves_a_chunk(settings: Config, runs: Tick) -> bool:
  """Says whether beside a tick's only unit a chunk's weights come, or its gradients leave, in one
  message.
  """
  is_alone, is_streamed = runs.forward != runs.backward, settings.pipeline.prefetch_layers > 0
  moves = (runs.comes and not is_streamed) or runs.leaves
  return is_alone and moves and travels_by_chunk(settings)


def travels_by_chunk(settings: Config) -> bool:
  """Says whether weights and gradients travel so between copies: layers send nothing between hosts
  themselves.
  """
  mesh, is_inside = settings.mesh, settings.moe.expert_ranks_per_host == settings.mesh.expert
  return mesh.data > 1 and (mesh.expert == 1 or is_inside)


@functools.lru_cache(maxsize=4096)
def _has_room_beside_heads(pipeline: Pipeline, stages: int) -> bool:
  return segments.has_room_beside_heads(memory.table(pipeline, stages))


@functools.lru_cache(maxsize=4096)
def tick_blocks(settings: Config, runs: Tick, tied: bool) -> tuple[Block, ...]:
  """Returns the blocks of a tick: before its layers, one layer after another, and behind them."""
  num_layers = units.layers_per_unit(settings)
  blocks = [before_layers(settings, runs)]
  if tied and runs.forward and runs.backward:
    for layer in range(num_layers):
      blocks.append(tied_layers(settings, num_layers - 1 - layer, layer))
  elif moves_a_chunk(settings, runs):
    blocks.append(layers_of_chunk(settings, runs, num_layers, tied))
  else:
    if runs.backward:
      blocks += [
        one_layer(settings, "backward", layer, tied, runs.leaves)
        for layer in reversed(range(num_layers))
      ]
    if runs.forward:
      blocks += [
        one_layer(settings, "forward", layer, tied, runs.comes) for layer in range(num_layers)
      ]
  blocks.append(behind_layers(settings, runs))
  return tuple(block for block in blocks if block)


def before_layers(settings: Config, runs: Tick) -> Block:
  """Returns a tick's begin, and beside each other its head and embedding."""
  head = (units.broadcast(settings),) if runs.broadcast else ()
  chains = [(TICK, 0, (units.tick(settings),))]
  if runs.head:
    chains.append(("head", 0, (*head, *units.unit(settings, "head"))))
  if runs.embed:
    chains.append(("embed", 0, units.unit(settings, "embed")))
  return _chains(*chains)


def behind_layers(settings: Config, runs: Tick) -> Block:
  """Returns a tick's embedding gradient, and beside it the transfers between stages: two stages'
  are one message.
  """
  chains = []
  if runs.embed_gradient:
    chains.append(("embed_gradient", 0, units.unit(settings, "embed_gradient")))
  step = units.transfer(settings, "to the next stage")
  back = units.transfer(settings, "to the previous stage")
  if runs.sends and runs.returns and settings.mesh.stage == 2:
    both = dataclasses.replace(step, name="both ways", operand_bytes=2 * step.operand_bytes)
    chains.append((BOTH, 0, (both,)))
  else:
    chains += [(ARRIVE, 0, (step,))] * runs.sends + [(RETURN, 0, (back,))] * runs.returns
  return _chains(*chains)


def one_layer(
  settings: Config, kind: str, layer: int = 0, tied: bool = True, moves: bool = False
) -> Block:
  """Returns a layer of a forward or backward unit by itself.

  Args:
    settings: the deployment.
    kind: of the unit.
    layer: of the unit's chunk.
    tied: whether what waits for nothing runs beside the others; else step after step.
    moves: whether a layer's weights come beside the forward unit, or gradients leave beside the
      backward unit, behind its first exchange.
  """
  (_, _, steps), *other = _streams(settings, kind, layer)
  if moves and not (kind == "forward" and settings.pipeline.prefetch_layers):
    beside = phases.gather_layer if kind == "forward" else phases.scatter_layer
    first = next((i for i, step in enumerate(steps) if "expert" in step.axes), 0)
    steps = (*steps[: first + 1], *beside(settings), *steps[first + 1 :])
  return _chains((kind, layer, steps), *other, late=phases.LATE if tied else frozenset())


def layers_of_chunk(settings: Config, runs: Tick, num_layers: int, tied: bool = True) -> Block:
  """Returns the layers of a unit alone, and beside them the message that brings the next chunk's
  weights or takes the last one's gradients; in the last tick, another with those of this chunk.

  Args:
    settings: the deployment.
    runs: what the tick does.
    num_layers: of a chunk.
    tied: as of `one_layer`.
  """
  kind = "forward" if runs.forward else "backward"
  streams = [(kind, 0, steps * num_layers) for _, _, steps in _streams(settings, kind, 0)]
  if runs.forward:
    message = ("prefetch", 0, phases.gather_layer(settings, num_layers))
  else:
    own = phases.scatter_layer(settings, num_layers - 1) if runs.last and num_layers > 1 else ()
    message = ("leave", 0, (*phases.scatter_layer(settings, num_layers), *own))
  return _chains(*streams, message, late=phases.LATE if tied else frozenset())


def tied_layers(settings: Config, back_layer: int = 0, layer: int = 0) -> Block:
  """Returns a layer of a backward unit beside one of a forward unit, step beside step."""
  return _chains(
    *_streams(settings, "backward", back_layer),
    *_streams(settings, "forward", layer),
    late=phases.LATE,
  )


def _streams(settings: Config, kind: str, layer: int) -> list[tuple[str, int, Sequence[Step]]]:
  """Returns a layer's chain, or those of a micro-batch's two halves."""
  parts = 2 if settings.pipeline.halves else 1
  return [(kind, layer, units.unit(settings, kind, sizes(settings, parts=parts)))] * parts


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
    ahead: tuple[int, ...] = ()  # of a layer to come, whose shares the next collective takes
    for step in steps:
      if step.name in late:
        behind.append((step, unit, layer, () if step.name in phases.STASHED else last))
        continue
      is_ahead = step.is_communication and step.name in phases.AHEAD
      ops.append(Op(step, unit, layer, (*last, *ahead) if is_ahead else last))
      ahead = (len(ops) - 1,) if is_ahead else ()
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
