"""Runs a forward-only schedule with each forward unit worked as two halves, one behind the other.

While one half exchanges tokens the other multiplies matrices: both are cut into steps, and their
steps are tied slot by slot, as `pipeline.chunk` ties a forward and a backward unit. The second half
trails by about half a layer, over the borders of layers and of ticks alike: a tick begins with the
first half's next unit beside the second half's last, and hands on to the next tick a second half
that has begun its last layer. So neither is ever alone, and the second half may use what the first
has made of the same layer, such as keys and values.

Ticks, transfers, head and embedding are those of `pipeline.forward`. Must not know the model: it is
given `Functions`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.parallel import collectives
from moe_jax.parallel.axes import EXPERT, STAGE, TENSOR
from moe_jax.pipeline import buffers, columns, tie
from moe_jax.pipeline.forward import Result, Units, check
from moe_jax.pipeline.steps import Step, cut
from moe_jax.pipeline.table import Table

Tree = Any


class Functions(NamedTuple):
  """The model, as per-device functions; x and y are pairs, of the first half and of the second.

  Attributes:
    embed: (shared, inputs, ()) -> x, the same on every stage.
    begin: (half, layers, index, x, inputs, handed, state, runs) -> (x, state, handed), what comes
      first in layer `index` of the stage's, for one half, 0 or 1. It alone sees the state. `handed`
      is, for the second half, what the first returned; else (). Where `runs` is False the cell is
      idle and nothing may be written to the state.
    end: (half, layers, index, x, inputs, runs) -> (y, report), the rest of the layer; the report is
      not counted where `runs` is False.
    pick: (y, inputs) -> picked, what the head needs of the last layer's output.
    head: (shared, picked, inputs, ()) -> ((), outputs); `picked` is the same on every stage.
    inside: mesh axes along which all devices share a host.
  """

  embed: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
  begin: Callable[..., tuple[Tree, Tree, Tree]]
  end: Callable[..., tuple[Tree, Tree]]
  pick: Callable[[tuple[Tree, Tree], Tree], Tree]
  head: Callable[[Tree, Tree, Tree, Tree], tuple[Tree, Tree]]
  inside: tuple[str, ...] = (TENSOR,)


class _Cell(NamedTuple):
  """A layer of a unit."""

  micro: jax.Array
  index: jax.Array
  runs: jax.Array


class _Run(NamedTuple):
  """What a tick hands to the next."""

  first: Tree  # output of this stage's last forward unit
  arrived: Tree  # that of the stage before
  second: Tree  # what `begin` made in the last layer of that unit
  last: _Cell  # that layer
  inbox: tuple[Tree, Tree]  # [inbox slots, ...]
  result: Result


class _Part(NamedTuple):
  """Steps that belong together.

  Attributes:
    steps: of which there is one at least.
    enter: makes, of what the part before left, (weights, inputs, carry) of the first step.
    leave: makes, of what the last step returns, what the next part enters with.
  """

  steps: Sequence[Step]
  enter: Callable[[Tree], tuple[Tree, Tree, Tree]]
  leave: Callable[[Tree], Tree]


def run(
  functions: Functions, table: Table, layers: Tree, shared: Tree, inputs: Tree, state: Tree
) -> Result:
  """Returns the result of all micro-batches, inside the manual region; takes what `forward.run`
  does, but no carry.

  Raises:
    ValueError: the table has backward units.

  Communication: over `stage`, in each tick two collective-permutes of half an activation; per
  micro-batch an all-reduce of what the head picks. And what the functions do.
  """
  check(table)
  return _Halves(functions, table, layers, shared, inputs).run(state)


class _Halves(Units):
  """The pieces of a tick; holds what every tick shares."""

  def run(self, state: Tree) -> Result:
    state = collectives.varying(state)
    inputs = buffers.at(self.inputs, 0)
    end = self.functions.end
    report_of = lambda x: end(0, self.layers, jnp.int32(0), x[0], inputs, self.stage >= 0)[1]
    result = self.start((), state, report_of)
    self._cut(inputs, state)
    zeros = collectives.zeros_like
    nowhere = _Cell(*collectives.varying((jnp.int32(0), jnp.int32(0), jnp.zeros((), bool))))
    inbox = zeros(buffers.stacked(self.x, self.table.num_inbox_slots))
    first, second = zeros(self.x)
    run = self.ticks(self._tick, _Run(first, first, second, nowhere, inbox, result))
    return self.told(run.result)

  def _cut(self, inputs, state) -> None:
    """Cuts both halves of a layer into steps, and lays those of a tick's layers side by side."""
    cell = (jnp.int32(0), self.stage >= 0)
    of_layer = lambda: collectives.varying((self.layers, inputs, state, *cell))
    layers, inputs, state, index, runs = jax.eval_shape(of_layer)
    self.begin, self.end, handed, inside = [], [], (), self.functions.inside
    for half, x in enumerate(self.x):
      begin, end = self._begin(half), self._end(half)
      given = (index, inputs, handed, runs)
      self.begin.append(cut(begin, (layers, (), (x, state), given), inside=inside))
      handed = jax.eval_shape(begin, layers, (), (x, state), given)[2]
      example = (layers, (), x, (index, inputs, runs))
      self.end.append([*cut(end, example, head_apart=True, inside=inside)])
    # What comes before an exchange of tokens exchanges how many there are.
    link = "inside_bytes" if EXPERT in inside else "between_bytes"
    for steps in self.end:
      steps[0] = steps[0]._replace(**{link: max(getattr(steps[0], link), 1.0)})
    self.slots = {
      (is_first, is_last): self._slots(is_first, is_last)
      for is_first in (False, True)
      for is_last in (False, True)
    }

  def _slots(self, is_first: bool, is_last: bool) -> tuple[tuple[int, int], ...]:
    """Returns which steps of the two halves share a slot, in a layer that may be a chunk's first
    or last.
    """
    begin, end = self.begin, self.end
    transfers = [[self._transfer_step(x, None)] for x in self.x]
    ahead = [*begin[0], *end[0], *transfers[0][: int(is_last)]]
    behind = [*end[1], *transfers[1][: int(is_first)], *begin[1]]
    costs = [[tie.cost(step, False) for step in steps] for steps in (ahead, behind)]
    after = len(begin[0]), len(behind) - len(begin[1])
    return tie.side_by_side(*costs, after, exchange_first=True)

  def _begin(self, half: int) -> Callable:
    def begin(layers, _, carry, given):
      (x, state), (index, inputs, handed, runs) = carry, given
      return self.functions.begin(half, layers, index, x, inputs, handed, state, runs)

    return begin

  def _end(self, half: int) -> Callable:
    def end(layers, _, x, given):
      index, inputs, runs = given
      return self.functions.end(half, layers, index, x, inputs, runs)

    return end

  def _transfer_step(self, x: Tree, run: Callable) -> Step:
    """Returns the step that sends what one layer made to the next stage."""
    num_bytes = float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(x)))
    sent_bytes = num_bytes if self.table.num_stages > 1 else 0.0
    return Step(run, (), 0.0, 2 * num_bytes, 1, 0.0, sent_bytes)

  def _tick(self, run: _Run, row: columns.Row) -> _Run:
    return _Tick(self, run, row).run()


