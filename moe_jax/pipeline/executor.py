"""Runs any legal schedule table as one SPMD program: loss, reports and gradients of a whole step.

A tick is one row of the table, the same program on every stage: head of a finished micro-batch,
backward unit, embedding, forward unit. A stage whose cell is idle computes masked values, which
costs nothing because another stage works in that tick. Ticks that have no forward, or no backward,
unit on any stage form their own scan without that half; head and embedding, which every stage
takes part in, are branches that are the same on every device.

Transfers may hide behind computation without a tick of latency: what the forward unit made may
travel while the next tick's head and backward run, what the backward unit made while this tick's
forward runs. Because the backward comes first, the forward unit may write the stash slot that it
frees.

Must not know the model: it is given `Functions`.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.parallel import collectives
from moe_jax.parallel.axes import STAGE
from moe_jax.pipeline.saving import SAVE
from moe_jax.pipeline.table import Table

Tree = Any


class Functions(NamedTuple):
  """The model, as per-device functions; a loss is this device's share, to be summed over devices.

  Attributes:
    embed: (shared, inputs) -> x, the same on every stage.
    layer: (weights of one layer, shared, x, inputs) -> (y, auxiliary_loss, report); `report` is a
      tree of numbers, summed over micro-batches and not differentiated.
    head: (shared, y, inputs) -> (loss, outputs); `y` is the same on every stage, and `outputs` a
      tree that is returned for every micro-batch.
  """

  embed: Callable[[Tree, Tree], Tree]
  layer: Callable[[Tree, Tree, Tree, Tree], tuple[Tree, jax.Array, Tree]]
  head: Callable[[Tree, Tree, Tree], tuple[jax.Array, Tree]]


class Result(NamedTuple):
  """What a step leaves on this device.

  Attributes:
    loss: this device's share of the loss without auxiliary losses, float32.
    auxiliary_loss: this device's share of the weighted auxiliary losses, float32.
    reports: the layers' reports, [layers of this stage, ...], summed over micro-batches.
    outputs: the head's outputs, [micro-batches, ...].
    gradients: (layers, shared) as the parameters, float32, this device's share; None if
    forward-only.
    ticks: how many ticks ran, int32.
  """

  loss: jax.Array
  auxiliary_loss: jax.Array
  reports: Tree
  outputs: Tree
  gradients: tuple[Tree, Tree] | None
  ticks: jax.Array


class _Row(NamedTuple):
  """One tick of the table as this stage sees it; -1 is idle. Slots index the buffers of
  `_State`.
  """

  head_micro: jax.Array
  head_inbox_slot: jax.Array
  head_is_fresh: jax.Array  # 1 where the micro-batch finished in the tick before
  embed_micro: jax.Array
  embed_gradient_micro: jax.Array
  arrival_slot: jax.Array
  forward_micro: jax.Array
  forward_chunk: jax.Array
  forward_slot: jax.Array
  forward_inbox_slot: jax.Array
  cotangent_arrival_slot: jax.Array
  backward_micro: jax.Array
  backward_chunk: jax.Array
  next_backward_slot: jax.Array
  backward_inbox_slot: jax.Array


class _Sums(NamedTuple):
  """What the units add to that every stage takes part in."""

  loss: jax.Array
  outputs: Tree
  g_shared: Tree


class _State(NamedTuple):
  """What a tick hands to the next; buffers are indexed by slot."""

  sent: Tree  # output of this stage's last forward unit, not yet on its way
  inbox: Tree  # [inbox slots, ...] activations that wait for a forward unit or the head
  cotangent_inbox: Tree  # [cotangent slots, ...]
  stash: Tree  # [stash slots, layers per chunk, ...] what the layers saved
  saved: Tree  # [layers per chunk, ...] what the next backward unit reads, taken from the stash
  sums: _Sums
  auxiliary_loss: jax.Array
  reports: Tree
  g_layers: Tree
  ticks: jax.Array


def run(
  functions: Functions,
  table: Table,
  layers: Tree,
  shared: Tree,
  inputs: Tree,
  *,
  save: str = "inputs",
  gradient_dtype: jnp.dtype = jnp.float32,
) -> Result:
  """Returns the result of a step, inside the manual region.

  Args:
    functions: the model.
    table: the schedule; with backward units gradients are returned, without them none.
    layers: this stage's parameters, leaves [chunks * layers per chunk, ...], chunk major.
    shared: parameters outside the layers.
    inputs: leaves [micro-batches, ...].
    save: what each layer keeps for its backward unit, a key of `saving.SAVE`.
    gradient_dtype: of the accumulated gradients.

  Communication: over `stage`, in each tick one collective-permute of an activation forwards and one
  of a cotangent backwards; per micro-batch an all-reduce of an activation for the head and one of a
  cotangent for each of head and embedding gradient. And what the functions do.
  """
  return _Executor(functions, table, layers, shared, inputs, save, gradient_dtype).run()


class _Executor:
  """The pieces of a tick; holds what every tick shares."""

  def __init__(self, functions, table, layers, shared, inputs, save, gradient_dtype):
    self.functions, self.table = functions, table
    self.layers, self.shared, self.inputs = layers, shared, inputs
    self.gradient_dtype = gradient_dtype
    self.has_backward = not table.is_forward_only
    self.num_layers = jax.tree.leaves(layers)[0].shape[0] // table.num_chunks  # of a chunk
    self.stage = jax.lax.axis_index(STAGE)
    x = jax.eval_shape(lambda: collectives.varying(functions.embed(shared, _at(inputs, 0))))
    example = jax.eval_shape(lambda: (_at(layers, 0), shared, _at(inputs, 0)))
    self.layer = SAVE[save](functions.layer, (*example[:2], x, example[2]))
    self.x = x
    self.report = jax.eval_shape(functions.layer, *example[:2], x, example[2])[2]
    self.output = jax.eval_shape(functions.head, shared, x, example[2])[1]

  def run(self) -> Result:
    state = self._start()
    rows = self._rows()
    for start, stop in self._segments():
      piece = slice(start, stop)
      self.units = {kind: _presence(at_Q[piece]) for kind, at_Q in self._units().items()}
      if self.units["backward"] != "never":
        slot = jnp.asarray(self.table.backward_slot_QZ[start])[self.stage]
        state = state._replace(saved=_at(state.stash, jnp.maximum(slot, 0)))
      body = lambda state, row: (self._tick(state, row), None)
      state, _ = jax.lax.scan(body, state, jax.tree.map(lambda a: a[piece], rows))
    loss, outputs, g_shared = state.sums
    gradients = (state.g_layers, g_shared) if self.has_backward else None
    return Result(loss, state.auxiliary_loss, state.reports, outputs, gradients, state.ticks)

  def _units(self) -> dict[str, np.ndarray]:
    """Returns, for each kind of unit, in which ticks any stage runs it; full: all run a forward."""
    table = self.table
    return {
      "arrival": (table.arrival_slot_QZ >= 0).any(1),
      "head": table.head_micro_Q >= 0,
      "backward": (table.backward_micro_QZ >= 0).any(1),
      "embed_gradient": (table.embed_gradient_micro_Q >= 0) & self.has_backward,
      "embed": table.embed_micro_Q >= 0,
      "forward": (table.forward_micro_QZ >= 0).any(1),
      "full": (table.forward_micro_QZ >= 0).all(1),
    }

  def _segments(self) -> Iterator[tuple[int, int]]:
    """Yields the longest runs of ticks that agree on having a forward and having a backward
    unit.
    """
    units = self._units()
    halves = np.stack([units["forward"], units["backward"]], 1)
    edges = np.flatnonzero((halves[1:] != halves[:-1]).any(1)) + 1
    bounds = [0, *edges.tolist(), self.table.num_ticks]
    yield from itertools.pairwise(bounds)

  def _rows(self) -> _Row:
    """Returns the table's columns of this stage, [ticks]."""
    table = self.table
    # What the backward unit of tick t sends is stored at the end of t: the arrival of t + 1.
    cotangent_QZ = np.roll(table.cotangent_arrival_slot_QZ, -1, axis=0)
    finished_Q = table.forward_tick_UW[table.head_micro_Q, -1]
    is_fresh_Q = (table.head_micro_Q >= 0) & (finished_Q == np.arange(table.num_ticks) - 1)
    every_stage = lambda at_Q: jnp.asarray(at_Q, jnp.int32)
    this_stage = lambda at_QZ: jnp.asarray(at_QZ, jnp.int32)[:, self.stage]
    return _Row(
      head_micro=every_stage(table.head_micro_Q),
      head_inbox_slot=every_stage(table.head_inbox_slot_Q),
      head_is_fresh=every_stage(is_fresh_Q),
      embed_micro=every_stage(table.embed_micro_Q),
      embed_gradient_micro=every_stage(table.embed_gradient_micro_Q),
      arrival_slot=this_stage(table.arrival_slot_QZ),
      forward_micro=this_stage(table.forward_micro_QZ),
      forward_chunk=this_stage(table.forward_chunk_QZ),
      forward_slot=this_stage(table.forward_slot_QZ),
      forward_inbox_slot=this_stage(table.forward_inbox_slot_QZ),
      cotangent_arrival_slot=this_stage(cotangent_QZ),
      backward_micro=this_stage(table.backward_micro_QZ),
      backward_chunk=this_stage(table.backward_chunk_QZ),
      next_backward_slot=this_stage(np.roll(table.backward_slot_QZ, -1, axis=0)),
      backward_inbox_slot=this_stage(table.backward_inbox_slot_QZ),
    )

  def _start(self) -> _State:
    table, zeros = self.table, collectives.zeros_like
    stacked = lambda tree, *sizes: jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct((*sizes, *leaf.shape), leaf.dtype), tree
    )
    gradient = lambda tree: jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, self.gradient_dtype), tree
    )
    scalar = lambda dtype: zeros(jax.ShapeDtypeStruct((), dtype))
    backward = self.has_backward
    return _State(
      sent=zeros(self.x),
      inbox=zeros(stacked(self.x, table.num_inbox_slots)),
      cotangent_inbox=zeros(stacked(self.x, table.num_cotangent_slots)) if backward else None,
      stash=zeros(stacked(self.layer.saved, table.peak_in_flight, self.num_layers))
      if backward
      else None,
      saved=zeros(stacked(self.layer.saved, self.num_layers)) if backward else None,
      sums=_Sums(
        loss=scalar(jnp.float32),
        outputs=zeros(stacked(self.output, table.num_micro_batches)),
        g_shared=zeros(gradient(self.shared)) if backward else None,
      ),
      auxiliary_loss=scalar(jnp.float32),
      reports=zeros(stacked(self.report, table.num_chunks * self.num_layers)),
      g_layers=zeros(gradient(self.layers)) if backward else None,
      ticks=jnp.zeros((), jnp.int32),
    )

  def _tick(self, state: _State, row: _Row) -> _State:
    # An output that has just been made is read where it was made: were the head to wait for it on
    # stage 0, head and backward would wait for the transfer that they are to hide.
    y = _select(
      row.head_is_fresh > 0, state.sent, _at(state.inbox, jnp.maximum(row.head_inbox_slot, 0))
    )
    if self.units["arrival"] != "never":
      arrived = collectives.shift(state.sent, STAGE, +1)
      state = state._replace(inbox=_write(state.inbox, row.arrival_slot, arrived))
    owner = jnp.where(row.head_is_fresh > 0, self.table.num_stages - 1, 0)
    head = functools.partial(self._head, owner)
    sums, gy = self._branch("head", head, row.head_micro, state.sums, y)
    state = state._replace(sums=sums)
    if self.units["backward"] != "never":
      state, gx = self._backward(state, row, gy)
      unit = self._embed_gradient
      sums, _ = self._branch("embed_gradient", unit, row.embed_gradient_micro, state.sums, gx)
      arrived = collectives.shift(gx, STAGE, -1)
      slot = row.cotangent_arrival_slot
      state = state._replace(
        sums=sums, cotangent_inbox=_write(state.cotangent_inbox, slot, arrived)
      )
    if self.units["forward"] != "never":
      _, x = self._branch("embed", self._embed, row.embed_micro, None, None)
      state = self._forward(state, row, x)
    if self.units["backward"] != "never":
      # Taken after the forward unit has written, not where it is used: XLA does not order a read
      # of this tick's stash before that write, and would copy the whole stash in every tick.
      slot = jnp.maximum(row.next_backward_slot, 0)
      state = state._replace(saved=_at(state.stash, slot))
    return state._replace(ticks=state.ticks + 1)

  def _branch(self, kind: str, unit: Callable, micro, sums: _Sums | None, x):
    """Runs a unit that every stage takes part in, in the ticks that have it; else it makes
    zeros.
    """
    if self.units[kind] == "always":
      return unit(micro, sums, x)
    skip = lambda sums: (sums, collectives.zeros_like(self.x))
    if self.units[kind] == "never":
      return skip(sums)
    return jax.lax.cond(micro >= 0, lambda sums: unit(micro, sums, x), skip, sums)

  def _head(self, owner, micro, sums: _Sums, y):
    """Loss of the micro-batch whose `y` stage `owner` holds, and (with backward units) its
    cotangent.
    """
    inputs = _at(self.inputs, micro)
    g_shared = sums.g_shared
    with jax.named_scope("head"):
      y = collectives.broadcast_from(y, STAGE, owner)
      if self.has_backward:
        head = lambda shared, y: self.functions.head(shared, y, inputs)
        loss, vjp, outputs = jax.vjp(head, self.shared, y, has_aux=True)
        g_here, gy = vjp(collectives.varying(jnp.ones((), loss.dtype)))
        g_shared = _add(g_shared, g_here)
      else:
        loss, outputs = self.functions.head(self.shared, y, inputs)
        gy = y
    outputs = _write(sums.outputs, micro, collectives.varying(outputs))
    return _Sums(sums.loss + loss, outputs, g_shared), collectives.varying(gy)

  def _backward(self, state: _State, row: _Row, gy_head):
    """The backward unit of this stage: its layers in reverse, from what they saved."""
    runs = row.backward_micro >= 0
    last = (self.stage == self.table.num_stages - 1) & (
      row.backward_chunk == self.table.num_chunks - 1
    )
    inputs = _at(self.inputs, jnp.maximum(row.backward_micro, 0))
    gy = _select(last, gy_head, _at(state.cotangent_inbox, jnp.maximum(row.backward_inbox_slot, 0)))
    # A zero cotangent gives zero gradients, so an idle cell adds nothing and needs no further mask.
    gy = jax.tree.map(lambda leaf: jnp.where(runs, leaf, jnp.zeros((), leaf.dtype)), gy)
    g_auxiliary = collectives.varying(runs.astype(jnp.float32))
    first = jnp.maximum(row.backward_chunk, 0) * self.num_layers
    # With one micro-batch and one stage there is nothing to add to, and no idle cell.
    once = self.table.num_micro_batches == self.table.num_stages == 1
    accumulate = lambda total, i, g: total.at[i].set(g) if once else total.at[i].add(g)

    def layer(carry, l):
      gy, g_layers, g_shared = carry
      saved = _at(state.saved, l)
      g_weights, g_shared_here, gx = self.layer.backward(
        _at(self.layers, first + l), self.shared, inputs, saved, gy, g_auxiliary
      )
      g_layers = jax.tree.map(
        lambda total, g: accumulate(total, first + l, g.astype(total.dtype)), g_layers, g_weights
      )
      return (gx, g_layers, _add(g_shared, g_shared_here)), None

    (gx, g_layers, g_shared), _ = jax.lax.scan(
      layer, (gy, state.g_layers, state.sums.g_shared), jnp.arange(self.num_layers), reverse=True
    )
    sums = state.sums._replace(g_shared=g_shared)
    return state._replace(g_layers=g_layers, sums=sums), gx

  def _embed_gradient(self, micro, sums: _Sums, gx):
    """The embedding's gradient, from what the backward of the first layer left on stage 0."""
    with jax.named_scope("embed"):
      gx = collectives.broadcast_from(gx, STAGE, 0)
      embed = lambda shared: self.functions.embed(shared, _at(self.inputs, micro))
      _, vjp = jax.vjp(embed, self.shared)
      sums = sums._replace(g_shared=_add(sums.g_shared, vjp(gx)[0]))
    return sums, collectives.zeros_like(self.x)

  def _embed(self, micro, sums: None, x: None):
    with jax.named_scope("embed"):
      x = self.functions.embed(self.shared, _at(self.inputs, micro))
    return sums, collectives.varying(x)

  def _forward(self, state: _State, row: _Row, x_embedded) -> _State:
    """The forward unit of this stage: its chunk of layers, saving what the backward unit needs."""
    runs = row.forward_micro >= 0
    inputs = _at(self.inputs, jnp.maximum(row.forward_micro, 0))
    from_inbox = _at(state.inbox, jnp.maximum(row.forward_inbox_slot, 0))
    x = _select(row.forward_inbox_slot >= 0, from_inbox, x_embedded)
    first = jnp.maximum(row.forward_chunk, 0) * self.num_layers
    slot = jnp.maximum(row.forward_slot, 0)
    all_run = self.units["full"] == "always"  # then nothing needs a mask
    keep = lambda new, old: new if all_run else jnp.where(runs, new, old)

    def layer(carry, l):
      x, stash, auxiliary_loss, reports = carry
      weights = _at(self.layers, first + l)
      if self.has_backward:
        y, auxiliary, report, saved = self.layer.forward(weights, self.shared, x, inputs)
        stash = [
          leaf.at[slot, l].set(keep(new, leaf[slot, l]))
          for leaf, new in zip(stash, saved, strict=True)
        ]
      else:
        y, auxiliary, report = self.functions.layer(weights, self.shared, x, inputs)
      auxiliary_loss += keep(auxiliary, jnp.zeros_like(auxiliary))
      reports = jax.tree.map(
        lambda total, r: total.at[first + l].add(keep(r, jnp.zeros_like(r))),
        reports, report,
      )  # fmt: skip
      return (y, stash, auxiliary_loss, reports), None

    (y, stash, auxiliary_loss, reports), _ = jax.lax.scan(
      layer, (x, state.stash, state.auxiliary_loss, state.reports), jnp.arange(self.num_layers)
    )
    return state._replace(sent=y, stash=stash, auxiliary_loss=auxiliary_loss, reports=reports)


def _presence(at_Q: np.ndarray) -> str:
  """Returns whether a unit runs never, always or sometimes in a run of ticks."""
  return "always" if at_Q.all() else "sometimes" if at_Q.any() else "never"


def _at(tree, index):
  """Returns entry `index` of every leaf."""
  return jax.tree.map(lambda leaf: leaf[index], tree)


def _write(tree, slot, entry):
  """Returns `tree` with `entry` at `slot`; a slot of -1 writes nothing."""
  place = jnp.maximum(slot, 0)
  return jax.tree.map(
    lambda leaf, new: leaf.at[place].set(jnp.where(slot >= 0, new, leaf[place])), tree, entry
  )


def _select(condition, on_true, on_false):
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def _add(total, more):
  return jax.tree.map(lambda t, m: t + m.astype(t.dtype), total, more)
