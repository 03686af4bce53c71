"""Runs a forward-only schedule table as one SPMD program, with state that layers read and write.

Ticks, transfers, head and embedding are those of `pipeline.executor`; there are no backward units.
Two things are new. Each layer may read and write a part of a state, such as a key-value cache,
which goes through the loops in place. And a small carry, the same on every stage, goes from head to
embedding, so that a micro-batch may begin with what the head made of an earlier one: decoding runs
token after token through the pipeline without ever draining it.

Must not know the model: it is given `Functions`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.parallel import collectives
from moe_jax.parallel.axes import STAGE
from moe_jax.pipeline import buffers, columns
from moe_jax.pipeline.segments import segments
from moe_jax.pipeline.table import Table

Tree = Any


class Functions(NamedTuple):
  """The model, as per-device functions; leave what a function does not need untouched or empty.

  Attributes:
    embed: (shared, inputs, carry) -> x, the same on every stage.
    layer: (layers, index, shared, x, inputs, carry, state, runs) -> (y, state, report). `layers`
      are the parameters of all layers of the stage, of which `index` is to run: it reads from them
      what it needs, and no more. Where `runs` is False the cell is idle and nothing may be written
      to the state; `report` is then not counted. `carry` is as the micro-batch's embedding saw it.
    head: (shared, picked, inputs, carry) -> (carry, outputs); `picked` is the same on every stage,
      `outputs` a tree that is returned for every micro-batch.
    pick: (y, inputs) -> picked, what the head needs of the last layer's output; the default is all.
    last_layer: as `layer`, of the last layer of all, if it may leave out of y what `pick` does not
      pick; else None. It runs where one stage has all layers: where there are others, they are busy
      with a whole layer meanwhile.
  """

  embed: Callable[[Tree, Tree, Tree], Tree]
  layer: Callable[..., tuple[Tree, Tree, Tree]]
  head: Callable[[Tree, Tree, Tree, Tree], tuple[Tree, Tree]]
  pick: Callable[[Tree, Tree], Tree] = lambda y, inputs: y
  last_layer: Callable[..., tuple[Tree, Tree, Tree]] | None = None


class Result(NamedTuple):
  """What the forward passes leave on this device.

  Attributes:
    carry: after the last head.
    state: as given, written to.
    reports: the layers' reports, [layers of this stage, ...], summed over micro-batches; while
      ticks run `buffers.packed`.
    outputs: the head's outputs, [micro-batches, ...].
    ticks: how many ticks ran, int32.
  """

  carry: Tree
  state: Tree
  reports: Tree
  outputs: Tree
  ticks: jax.Array


class _Run(NamedTuple):
  """What a tick hands to the next."""

  sent: Tree  # output of this stage's last forward unit, not yet on its way
  inbox: Tree  # [inbox slots, ...]
  result: Result


def run(
  functions: Functions,
  table: Table,
  layers: Tree,
  shared: Tree,
  inputs: Tree,
  carry: Tree = (),
  state: Tree = (),
) -> Result:
  """Returns the result of all micro-batches, inside the manual region.

  Args:
    functions: the model.
    table: a forward-only schedule.
    layers: this stage's parameters, leaves [chunks * layers per chunk, ...], chunk major.
    shared: parameters outside the layers.
    inputs: leaves [micro-batches, ...].
    carry: what heads hand to later embeddings. A layer of a micro-batch runs after its embedding
      and before its head, so it sees the carry of both, but for what heads of other micro-batches
      changed: they must leave alone what it reads.
    state: what layers read and write.

  Raises:
    ValueError: the table has backward units.

  Communication: over `stage`, in each tick one collective-permute of an activation; per micro-batch
  an all-reduce of what the head picks. And what the functions do.
  """
  check(table)
  return _Forward(functions, table, layers, shared, inputs).run(carry, state)


def check(table: Table) -> None:
  """Refuses a table that is not forward-only.

  Raises:
    ValueError: names the schedule.
  """
  if not table.is_forward_only:
    raise ValueError(
      f"the schedule {table.name} has backward units; give pipeline.schedules.forward_only of it"
    )


class Units:
  """Embedding and head, the units that all stages take part in, for every form of a tick.

  Attributes:
    num_layers: of a chunk.
    x: shapes of what the embedding makes.
    report: shapes of what a layer reports.
    units: how often each kind of unit runs in the ticks at hand, as `Segment.presence` says.
  """

  def __init__(self, functions, table: Table, layers: Tree, shared: Tree, inputs: Tree):
    """Keeps what it is given; of `functions` it calls embed, pick and head."""
    self.functions, self.table = functions, table
    self.layers, self.shared, self.inputs = layers, shared, inputs
    self.num_layers = jax.tree.leaves(layers)[0].shape[0] // table.num_chunks
    self.stage = jax.lax.axis_index(STAGE)
    self.units: dict[str, str] = {}

  def ticks(self, tick: Callable, run: Tree) -> Tree:
    """Returns what `tick(run, row)` makes of `run` in all rows of the table."""
    rows = columns.rows(self.table, self.stage)
    for segment in segments(self.table):
      self.units = segment.presence()
      body = lambda run, row: (tick(run, row), None)
      run, _ = jax.lax.scan(body, run, jax.tree.map(lambda a: a[segment.ticks], rows))
    return run

  def start(self, carry: Tree, state: Tree, report_of: Callable[[Tree], Tree]) -> Result:
    """Returns the result before the first tick.

    Args:
      report_of: the report that a layer makes of x; only its shape counts.
    """
    inputs = buffers.at(self.inputs, 0)
    embed, pick, head = self.functions.embed, self.functions.pick, self.functions.head
    self.x = jax.eval_shape(lambda: collectives.varying(embed(self.shared, inputs, carry)))
    output = jax.eval_shape(lambda x: head(self.shared, pick(x, inputs), inputs, carry)[1], self.x)
    self.report = jax.eval_shape(report_of, self.x)
    packed = jax.eval_shape(buffers.packed, self.report)
    zeros = collectives.zeros_like
    return Result(
      carry=carry,
      state=state,
      reports=zeros(buffers.stacked(packed, self.table.num_chunks * self.num_layers)),
      outputs=zeros(buffers.stacked(output, self.table.num_micro_batches)),
      ticks=jnp.zeros((), jnp.int32),
    )

  def head(self, result: Result, row: columns.Row, y: Tree) -> Result:
    """Runs the head, in which every stage takes part, in the ticks that have one.

    Args:
      y: on its owner, the output of the last layer.
    """
    micro = row.head_micro
    owner = jnp.where(row.head_is_fresh > 0, self.table.num_stages - 1, 0)

    def head(carry, outputs):
      with jax.named_scope("head"):
        inputs = buffers.at(self.inputs, micro)
        picked = collectives.broadcast_from(self.functions.pick(y, inputs), STAGE, owner)
        carry, out = self.functions.head(self.shared, picked, inputs, carry)
        carry, out = collectives.varying((carry, out))
        return carry, jax.tree.map(lambda all, one: buffers.put(all, micro, one), outputs, out)

    given = (result.carry, result.outputs)
    carry, outputs = self._where("head", micro, head, lambda *given: given, given)
    return result._replace(carry=carry, outputs=outputs)

  def embed(self, row: columns.Row, carry: Tree, first: Tree) -> Tree:
    """Runs the embedding likewise, after `first`; zeros where there is none."""
    micro = collectives.after(first, row.embed_micro)

    def embed(carry):
      with jax.named_scope("embed"):
        inputs = buffers.at(self.inputs, micro)
        return collectives.varying(self.functions.embed(self.shared, inputs, carry))

    return self._where(
      "embed", micro, embed, lambda carry: collectives.zeros_like(self.x), (carry,)
    )

  def count(self, reports: list, index, report: Tree, runs) -> list:
    """Returns the reports with that of a layer of a cell that runs added."""
    or_nothing = lambda new: jnp.where(runs, new, jnp.zeros_like(new))
    return buffers.add_packed(reports, index, report, or_nothing)

  def told(self, result: Result) -> Result:
    """Returns the result of all ticks, of which all but the state waits for all of it."""
    reports = buffers.unpacked(result.reports, self.report)
    told = (result.carry, reports, result.outputs)
    carry, reports, outputs = collectives.after(told, told)
    return result._replace(carry=carry, reports=reports, outputs=outputs)

  def _where(self, kind: str, micro, unit: Callable, skip: Callable, given: tuple):
    """Runs a unit in the ticks that have it: a branch that is the same on every device."""
    if self.units[kind] == "always":
      return unit(*given)
    if self.units[kind] == "never":
      return skip(*given)
    return jax.lax.cond(micro >= 0, unit, skip, *given)


class _Forward(Units):
  """The pieces of a tick; holds what every tick shares."""

  def run(self, carry: Tree, state: Tree) -> Result:
    carry, state = collectives.varying((carry, state))
    inputs = buffers.at(self.inputs, 0)
    report_of = lambda x: self.functions.layer(
      self.layers, 0, self.shared, x, inputs, carry, state, self.stage >= 0
    )[2]
    result = self.start(carry, state, report_of)
    zeros = collectives.zeros_like
    inbox = zeros(buffers.stacked(self.x, self.table.num_inbox_slots))
    return self.told(self.ticks(self._tick, _Run(zeros(self.x), inbox, result)).result)

  def _tick(self, run: _Run, row: columns.Row) -> _Run:
    # Read before what has just been made is on its way, so that head and transfer do not wait for
    # each other.
    is_fresh = row.head_is_fresh > 0
    y = buffers.select(
      is_fresh, run.sent, buffers.at(run.inbox, jnp.maximum(row.head_inbox_slot, 0))
    )
    inbox = run.inbox
    if self.units["arrival"] != "never":
      arrived = collectives.shift(run.sent, STAGE, +1)
      inbox = buffers.write(inbox, row.arrival_slot, arrived)
      y = collectives.after(arrived, y)
    result = self.head(run.result, row, y)
    run = run._replace(inbox=inbox, result=result._replace(ticks=result.ticks + 1))
    return run if self.units["forward"] == "never" else self._forward(run, row)

  def _forward(self, run: _Run, row: columns.Row) -> _Run:
    """The forward unit of this stage: its chunk of layers."""
    result = run.result
    runs = row.forward_micro >= 0
    inputs = buffers.at(self.inputs, jnp.maximum(row.forward_micro, 0))
    from_inbox = buffers.at(run.inbox, jnp.maximum(row.forward_inbox_slot, 0))
    of_head = (result.outputs, result.carry)
    embedded = self.embed(row, result.carry, of_head)
    x = buffers.select(row.forward_inbox_slot >= 0, from_inbox, embedded)
    x = collectives.after(of_head, x)
    first = jnp.maximum(row.forward_chunk, 0) * self.num_layers

    def run_layer(layer, carry, l):
      x, state, reports = carry
      y, state, report = layer(
        self.layers, first + l, self.shared, x, inputs, result.carry, state, runs
      )
      return y, state, self.count(reports, first + l, report, runs)

    last = self.functions.last_layer if self.table.num_virtual_stages == 1 else None
    index = jnp.arange(self.num_layers - (last is not None), dtype=jnp.int32)
    body = lambda carry, l: (run_layer(self.functions.layer, carry, l), None)
    carry, _ = jax.lax.scan(body, (x, result.state, result.reports), index)
    y, state, reports = run_layer(last, carry, self.num_layers - 1) if last else carry
    return run._replace(sent=y, result=result._replace(state=state, reports=reports))
