"""A training step on a cluster: its time, what hides behind what, its timeline.

Alike ticks are simulated once. Knows the step's blocks and what each takes; must not know how a
timeline is drawn.
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moe_jax.config import Config
from moe_jax.pipeline.table import KINDS
from moe_jax.plan import links, memory, program, units
from moe_jax.plan.machine import BlockRun, Machine, run_block, run_once, stream, wires
from moe_jax.plan.program import Block

_OF_LAYERS = ("forward", "backward")


class Event(NamedTuple):
  """One operation of one device on the timeline.

  Attributes:
    stream: of STREAMS.
    name, phase, part, unit: of the operation.
    tick, layer: where it stands; see program.train.
    start_s, end_s: from the step's begin.
  """

  stream: str
  name: str
  phase: str
  part: str
  unit: str
  tick: int
  layer: int
  start_s: float
  end_s: float


class Run(NamedTuple):
  """What a step takes, of the slowest device where they differ.

  Attributes:
    step_s: of all operations.
    launch_s: of `compute_s`, in which no kernel runs, for one is launched.
    compute_s: of kernels and their launches.
    bubble_fraction: idle cells of the executed table, at the units' times.
    unit_s: of one unit of each kind, alone.
    compute_s_by_phase: of kernels.
    seconds_by_stream: of collectives, by stream.
    seconds_by_link: of collectives, inside and between hosts.
    hidden_s_by_stream: of which kernels ran meanwhile.
    bytes_by_link: sent by one GPU.
  """

  step_s: float
  launch_s: float
  compute_s: float
  bubble_fraction: float
  unit_s: Mapping[str, float]
  compute_s_by_phase: Mapping[str, float]
  seconds_by_stream: Mapping[str, float]
  seconds_by_link: Mapping[str, float]
  hidden_s_by_stream: Mapping[str, float]
  bytes_by_link: Mapping[str, float]

  @property
  def exposed_s(self) -> float:
    """In which no kernel runs."""
    return self.step_s - self.compute_s

  @property
  def hidden_fraction(self) -> float | None:
    """Of the time of all collectives; None where there are none."""
    seconds = sum(self.seconds_by_stream.values())
    return sum(self.hidden_s_by_stream.values()) / seconds if seconds else None

  @property
  def hideable_fraction(self) -> float | None:
    """Of the time of all collectives, what computation could cover at most, link by link."""
    seconds = sum(self.seconds_by_link.values())
    can = sum(min(each, self.compute_s) for each in self.seconds_by_link.values())
    return can / seconds if seconds else None


def step_seconds(settings: Config, machine: Machine, tied: bool = True) -> float:
  """Returns the seconds of a training step, alike ticks once: what the search ranks by."""
  cost = _costs(_unscheduled(settings), machine, tied)
  num_layers = units.layers_per_unit(settings)
  step_s = cost.ends(*program.shares(settings))
  for runs, times in program.tick_counts(settings.pipeline, settings.mesh.stage):
    step_s += times * (cost.before(runs) + cost.layers(runs, num_layers) + cost.behind(runs))
  return step_s


class _Costs:
  """Seconds of what ticks are made of, which no schedule changes."""

  def __init__(self, settings: Config, machine: Machine, tied: bool):
    self.settings, self.machine, self.tied = settings, machine, tied
    self.known: dict[tuple, float] = {}

  def ends(self, *shares: float) -> float:
    """Of what stands before and after the ticks, with `program.shares`."""
    return self._known(("ends", *shares), lambda: program.ends_of(self.settings, *shares))

  def before(self, runs: program.Tick) -> float:
    """Of what stands before the layers of a tick."""
    key = ("before", runs.broadcast, runs.head, runs.embed)
    return self._known(key, lambda: [program.before_layers(self.settings, runs)])

  def behind(self, runs: program.Tick) -> float:
    """Of what stands behind them."""
    key = ("behind", runs.embed_gradient, runs.sends, runs.returns)
    return self._known(key, lambda: [program.behind_layers(self.settings, runs)])

  def layers(self, runs: program.Tick, number: int) -> float:
    """Of so many layers of each unit of a tick."""
    if not program.moves_a_chunk(self.settings, runs):
      return number * self._layer(runs)
    key = ("chunk", runs.forward, runs.last, number)
    return self._known(
      key, lambda: [program.layers_of_chunk(self.settings, runs, number, self.tied)]
    )

  def _layer(self, runs: program.Tick) -> float:
    """Of one layer of each unit of a tick."""
    key = ("layer", runs.forward, runs.backward, runs.comes, runs.leaves)

    def blocks():
      if self.tied and runs.forward and runs.backward:
        return [program.tied_layers(self.settings)]
      ways = {"backward": runs.leaves, "forward": runs.comes}
      return [
        program.one_layer(self.settings, kind, tied=self.tied, moves=moves)
        for kind, moves in ways.items()
        if getattr(runs, kind)
      ]

    return self._known(key, blocks)

  def _known(self, key, blocks) -> float:
    if key not in self.known:
      self.known[key] = self._of(blocks())
    return self.known[key]

  def _of(self, blocks) -> float:
    return sum(run_once(block, self.settings, self.machine).end_s for block in blocks if block)


@functools.lru_cache(maxsize=16384)
def _costs(settings: Config, machine: Machine, tied: bool) -> _Costs:
  return _Costs(settings, machine, tied)


def _unscheduled(settings: Config) -> Config:
  """Returns `settings` with the plainest schedule, which has the same layers and ends."""
  pipeline = dataclasses.replace(settings.pipeline, schedule="1f1b", chunks=1)
  return dataclasses.replace(settings, pipeline=pipeline)


def unit_seconds(settings: Config, machine: Machine, tied: bool = True) -> dict[str, float]:
  """Returns the seconds of one unit of every kind by itself: what a bubble is counted in."""
  layer = functools.partial(program.one_layer, settings, tied=tied)
  alone = lambda kind: run_block(layer(kind), settings, machine).end_s
  num_layers = units.layers_per_unit(settings)
  return {kind: alone(kind) * (num_layers if kind in _OF_LAYERS else 1) for kind in KINDS}


def bubble_fraction(settings: Config, machine: Machine, tied: bool = True) -> float:
  """Returns which share of a training step a stage is idle, by the executed table."""
  table = memory.table(settings.pipeline, settings.mesh.stage)
  return table.bubble_fraction(unit_seconds(settings, machine, tied))


def train(settings: Config, machine: Machine, tied: bool = True) -> Run:
  """Returns a training step under an even load."""
  totals: collections.Counter = collections.Counter()
  by_phase, by_stream, by_link, hidden, sent = (collections.Counter() for _ in range(5))
  for times, blocks in program.counted(settings, tied):
    for block in blocks:
      ran = run_block(block, settings, machine)
      totals["step"] += times * ran.end_s
      kernels = _busy(block, ran)
      totals["kernels"] += times * sum(op.step.kernels for op in block)
      for op, start_s, end_s in zip(block, ran.starts, ran.ends, strict=True):
        took_s = times * (end_s - start_s)
        if not op.step.is_communication:
          totals["compute"] += took_s
          by_phase[op.step.phase] += took_s
          continue
        to = wires(op.step, settings, machine)
        by_stream[stream(op.step)] += took_s
        by_link[to.link] += took_s
        sent[to.link] += times * links.bytes_sent(op.step.kind, op.step.operand_bytes, to.size)
        hidden[stream(op.step)] += times * _overlap(kernels, start_s, end_s)
  return Run(
    step_s=totals["step"],
    launch_s=totals["kernels"] * machine.calibration.launch_s,
    compute_s=totals["compute"],
    bubble_fraction=bubble_fraction(settings, machine, tied),
    unit_s=unit_seconds(settings, machine, tied),
    compute_s_by_phase=dict(by_phase),
    seconds_by_stream=dict(by_stream),
    seconds_by_link=dict(by_link),
    hidden_s_by_stream=dict(hidden),
    bytes_by_link=dict(sent),
  )


def events(settings: Config, machine: Machine, tied: bool = True) -> list[Event]:
  """Returns the timeline of a step on any one device, under an even load."""
  found, now_s = [], 0.0
  for tick, blocks in program.train(settings, tied):
    for block in blocks:
      ran = run_block(block, settings, machine)
      for op, start_s, end_s in zip(block, ran.starts, ran.ends, strict=True):
        if end_s > start_s:
          found.append(
            Event(
              stream(op.step), op.step.name, op.step.phase, op.step.part, op.unit, tick, op.layer,
              now_s + start_s, now_s + end_s,
            )
          )  # fmt: skip
      now_s += ran.end_s
  return found


def _busy(block: Block, ran: BlockRun) -> list[tuple[float, float]]:
  """Returns the intervals in which kernels run."""
  return [
    (start_s, end_s)
    for op, start_s, end_s in zip(block, ran.starts, ran.ends, strict=True)
    if not op.step.is_communication
  ]


def _overlap(intervals: Sequence[tuple[float, float]], start_s: float, end_s: float) -> float:
  return sum(max(0.0, min(end_s, b) - max(start_s, a)) for a, b in intervals)
