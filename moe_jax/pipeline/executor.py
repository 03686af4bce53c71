"""Runs any legal schedule table as one SPMD program: loss, reports and gradients of a whole step.

A tick is one row of the table, the same program on every stage: head of a finished micro-batch,
embedding, a backward and a forward unit side by side, and what they made on its way. A stage whose
cell is idle computes what nobody reads; that costs nothing, for another stage works in that tick.
Ticks that have no forward, or no backward, unit on any stage form their own scan without that half;
head and embedding, which every stage takes part in, are skipped alike by every device.

The forward unit may write the slot of the stash that the backward unit beside it frees.

Must not know the model: it is given `functions.Functions`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.parallel import collectives
from moe_jax.parallel.axes import STAGE
from moe_jax.pipeline import buffers, columns, ends, paired
from moe_jax.pipeline.chunk import Chunk
from moe_jax.pipeline.columns import Row
from moe_jax.pipeline.evaluation import evaluate
from moe_jax.pipeline.functions import Functions, Result, example
from moe_jax.pipeline.reduction import Reduction
from moe_jax.pipeline.saving import SAVE
from moe_jax.pipeline.segments import segments
from moe_jax.pipeline.steps import cut
from moe_jax.pipeline.table import Table
from moe_jax.pipeline.together import Together
from moe_jax.pipeline.units import Backward, Forward, Layers, Totals
from moe_jax.pipeline.weights import Arriving, Coming, Outside, Streamed, Whole

Tree = Any

# Names the loop round a unit that some ticks have, whose turns, one or none, a compiled program's
# text cannot say.
SCOPE = "where_due"


class _Found(NamedTuple):
  """What heads add to; fields as of `Result`."""

  loss: jax.Array
  auxiliary_loss: jax.Array
  auxiliary: Tree
  outputs: Tree


class _State(NamedTuple):
  """What a tick hands to the next; buffers are indexed by slot."""

  made: Tree  # output of this stage's last forward unit
  arrived: Tree  # that of the stage before, where the head reads it
  inbox: Tree  # [inbox slots, ...] activations that wait for a forward unit or the head
  cotangent_inbox: Tree  # [cotangent slots, ...]
  found: _Found
  totals: Totals
  saved: Tree  # by the layer that the next backward unit begins with; () before there is one
  ticks: jax.Array


def run(
  functions: Functions,
  table: Table,
  layers: Tree | Streamed | Arriving,
  shared: Tree | Outside,
  inputs: Tree,
  *,
  save: str = "inputs",
  gradient_dtype: jnp.dtype = jnp.float32,
  summed: Together | None = None,
) -> Result:
  """Returns the result of a step, inside the manual region.

  Args:
    functions: the model.
    table: the schedule; with backward units gradients are returned, without them none.
    layers: this stage's parameters, leaves [chunks * layers per chunk, ...], chunk major; with
      backward units they may be `Streamed` or `Arriving`.
    shared: parameters outside the layers; with backward units they may be `Outside`.
    inputs: leaves [micro-batches, ...].
    save: what each layer keeps for its backward unit, a key of `saving.SAVE`.
    gradient_dtype: of the accumulated gradients.
    summed: what sums gradients of a layer, or of several stacked, over ranks. Those of chunks that
      are done are summed while the pipeline drains; others are this device's own.

  Communication: over `stage`, in each tick one collective-permute of an activation forwards and one
  of a cotangent backwards, of two stages both in one, and of halves one for each; per micro-batch
  an all-reduce of the head's cotangent, and one of an activation for the head where
  `Table.head_needs_broadcast`. And what the functions do; the gathers of streamed layers, of each
  layer of a forward or backward unit, and of the rings' once; those of layers that arrive, and what
  `summed` does, once of each layer; what late parameters send.
  """
  if table.is_forward_only:
    return evaluate(functions, table, layers, shared, inputs)
  weights = layers if isinstance(layers, Streamed | Arriving) else Whole(layers)
  given = (functions, table, weights, shared, inputs, save, gradient_dtype, summed)
  return _Executor(*given).run()


class _Executor:
  """The pieces of a tick; holds what every tick shares."""

  def __init__(self, functions, table, weights, shared, inputs, save, gradient_dtype, summed=None):
    if not isinstance(weights, Whole):
      functions = functions._replace(with_stack=None)  # there is none, or not yet
    given, self.table = functions, table
    self.functions = functions = paired.of_pairs(given) if given.halves else given
    self.outside = shared if isinstance(shared, Outside) else None
    self.inputs = inputs
    self.gradient_dtype = gradient_dtype
    self.stage = jax.lax.axis_index(STAGE)
    self.head_reads_arrived = table.num_stages > 1 and not table.head_needs_broadcast
    before = self.outside.before if self.outside else lambda: shared
    of_layer = example(functions, weights, before, inputs)
    _, statistics, self.report = jax.eval_shape(functions.layer, *of_layer)
    if given.halves:
      steps = paired.steps(given, of_layer)
    else:
      steps = cut(functions.layer, of_layer, inside=functions.inside)
    layers_per_chunk = jax.tree.leaves(weights.layers)[0].shape[0] // table.num_chunks
    self.layers = Layers(
      functions,
      SAVE[save](steps, of_layer),
      weights,
      (),  # known when it is known what its messages bring besides
      statistics,
      num_layers=layers_per_chunk,
      # With one micro-batch and one stage there is nothing to add to, and no idle cell.
      adds=not table.num_micro_batches == table.num_stages == 1,
      reduction=Reduction.of(summed or Together.none(weights.layers), table, layers_per_chunk),
    )
    self.chunk = Chunk.of(self.layers, steps)
    reduction = self.layers.reduction
    leaves = reduction.num_left is not None and ends.last(table).any()
    if leaves and self.chunk.sends_nothing(is_backward=True):
      self._have(reduction=reduction._replace(num_left=1))
    self.shared, self.landed = self._before_ticks(shared)
    self.layer, _, self.x, _ = of_layer
    self.num_layers = table.num_chunks * self.layers.num_layers
    self.output = jax.eval_shape(functions.head, self.shared, self.x, buffers.at(inputs, 0))[1]

  def run(self) -> Result:
    state = self._start()
    rows = columns.rows(self.table, self.stage)
    found = list(segments(self.table))
    heads = [number for number, each in enumerate(found) if each.at["head"].any()]
    late = self.outside is not None and self.outside.late.are_any
    for number, segment in enumerate(found):
      self.units = segment.presence()
      if late and number == heads[0] - 1:
        self.shared, inbox = self.outside.come(self.shared, state.inbox)
        state = state._replace(inbox=inbox)
      state = self._have_arrived(state)
      coming = self.layers.weights.coming(self.table, self.stage)
      body = lambda state, given: (self._tick(state, *given), None)
      piece = jax.tree.map(lambda a: a[segment.ticks], (rows, coming))
      if self.units["backward"] != "never" and state.saved == ():
        first = buffers.at(piece[0], 0)
        state = self._read(first.backward_slot, first.backward_is_reversed, state)
      state, _ = jax.lax.scan(body, state, piece)
      if late and number == heads[-1]:
        g_shared, inbox = self.outside.leave(state.totals.g_shared, state.cotangent_inbox)
        totals = state.totals._replace(g_shared=g_shared)
        state = state._replace(cotangent_inbox=inbox, totals=totals)
    totals = state.totals
    g_layers, left = self.layers.reduction.finish(totals.g_layers, totals.sums)
    gradients = (g_layers, totals.g_shared)
    reports = buffers.unpacked(totals.reports, self.report)
    loss, auxiliary_loss, auxiliary, outputs = state.found
    found = (loss, auxiliary_loss, auxiliary, reports, outputs, gradients, left)
    return Result(*collectives.after(found, found), state.ticks)

  def _have_arrived(self, state: _State) -> _State:
    """Takes weights for whole when none of them is still to come."""
    weights = self.layers.weights
    if isinstance(weights, Arriving) and self.units["comes"] == "never":
      totals, (ring, _) = state.totals, state.totals.rings
      ring = weights.put_landed(totals.landed, ring) if totals.landed else ring
      self._have(weights=weights.arrived(ring))
      state = state._replace(totals=totals._replace(rings=((), ()), landed=()))
    return state

  def _have(self, **new) -> None:
    """Goes on with these fields of the layers."""
    self.layers = self.layers._replace(**new)
    self.chunk = self.chunk._replace(layers=self.layers)

  def _before_ticks(self, shared: Tree | Outside) -> tuple[Tree, Tree]:
    """Returns what there is outside the layers before the first tick, which layers may read from
    now on, and as `Totals.landed` what has come of the layers.

    Communication: that of parameters outside the layers which are needed at once; with the first
    chunk's weights, where they come in a message.
    """
    weights, landed = self.layers.weights, ()
    if isinstance(weights, Arriving) and self.chunk.sends_nothing(is_backward=False):
      weights = dataclasses.replace(weights, in_messages=True)
      numbers = weights.first(self.table)
      if self.outside:
        shared, arrived = self.outside.before_beside(weights.several(numbers))
        landed = (arrived, numbers)
      else:
        landed = weights.send(numbers)
    elif self.outside:
      shared = self.outside.before()
    self._have(weights=weights, shared=shared)
    return shared, landed

  def _start(self) -> _State:
    table, layers, zeros = self.table, self.layers, collectives.zeros_like
    stacked = buffers.stacked
    gradient = lambda tree: jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, self.gradient_dtype), tree
    )
    scalar = lambda: zeros(jax.ShapeDtypeStruct((), jnp.float32))
    packed = lambda tree, *sizes: zeros(stacked(jax.eval_shape(buffers.packed, tree), *sizes))
    of_layers = stacked(layers.statistics, self.num_layers)
    g_layers = gradient(stacked(self.layer, self.num_layers))
    auxiliary = jax.eval_shape(lambda given: self.functions.auxiliary(given)[1], of_layers)
    return _State(
      made=collectives.after((layers.weights.layers, self.shared, self.inputs), zeros(self.x)),
      arrived=zeros(self.x) if self.head_reads_arrived else (),
      inbox=zeros(stacked(self.x, table.num_inbox_slots)),
      cotangent_inbox=zeros(stacked(self.x, table.num_cotangent_slots)),
      found=_Found(
        loss=scalar(),
        auxiliary_loss=scalar(),
        auxiliary=zeros(auxiliary),
        outputs=zeros(stacked(self.output, table.num_micro_batches)),
      ),
      totals=Totals(
        stash=zeros(stacked(layers.steps.saved, table.peak_in_flight, layers.num_layers)),
        statistics=packed(layers.statistics, table.num_micro_batches, self.num_layers),
        reports=packed(self.report, self.num_layers),
        g_layers=zeros(g_layers),
        g_shared=zeros(gradient(self.shared)),
        rings=layers.weights.start(table, self.stage),
        landed=self.landed,
        sums=layers.reduction.start(g_layers),
      ),
      saved=(),
      ticks=jnp.zeros((), jnp.int32),
    )

  def _tick(self, state: _State, row: Row, coming: tuple[Coming | None, Coming | None]) -> _State:
    has_forward, has_backward = (self.units[kind] != "never" for kind in ("forward", "backward"))
    # An output that has just been made is read where it was made.
    y = buffers.select(
      row.head_is_fresh > 0,
      state.made,
      buffers.at(state.inbox, jnp.maximum(row.head_inbox_slot, 0)),
    )
    if self.head_reads_arrived:
      y = buffers.select(self.stage == 1, y, state.arrived)
    x = None
    if has_forward:
      _, x = self._where_due("embed", self._embed, row.embed_micro, None, None)
      # A first tick may reach its layers before what only later ones need is gathered.
      x = collectives.after((self.layers.weights.layers, self.shared), x)
      y = collectives.after(x, y)
    owner = jnp.where(row.head_is_fresh > 0, self.table.num_stages - 1, 0)
    head = functools.partial(self._head, owner)
    state, gy = self._where_due("head", head, row.head_micro, state, y)
    of_units, coming, saved = collectives.after(gy, (row, coming, state.saved))
    ahead = self._forward(state, of_units, x, coming[0]) if has_forward else None
    back = None
    if has_backward:
      back, state = self._backward(state, of_units, gy, coming[1])
    totals, made, gx = self.chunk.run(state.totals, ahead, back, saved if back else None)
    state = state._replace(totals=totals)
    if has_backward:
      state = self._read(row.next_backward_slot, row.next_backward_is_reversed, state)
    if has_forward:
      state = state._replace(made=made)
    departs = self.units["departure"] != "never"
    arrived, returned = collectives.shift_both(made if departs else None, gx, STAGE)
    if departs:
      inbox = buffers.write(state.inbox, row.next_arrival_slot, arrived)
      state = state._replace(inbox=inbox, arrived=arrived if self.head_reads_arrived else ())
    if has_backward:
      inbox = buffers.write(state.cotangent_inbox, row.next_cotangent_slot, returned)
      state = state._replace(cotangent_inbox=inbox)
      gx = collectives.after((arrived, returned, made, totals.statistics, totals.reports), gx)
      unit = self._embed_gradient
      state, _ = self._where_due("embed_gradient", unit, row.embed_gradient_micro, state, gx)
    return state._replace(ticks=state.ticks + 1)

  def _where_due(self, kind: str, unit: Callable, micro, state: _State | None, x):
    """Runs a unit that every stage takes part in, in the ticks that have it; else it makes
    zeros.
    """
    if self.units[kind] == "always":
      return unit(micro, state, x)
    if self.units[kind] == "never":
      return state, collectives.zeros_like(self.x)
    # Only what such units add to goes through the loop.
    parts = lambda state: (
      () if state is None else (state.found, state.totals.g_shared, state.totals.statistics)
    )

    def run(turn, carry):
      # XLA moves what no turn changes out of a loop, where every tick would pay for it. A barrier
      # each: one for both would type the micro-batch's number as different on all devices.
      here, given = (jax.lax.optimization_barrier((each, turn))[0] for each in (micro, x))
      into, result = unit(here, state and _with(state, carry[0]), given)
      return parts(into), result

    # A loop of one turn or none: XLA adds in place in it, and copies what goes through a branch.
    with jax.named_scope(SCOPE):
      start = (parts(state), collectives.zeros_like(self.x))
      sums, result = jax.lax.fori_loop(0, (micro >= 0).astype(jnp.int32), run, start)
    return state and _with(state, sums), result

  def _head(self, owner, micro, state: _State, y):
    """Losses of the micro-batch whose `y` every stage holds, or, with a broadcast, stage `owner`;
    and its cotangent.
    """
    inputs = buffers.at(self.inputs, micro)
    found, g_shared, statistics = state.found, state.totals.g_shared, state.totals.statistics
    with jax.named_scope("head"):
      if self.table.head_needs_broadcast:
        y = collectives.varying(collectives.broadcast_from(y, STAGE, owner))
      head = lambda shared, y: self.functions.head(shared, y, inputs)
      loss, vjp, outputs = jax.vjp(head, self.shared, y, has_aux=True)
      one = collectives.varying(jnp.ones((), loss.dtype))
      g_here, gy = vjp(collectives.after(y, one))
      gy = jax.tree.map(lambda leaf: jax.lax.psum(leaf, STAGE), gy)
      g_shared = _add(g_shared, g_here)
      auxiliary_loss, auxiliary, statistics = self._auxiliary(statistics, micro, gy)
    found = _Found(
      found.loss + loss,
      found.auxiliary_loss + auxiliary_loss,
      _add(found.auxiliary, auxiliary),
      buffers.write(found.outputs, micro, collectives.varying(outputs)),
    )
    return _with(state, (found, g_shared, statistics)), collectives.varying(gy)

  def _auxiliary(self, statistics: list[jax.Array], micro, gy):
    """Returns the loss that the layers of this stage add, what it reports of them, and `statistics`
    with its cotangents in place of the micro-batch's.
    """
    here = buffers.unpacked(buffers.at(statistics, micro), self.layers.statistics)
    here = collectives.after(gy, here)
    loss, vjp, auxiliary = jax.vjp(self.functions.auxiliary, here, has_aux=True)
    (cotangents,) = vjp(collectives.varying(jnp.ones((), loss.dtype)))
    put = lambda array, new: buffers.put(array, micro, new)
    return loss, auxiliary, [*map(put, statistics, jax.vmap(buffers.packed)(cotangents))]

  def _embed_gradient(self, micro, state: _State, gx):
    """The embedding's gradient, from what the backward of the first layer left on stage 0."""
    with jax.named_scope("transpose(embed)"):  # as differentiation would name it
      g_shared = self.functions.add_embed_gradient(
        state.totals.g_shared, self.shared, buffers.at(self.inputs, micro), gx
      )
    sums = (state.found, g_shared, state.totals.statistics)
    return _with(state, sums), collectives.zeros_like(self.x)

  def _embed(self, micro, state: None, x: None):
    with jax.named_scope("embed"):
      x = self.functions.embed(self.shared, buffers.at(self.inputs, micro))
    return state, collectives.varying(x)

  def _backward(
    self, state: _State, row: Row, gy_head, coming: Coming | None
  ) -> tuple[Backward, _State]:
    """The backward unit of this stage: its layers in reverse, from what they saved; and the state,
    whose statistics are to be written only now.
    """
    runs, leaves = row.backward_micro >= 0, self.units["leaves"] != "never"
    last = (self.stage == self.table.num_stages - 1) & (
      row.backward_chunk == self.table.num_chunks - 1
    )
    gy = buffers.select(
      last, gy_head, buffers.at(state.cotangent_inbox, jnp.maximum(row.backward_inbox_slot, 0))
    )
    first = jnp.maximum(row.backward_chunk, 0) * self.layers.num_layers
    of_chunk = lambda array: jax.lax.dynamic_slice_in_dim(
      array[jnp.maximum(row.backward_micro, 0)], first, self.layers.num_layers
    )
    statistics = state.totals.statistics
    g_statistics, statistics = jax.lax.optimization_barrier(
      ([*map(of_chunk, statistics)], statistics)
    )
    state = state._replace(totals=state.totals._replace(statistics=statistics))
    # A zero cotangent gives zero gradients, so an idle cell adds nothing and needs no further mask.
    or_zero = lambda leaf: jnp.where(runs, leaf, jnp.zeros((), leaf.dtype))
    backward = Backward(
      gy=jax.tree.map(or_zero, gy),
      g_statistics=[*map(or_zero, g_statistics)],
      inputs=self._inputs_of(row.backward_micro),
      first=first,
      coming=coming,
      slot=jnp.maximum(row.backward_slot, 0),
      is_reversed=row.backward_is_reversed > 0,
      leaving=row.leaving_chunk * self.layers.num_layers if leaves else None,
      is_last=self.units["last"] != "never",
    )
    return backward, state

  def _read(self, slot: jax.Array, is_reversed: jax.Array, state: _State) -> _State:
    """Reads what the layer saved that a backward unit begins with."""
    last = self.layers.num_layers - 1
    saved, totals = self.chunk.read(jnp.maximum(slot, 0), is_reversed > 0, last, state.totals)
    return state._replace(saved=saved, totals=totals)

  def _forward(self, state: _State, row: Row, x_embedded, coming: Coming | None) -> Forward:
    """The forward unit of this stage: its chunk of layers, saving what the backward unit needs."""
    from_inbox = buffers.at(state.inbox, jnp.maximum(row.forward_inbox_slot, 0))
    all_run, all_free = (self.units[kind] == "always" for kind in ("full", "free"))
    return Forward(
      x=buffers.select(row.forward_inbox_slot >= 0, from_inbox, x_embedded),
      inputs=self._inputs_of(row.forward_micro),
      micro=jnp.maximum(row.forward_micro, 0),
      first=jnp.maximum(row.forward_chunk, 0) * self.layers.num_layers,
      coming=coming,
      slot=jnp.maximum(row.forward_slot, 0),
      is_reversed=row.forward_is_reversed > 0,
      runs=None if all_run else row.forward_micro >= 0,
      is_masked=not all_free,
    )

  def _inputs_of(self, micro: jax.Array) -> Tree:
    """Returns what the layers of a micro-batch take, which differs from stage to stage."""
    return collectives.varying(buffers.at(self.inputs, jnp.maximum(micro, 0)))


def _with(state: _State, sums: tuple) -> _State:
  """Returns `state` with (found, g_shared, statistics)."""
  found, g_shared, statistics = sums
  totals = state.totals._replace(g_shared=g_shared, statistics=statistics)
  return state._replace(found=found, totals=totals)


def _add(total, more):
  return jax.tree.map(lambda t, m: t + m.astype(t.dtype), total, more)
