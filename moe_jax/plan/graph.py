"""A training step as a graph: every step of every unit on every module, and what each waits for.

A module is one GPU's part of the model: copy x stage x expert rank x tensor rank. Nodes and edges
are columns of numpy arrays, for there are hundreds of thousands. Built from the schedule's table
and the steps of `phases`; `check` proves that it has no cycle and lacks no dependency of the
schedule. Knows tables and steps; must not know time or chips.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np

from moe_jax.config import Config
from moe_jax.pipeline.table import Table
from moe_jax.plan import memory, phases, program, units
from moe_jax.plan.steps import Step

DATA, TRANSFER, COLLECTIVE, PREFETCH = range(4)
EDGE_KINDS = ("data", "transfer", "collective", "weight prefetch")
UNITS = (
  "begin", "embed", "forward", "arrive", "head", "backward", "return", "embed_gradient", "end",
  "prefetch", "leave",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
  """Nodes [N] and edges [M] of a step.

  Attributes:
    settings: the deployment.
    steps: every different step; a node's `step` counts from here.
    unit, step, data, stage, expert, tensor, micro, virtual, layer: of each node; -1 where it has
      none. `unit` counts in UNITS, `virtual` is the virtual stage, `layer` counts from the model's
      first.
    source, target, kind: of each edge; `kind` counts in EDGE_KINDS.
  """

  settings: Config
  steps: tuple[Step, ...]
  unit: np.ndarray
  step: np.ndarray
  data: np.ndarray
  stage: np.ndarray
  expert: np.ndarray
  tensor: np.ndarray
  micro: np.ndarray
  virtual: np.ndarray
  layer: np.ndarray
  source: np.ndarray
  target: np.ndarray
  kind: np.ndarray

  @property
  def num_nodes(self) -> int:
    return len(self.unit)

  @property
  def num_edges(self) -> int:
    return len(self.source)

  @property
  def module(self) -> np.ndarray:
    """The module of each node, `tensor` innermost, as devices are numbered."""
    mesh = self.settings.mesh
    stage = self.data * mesh.stage + self.stage
    return (stage * mesh.expert + self.expert) * mesh.tensor + self.tensor


class _Unit(NamedTuple):
  """One instance of a unit: node of (operation i, module m) is first + i * modules + m."""

  first: int
  stages: range
  num_ops: int
  first_step: Step


def build(settings: Config) -> Graph:
  """Returns the graph of a training step."""
  return _Builder(settings).build()


class _Builder:
  """Appends units, then what lies between them."""

  def __init__(self, settings: Config):
    self.settings, self.mesh = settings, settings.mesh
    self.per_stage = self.mesh.expert * self.mesh.tensor
    self.steps: list[Step] = []
    self.numbers: dict[Step, int] = {}
    self.columns: list[np.ndarray] = []
    self.edges: list[tuple[np.ndarray, np.ndarray, int]] = []
    self.num_nodes = 0
    self.all_stages = range(self.mesh.stage)
    self.table = memory.table(settings.pipeline, settings.mesh.stage)

  def build(self) -> Graph:
    settings, table, virtuals = self.settings, self.table, self.table.num_virtual_stages
    gathered, summed, is_head_late = program.shares(settings)
    steps = units.begin(settings, gathered, is_head_late)
    begin = self.unit("begin", self.all_stages, [(step, -1) for step in steps])
    come = [self.come(begin, w) for w in range(virtuals)] if gathered < 1 else []
    ends, last = [], []
    for micro in range(table.num_micro_batches):
      embed = self.shared("embed", micro)
      forward = [self.layers("forward", micro, w) for w in range(virtuals)]
      backward = [self.layers("backward", micro, w) for w in range(virtuals)]
      head, gradient = self.shared("head", micro), self.shared("embed_gradient", micro)
      self.after(embed, forward[0], DATA)
      for w in range(virtuals - 1):
        self.move("arrive", micro, w, forward[w], forward[w + 1])
      for w in reversed(range(virtuals - 1)):
        self.move("return", micro, w + 1, backward[w + 1], backward[w])
      self.after(forward[-1], head, DATA)
      self.after(head, backward[-1], DATA)
      for ahead, back in zip(forward, backward, strict=True):
        self.after(ahead, back, DATA)  # what was saved
      self.after(backward[0], gradient, DATA)
      for unit in (embed, head, *forward, *backward):
        self.after(begin, unit, PREFETCH)
      for w, *both in zip(range(virtuals), forward, backward, strict=True):
        for unit in both:
          self.prefetch(begin, unit)
          if come and come[w]:
            self.after(come[w], unit, PREFETCH)
      ends += [*backward, head, gradient]
      last = backward
    if summed < 1:
      ends += filter(None, map(self.leave, range(virtuals), last))
    end = self.unit("end", self.all_stages, [(s, -1) for s in units.end(settings, summed)])
    for unit in ends:
      self.after(unit, end, DATA)
    return self.graph()

  def shared(self, kind: str, micro: int) -> _Unit:
    """Appends a unit that every stage takes part in."""
    steps = units.unit(self.settings, kind)
    if kind == "head" and self.table.head_needs_broadcast:
      steps = (units.broadcast(self.settings), *steps)
    return self.unit(kind, self.all_stages, [(step, -1) for step in steps], micro)

  def layers(self, kind: str, micro: int, virtual: int) -> _Unit:
    """Appends a unit of layers on its stage."""
    num_layers = units.layers_per_unit(self.settings)
    first = virtual * num_layers
    order = range(first, first + num_layers)
    steps = [step for step in units.unit(self.settings, kind) if step.name not in phases.AHEAD]
    stage = virtual % self.mesh.stage
    chain = [
      (s, layer) for layer in (order if kind == "forward" else reversed(order)) for s in steps
    ]
    return self.unit(kind, range(stage, stage + 1), chain, micro, virtual)

  def prefetch(self, begin: _Unit, unit: _Unit) -> None:
    """Appends the gathers of the streamed weights of a unit's layers, which come before it."""
    chain = [(s, -1) for s in phases.stream(self.settings)] * units.layers_per_unit(self.settings)
    if chain:
      ahead = self.unit("prefetch", unit.stages, chain)
      self.after(begin, ahead, DATA)
      self.after(ahead, unit, PREFETCH)

  def come(self, begin: _Unit, virtual: int) -> _Unit | None:
    """Appends the gathers of the weights of a chunk, if they come beside ticks."""
    stage = virtual % self.mesh.stage
    chain = [(s, -1) for s in phases.gather_layer(self.settings)]
    if virtual < self.mesh.stage or not chain:
      return None
    num_layers = units.layers_per_unit(self.settings)
    made = self.unit("prefetch", range(stage, stage + 1), chain * num_layers, virtual=virtual)
    self.after(begin, made, DATA)
    return made

  def leave(self, virtual: int, backward: _Unit) -> _Unit | None:
    """Appends the sums over ranks of a chunk's gradients, or of a part of the first one's, if they
    leave beside ticks, behind the last of its backward units.
    """
    chain = [(s, -1) for s in phases.scatter_layer(self.settings)]
    num_layers = units.layers_per_unit(self.settings)
    if virtual < self.mesh.stage:
      num_layers = num_layers - 1 if program.all_leave_but_one(self.settings) else 0
    if not chain or not num_layers:
      return None
    made = self.unit("leave", backward.stages, chain * num_layers, virtual=virtual)
    self.after(backward, made, DATA)
    return made

  def move(self, kind: str, micro: int, virtual: int, source: _Unit, target: _Unit) -> None:
    """Appends the transfer of what a unit made to the unit of another stage."""
    step = units.transfer(self.settings, f"{kind} on the other stage")
    way = self.unit(kind, source.stages, [(step, -1)], micro, virtual)
    self.after(source, way, DATA)
    self.connect(self.nodes(way, 0), self.nodes(target, 0), TRANSFER)

  def unit(self, kind, stages, chain, micro=-1, virtual=-1) -> _Unit:
    """Appends a chain of (step, layer) on all modules of `stages`, and what its collectives wait
    for: the members of their groups.
    """
    modules = self.mesh.data * len(stages) * self.per_stage
    made = _Unit(self.num_nodes, stages, len(chain), chain[0][0])
    op, module = np.divmod(np.arange(len(chain) * modules), modules)
    stage, rank = np.divmod(module, self.per_stage)
    column = np.empty((9, len(op)), np.int32)
    column[0] = UNITS.index(kind)
    column[1] = np.array([self._number(step) for step, _ in chain])[op]
    column[2], column[3] = np.divmod(stage, len(stages))
    column[3] += stages.start
    column[4], column[5] = np.divmod(rank, self.mesh.tensor)
    column[6], column[7] = micro, virtual
    column[8] = np.array([layer for _, layer in chain])[op]
    self.columns.append(column)
    self.num_nodes += column.shape[1]
    for before, now in itertools.pairwise(range(len(chain))):
      self.connect(self.nodes(made, before), self.nodes(made, now), DATA)
      self.gather(made, before, made, now, chain[now][0])
    return made

  def after(self, source: _Unit, target: _Unit, kind: int) -> None:
    """Connects the last operation of a unit to the first of another, on the modules of both."""
    stages = sorted(set(source.stages) & set(target.stages))
    rows = [stage - source.stages.start for stage in stages]
    columns = [stage - target.stages.start for stage in stages]
    last = self.nodes(source, source.num_ops - 1)[:, rows]
    self.connect(last, self.nodes(target, 0)[:, columns], kind)
    if kind == DATA:
      self.gather(source, source.num_ops - 1, target, 0, target.first_step)

  def gather(self, source: _Unit, i: int, target: _Unit, j: int, step: Step) -> None:
    """Connects operation i of all other members of its group to the collective j."""
    if not step.is_communication or step.kind == "collective-permute":
      return
    mesh = self.mesh
    # Of `expert` hosts, and ranks of a host where only one of the two takes part.
    ranks = self.settings.moe.expert_ranks_per_host if step.among else mesh.expert
    shape = (mesh.data, mesh.stage, mesh.expert // ranks, ranks, mesh.tensor)
    of_expert = {"": (2, 3), "hosts": (2,), "ranks": (3,)}[step.among]
    places = {"data": (0,), "stage": (1,), "expert": of_expert, "tensor": (4,)}
    axes = tuple(place for axis in step.axes for place in places[axis])
    starts = self._whole(source, i, shape)
    ends = self._whole(target, j, shape)
    others = [axis for axis in range(len(shape)) if axis not in axes]
    group = lambda nodes: nodes.transpose(others + list(axes)).reshape(
      -1, int(np.prod([shape[axis] for axis in axes]))
    )
    start, end = group(starts), group(ends)
    size = start.shape[1]
    pairs = ~np.eye(size, dtype=bool)
    left = np.broadcast_to(start[:, :, None], (len(start), size, size))[:, pairs].reshape(-1)
    right = np.broadcast_to(end[:, None, :], (len(end), size, size))[:, pairs].reshape(-1)
    there = (left >= 0) & (right >= 0)
    self.connect(left[there], right[there], COLLECTIVE)

  def nodes(self, unit: _Unit, op: int) -> np.ndarray:
    """Returns the nodes of an operation, [copies, stages, modules of a stage]."""
    shape = (self.mesh.data, len(unit.stages), self.per_stage)
    modules = math.prod(shape)
    return (unit.first + op * modules + np.arange(modules)).reshape(shape)

  def connect(self, source: np.ndarray, target: np.ndarray, kind: int) -> None:
    """Appends edges, node by node."""
    self.edges.append((source.reshape(-1), target.reshape(-1), kind))

  def graph(self) -> Graph:
    """Returns what was appended."""
    columns = np.concatenate(self.columns, 1)
    source, target = (np.concatenate([edge[i] for edge in self.edges]) for i in (0, 1))
    kind = np.concatenate([np.full(len(edge[0]), edge[2], np.int8) for edge in self.edges])
    return Graph(self.settings, tuple(self.steps), *columns, source, target, kind)

  def _whole(self, unit: _Unit, op: int, shape) -> np.ndarray:
    whole = np.full((*shape[:2], self.per_stage), -1)
    whole[:, unit.stages.start : unit.stages.stop] = self.nodes(unit, op)
    return whole.reshape(shape)

  def _number(self, step: Step) -> int:
    if step not in self.numbers:
      self.numbers[step] = len(self.steps)
      self.steps.append(step)
    return self.numbers[step]


def check(graph: Graph) -> None:
  """Refuses a graph with a cycle, or one that lacks a dependency of the schedule.

  Raises:
    ValueError: names the nodes or the units.
  """
  _check_acyclic(graph)
  _check_schedule(graph, memory.table(graph.settings.pipeline, graph.settings.mesh.stage))


def levels(graph: Graph) -> np.ndarray:
  """Returns for each node the length of the longest path to it; -1 for those in or past a cycle."""
  order = np.argsort(graph.source, kind="stable")
  target = graph.target[order]
  begin = np.searchsorted(graph.source[order], np.arange(graph.num_nodes + 1))
  missing = np.bincount(graph.target, minlength=graph.num_nodes)
  level = np.full(graph.num_nodes, -1, np.int32)
  frontier, depth = np.flatnonzero(missing == 0), 0
  while len(frontier):
    level[frontier] = depth
    counts = begin[frontier + 1] - begin[frontier]
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    reached = target[np.repeat(begin[frontier], counts) + offsets]
    nodes, times = np.unique(reached, return_counts=True)
    missing[nodes] -= times
    frontier, depth = nodes[missing[nodes] == 0], depth + 1
  return level


def _check_acyclic(graph: Graph) -> None:
  stuck = np.flatnonzero(levels(graph) < 0)
  if len(stuck):
    raise ValueError(
      f"the graph has a cycle: {len(stuck)} of {graph.num_nodes} nodes wait for each other, the"
      f" first is {describe(graph, int(stuck[0]))}"
    )


def _check_schedule(graph: Graph, table: Table) -> None:
  """Looks for every pair of units of which the table says that one reads what the other made."""
  key = lambda nodes: (
    (graph.unit[nodes].astype(np.int64) * (table.num_micro_batches + 1) + graph.micro[nodes] + 1)
    * (table.num_virtual_stages + 1)
    + graph.virtual[nodes]
    + 1
  )
  found = set(zip(key(graph.source).tolist(), key(graph.target).tolist(), strict=True))
  number = lambda unit, micro, virtual: (
    (UNITS.index(unit) * (table.num_micro_batches + 1) + micro + 1) * (table.num_virtual_stages + 1)
    + virtual
    + 1
  )
  for source, target in required(table):
    if (number(*source), number(*target)) not in found:
      raise ValueError(f"the graph lacks the dependency of {target} on {source}")


def required(table: Table) -> list[tuple[tuple[str, int, int], tuple[str, int, int]]]:
  """Returns the pairs (unit, micro-batch, virtual stage) that the schedule demands; -1 is all."""
  last = table.num_virtual_stages - 1
  pairs = []
  for micro in range(table.num_micro_batches):
    pairs += [
      (("embed", micro, -1), ("forward", micro, 0)),
      (("forward", micro, last), ("head", micro, -1)),
      (("head", micro, -1), ("backward", micro, last)),
      (("backward", micro, 0), ("embed_gradient", micro, -1)),
    ]
    for w in range(last):
      pairs += [
        (("forward", micro, w), ("arrive", micro, w)),
        (("arrive", micro, w), ("forward", micro, w + 1)),
        (("backward", micro, w + 1), ("return", micro, w + 1)),
        (("return", micro, w + 1), ("backward", micro, w)),
      ]
    for w in range(last + 1):
      pairs += [
        (("forward", micro, w), ("backward", micro, w)),
        (("begin", -1, -1), ("forward", micro, w)),
        (("backward", micro, w), ("end", -1, -1)),
      ]
  return pairs


def describe(graph: Graph, node: int) -> str:
  """Returns a node in words."""
  where = f"stage {graph.stage[node]} expert {graph.expert[node]} tensor {graph.tensor[node]}"
  if graph.settings.mesh.data > 1:
    where = f"copy {graph.data[node]} {where}"
  parts = [UNITS[graph.unit[node]], graph.steps[graph.step[node]].name]
  if graph.micro[node] >= 0:
    parts.append(f"micro-batch {graph.micro[node]}")
  if graph.layer[node] >= 0:
    parts.append(f"layer {graph.layer[node]}")
  return f"{', '.join(parts)} on {where}"