class _Tick:
  """One tick on its way."""

  def __init__(self, halves: _Halves, run: _Run, row: columns.Row):
    self.halves, self.before, self.row = halves, run, row
    self.inbox, self.result = list(run.inbox), run.result
    self.handed: Tree = ()
    # Read before what arrives is written over it.
    self.to_head = buffers.at(run.inbox, jnp.maximum(row.head_inbox_slot, 0))
    runs = row.forward_micro >= 0
    first = jnp.maximum(row.forward_chunk, 0) * halves.num_layers
    micro = jnp.maximum(row.forward_micro, 0)
    self.cell = _Cell(*collectives.varying((micro, first, runs)))

  def run(self) -> _Run:
    halves, run, last = self.halves, self.before, self.before.last
    if halves.units["forward"] == "never":
      return self._drain()
    self.embedded = halves.embed(self.row, (), ())
    x = (self._unit_of(0, run.arrived), collectives.after(self.embedded, run.second))
    x, y_second = self._layer(0, last, x)
    if halves.num_layers > 2:
      x = self._layers_between(x)
    at = self._at(halves.num_layers - 1)
    if halves.num_layers > 1:
      x, _ = self._layer(halves.num_layers - 1, self._at(halves.num_layers - 2), x)
    run = self._finish(y_second)
    return run._replace(first=self.sent, arrived=x[0], second=x[1], last=at)

  def _layer(self, l, before: _Cell, x):
    """Returns both halves after a layer of the unit, and what the second made of the one before.

    Args:
      l: number of the layer within the chunk; if it is traced, neither the first nor the last.
      before: the layer that the second half ends.
    """
    halves, here, made = self.halves, self._at(l), []
    is_first, is_last = (isinstance(l, int) and l == n for n in (0, halves.num_layers - 1))
    ahead = [self._begin(0, here), self._end(0, here), *[self._send()] * is_last]
    behind = [self._end(1, before, made), *[self._receive()] * is_first, self._begin(1, here)]
    return _together(halves.slots[is_first, is_last], ahead, behind, x), made[0]

  def _layers_between(self, x):
    """Returns both halves after all layers of the chunk but the first and the last."""

    def layer(carry, l):
      x, state, reports = carry
      self.result = self.result._replace(state=state, reports=reports)
      x, _ = self._layer(l, self._at(l - 1), x)
      return (x, self.result.state, self.result.reports), None

    carry = (x, self.result.state, self.result.reports)
    index = jnp.arange(1, self.halves.num_layers - 1, dtype=jnp.int32)
    (x, state, reports), _ = jax.lax.scan(layer, carry, index)
    self.result = self.result._replace(state=state, reports=reports)
    return x

  def _at(self, l) -> _Cell:
    return self.cell._replace(index=self.cell.index + collectives.varying(jnp.int32(l)))

  def _drain(self) -> _Run:
    """A tick without forward units: the second half ends its layer by itself."""
    run = self.before
    stream = _Stream([self._end(1, run.last)], run.second)
    stream.run(len(self.halves.end[1]))
    self._store(0, run.arrived)
    self._store(1, collectives.shift(stream.carry, STAGE, +1))
    nothing = run.last._replace(runs=jnp.zeros_like(run.last.runs))
    return self._finish(stream.carry)._replace(last=nothing)

  def _finish(self, y_second) -> _Run:
    """Returns what the tick hands on, after the head of a finished micro-batch."""
    y = buffers.select(
      self.row.head_is_fresh > 0, (self.before.first, y_second), tuple(self.to_head)
    )
    y = collectives.after((self.inbox, self.result.reports), y)
    result = self.halves.head(self.result, self.row, y)
    result = result._replace(ticks=result.ticks + 1)
    return self.before._replace(inbox=tuple(self.inbox), result=result)

  def _begin(self, half: int, cell: _Cell) -> _Part:
    inputs = self._inputs(cell)

    def enter(x):
      handed = self.handed if half else ()
      return self.halves.layers, (cell.index, inputs, handed, cell.runs), (x, self.result.state)

    def leave(made):
      x, state, self.handed = made
      self.result = self.result._replace(state=state)
      return x

    return _Part(self.halves.begin[half], enter, leave)

  def _end(self, half: int, cell: _Cell, made: list | None = None) -> _Part:
    given = cell.index, self._inputs(cell), cell.runs

    def leave(returned):
      y, report = returned
      reports = self.halves.count(self.result.reports, cell.index, report, cell.runs)
      self.result = self.result._replace(reports=reports)
      if made is not None:
        made.append(y)
      return y

    return _Part(self.halves.end[half], lambda x: (self.halves.layers, given, x), leave)

  def _send(self) -> _Part:
    """The first half's way to the next stage, at the end of the tick."""

    def enter(y):
      self.sent = y
      return (), (), y

    run = lambda weights, shared, y, inputs: collectives.shift(y, STAGE, +1)
    return _Part(
      [self.halves._transfer_step(self.halves.x[0], run)], enter, lambda arrived: arrived
    )

  def _receive(self) -> _Part:
    """The second half's, within the next tick, and what it goes on with."""
    run = lambda weights, shared, y, inputs: collectives.shift(y, STAGE, +1)
    step = self.halves._transfer_step(self.halves.x[1], run)
    return _Part([step], lambda y: ((), (), y), lambda arrived: self._unit_of(1, arrived))

  def _store(self, half: int, arrived) -> None:
    if self.halves.units["arrival"] != "never":
      self.inbox[half] = buffers.write(self.inbox[half], self.row.arrival_slot, arrived)

  def _unit_of(self, half: int, arrived):
    """Returns x of this tick's unit, when what the stage before made has come."""
    self._store(half, arrived)
    slot = self.row.forward_inbox_slot
    waiting = buffers.at(self.inbox[half], jnp.maximum(slot, 0))
    return buffers.select(slot >= 0, waiting, self.embedded[half])

  def _inputs(self, cell: _Cell) -> Tree:
    return collectives.varying(buffers.at(self.halves.inputs, cell.micro))


class _Stream:
  """One half on its way through parts of layers.

  Attributes:
    carry: what the next step takes.
  """

  def __init__(self, parts: list[_Part], x: Tree):
    self.parts, self.carry, self.num_done = list(parts), x, 0

  def run(self, num_steps: int) -> None:
    for _ in range(num_steps):
      part = self.parts[0]
      if self.num_done == 0:
        self.weights, self.inputs, self.carry = part.enter(self.carry)
      step = part.steps[self.num_done]
      self.carry = step.run(self.weights, (), self.carry, self.inputs)
      self.num_done += 1
      if self.num_done == len(part.steps):
        self.carry, self.num_done = part.leave(self.carry), 0
        self.parts.pop(0)


def _together(slots, first: list[_Part], second: list[_Part], x: tuple[Tree, Tree]):
  """Returns both halves after their parts, worked side by side."""
  ahead, behind = _Stream(first, x[0]), _Stream(second, x[1])
  for num_ahead, num_behind in slots:
    ahead.run(num_ahead)
    behind.run(num_behind)
    ahead.carry, behind.carry = jax.lax.optimization_barrier((ahead.carry, behind.carry))
  return ahead.carry, behind.carry
