"""The layers of a chunk, run forwards, backwards, or both at once with their steps tied.

Where a tick has a forward and a backward unit, they belong to different micro-batches and need
nothing of each other. Layer by layer, the steps of the one run beside those of the other, the
backward's from the last to the first: so while one exchanges tokens the other multiplies matrices.
A barrier after each slot of steps says so to XLA, whose scheduler does not find it by itself; it
holds the chain of activations and the chain of cotangents. What is saved may come a slot later than
what it is made from, and weights' gradients some slots later; they fill what room is left there:
first of all beside gathers and sums inside the host, which their own stream waits for while the
other one sends. A backward unit alone in its tick has them beside its own exchanges.

Knows layers as steps; must not know ticks, stages or the model.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.pipeline import buffers, tie
from moe_jax.pipeline.saving import SavedLayer
from moe_jax.pipeline.weights import Coming, Streamed, Whole

Tree = Any

_LARGE = 1 / 8  # of a layer's weights


class Totals(NamedTuple):
  """What layers add to, or write into.

  Attributes:
    stash: [slots, layers of a chunk, ...] what layers saved. A slot holds the layers first to last,
      or last to first.
    statistics: `buffers.packed`, [micro-batches, layers of this stage, ...], of the forward units
      that ran; once the micro-batch was at its head, their cotangents.
    reports: `buffers.packed`, [layers of this stage, ...].
    g_layers: [layers of this stage, ...].
    g_shared: of the parameters outside the layers.
    rings: weights gathered ahead, for forward and for backward units.
  """

  stash: Tree
  statistics: list[jax.Array]
  reports: Tree
  g_layers: Tree
  g_shared: Tree
  rings: tuple[Tree, Tree]


class Forward(NamedTuple):
  """A forward unit.

  Attributes:
    x: of the first layer.
    inputs: of the micro-batch.
    micro: its number.
    first: number of the chunk's first layer.
    coming: what it gathers, where weights lie in shares.
    slot: of the stash, where the layers save; may be the one that the backward unit beside it
      reads, if one of the two is reversed.
    is_reversed: whether the slot holds the layers last to first.
    runs: whether the cell is busy; None where every stage's is, so that nothing needs a mask.
    is_masked: whether what an idle cell saves needs one, for its slot may be in use.
  """

  x: Tree
  inputs: Tree
  micro: jax.Array
  first: jax.Array
  coming: Coming | None
  slot: jax.Array
  is_reversed: jax.Array
  runs: jax.Array | None
  is_masked: bool


class Backward(NamedTuple):
  """A backward unit; one of an idle cell has cotangents of zero, and so adds nothing.

  Attributes:
    gy: cotangent of the last layer's y.
    g_statistics: cotangents of the layers' statistics, `buffers.packed`, [layers of a chunk, ...].
    inputs: of the micro-batch.
    first: number of the chunk's first layer.
    coming: what it gathers, where weights lie in shares.
    slot: of the stash, where the layers saved.
    is_reversed: whether the slot holds the layers last to first.
  """

  gy: Tree
  g_statistics: list[jax.Array]
  inputs: Tree
  first: jax.Array
  coming: Coming | None
  slot: jax.Array
  is_reversed: jax.Array


class Chunk(NamedTuple):
  """What every chunk of this stage shares.

  Attributes:
    steps: of a layer, with what they save.
    slots: how many steps of a forward and of a backward unit run side by side, slot by slot.
    due: of how many steps of a backward unit the weights' gradients must be there at the end of
      each slot.
    due_alone: likewise of a backward unit without a forward one, each of whose steps is a slot.
    quiet: first and last of the slots beside which weights to come are gathered.
    reads: the slot beside which is read what the backward unit's next layer saved; of a backward
      unit alone it is the first.
    inside_s: of each step of a layer, about how long it sends inside the host.
    weights: of this stage's layers.
    shared: parameters outside the layers.
    statistics: shapes of those of a layer.
    num_layers: of a chunk.
    adds: whether gradients add to those of other units; else they are written.
  """

  steps: SavedLayer
  slots: tuple[tuple[int, int], ...]
  due: tuple[int, ...]
  due_alone: tuple[int, ...]
  quiet: tuple[int, int]
  reads: int
  inside_s: tuple[float, ...]
  weights: Whole | Streamed
  shared: Tree
  statistics: Tree
  num_layers: int
  adds: bool

  def run(
    self, totals: Totals, forward: Forward | None, backward: Backward | None
  ) -> tuple[Totals, Tree, Tree]:
    """Returns the totals, `y` of the forward unit and `gx` of the backward unit, None for one that
    is not there.

    Communication: that of the layer, and of what the weights gather for each.
    """
    layer = functools.partial(self._layer, forward, backward)
    last = self.num_layers - 1
    body = lambda carry, l: (layer(l, False, *carry), None)
    saved, totals = self._read(backward, last, totals)
    carry = (totals, forward and forward.x, backward and backward.gy, saved)
    if last:
      carry, _ = jax.lax.scan(body, carry, jnp.arange(last))
    # Out of the loop the last layer has beside it what comes before and after, transfers too.
    return layer(last, True, *carry)[:3]

  def _layer(self, forward, backward, l, is_last, totals: Totals, x, gy, saved):
    """Returns totals, `y` and `gx` of one layer of each unit, the steps of the two tied; and what
    the backward unit's next layer saved, None behind the last.

    Args:
      saved: by the backward unit's layer.
    """
    # Of two layers no loop stands between, for XLA unrolls one turn: the first one's sums of
    # gradients may be missing yet.
    sums_pending = is_last and self.num_layers == 2
    rings = totals.rings
    ahead = forward and _ForwardLayer(self, forward, l, x, rings[0])
    back = backward and _BackwardLayer(self, backward, l, gy, saved, rings[1])
    coming = [each.coming for each in (ahead, back) if each]
    slots, due, quiet, reads = self.slots, self.due, self.quiet, self.reads
    alone = ahead is None
    if alone:
      slots, due, quiet, reads = ((0, 1),) * len(self.due_alone), self.due_alone, (0, 0), 0
    saved = None
    for number, (num_ahead, num_back) in enumerate(slots):
      num_done = due[number - 1] if number else 0
      if number == reads and not is_last:
        saved, totals = self._read(backward, self.num_layers - 2 - l, totals)
      if number == quiet[0]:
        coming = [self.weights.gather(shares) for shares in coming]
      if ahead:
        totals = totals._replace(stash=ahead.write(totals.stash))
        totals = self._run_ahead(
          ahead,
          back,
          num_ahead,
          totals,
          sums_pending=sums_pending,
          due=slice(num_done, due[number]),
        )
      if back:
        totals = self._run_back(
          back, num_back, totals, alone=alone, sums_pending=sums_pending, num_done=num_done
        )
      if ahead and back:
        x, *others = ahead.carry if ahead.is_done else (ahead.carry,)
        is_tied = number in (quiet[0] - 1, quiet[1])
        num_due = due[number]
        tied = (x, totals.stash, back.gradients, back.of_parameters[:num_due])
        tied, there = _both(tied, coming if is_tied else [])
        x, stash, back.gradients, back.of_parameters[:num_due] = tied
        coming = there if is_tied else coming
        ahead.carry = (x, *others) if ahead.is_done else x
        totals = totals._replace(stash=stash)
      elif back:
        there = slice(due[number])
        back.gradients, back.of_parameters[there] = _both(back.gradients, back.of_parameters[there])
    found = iter(coming)
    put = lambda each, ring: (
      self.weights.put(l, each.unit.coming, each.ring, next(found)) if each else ring
    )
    rings = (put(ahead, rings[0]), put(back, rings[1]))
    totals = totals._replace(rings=rings)
    if back:
      totals, gy = back.finish(totals)
    if ahead:
      totals, x = ahead.finish(totals)
    if back is None and not is_last:
      # Beside the layer's last exchange, or XLA would put all layers' beside that of the last.
      x, stash = _both(x, totals.stash)
      totals = totals._replace(stash=stash)
    return totals, x, gy, saved

  def _run_ahead(
    self, ahead, back, num_steps: int, totals: Totals, *, sums_pending: bool, due: slice
  ) -> Totals:
    """Runs the next forward steps, and lays beside those that send inside the host what nothing
    waits for, where a backward unit has some.

    Beside the layer's first two: the sums of gradients, if they may be missing. Beside the first of
    several steps in a slot: the weights' gradients that are due in it; then beside a later one what
    forward steps saved, but for the last one's, which may come in the next slot.
    """
    has_begun = False  # with gradients beside the first
    sums_wait = sums_pending and any(self.inside_s)
    pending = self._sums_beside_first(totals.g_layers) if sums_wait else ()
    for number in range(num_steps):
      place = len(ahead.kept)
      ahead.run()
      if back is None or not self.inside_s[place]:
        continue
      before = sum(each > 0 for each in self.inside_s[:place])
      if before < len(pending):
        leaves, tree = jax.tree.flatten(totals.g_layers)
        ahead.carry, there = _both(ahead.carry, [leaves[i] for i in pending[before]])
        for i, leaf in zip(pending[before], there, strict=True):
          leaves[i] = leaf
        totals = totals._replace(g_layers=jax.tree.unflatten(tree, leaves))
      if number == 0 and num_steps > 1 and due.start < due.stop:
        ahead.carry, back.of_parameters[due] = _both(ahead.carry, back.of_parameters[due])
        has_begun = True
      elif has_begun and not self.steps.runs_again:
        ahead.carry, stash = _both(ahead.carry, ahead.write(totals.stash, place - 1))
        totals = totals._replace(stash=stash)
    return totals

  def _sums_beside_first(self, g_layers: Tree) -> tuple[list[int], list[int]]:
    """Returns which leaves' sums stand beside a layer's first step that sends inside the host, as
    many as it lasts, and which beside the next such step.
    """
    bytes_of = [leaf[0].size * leaf.dtype.itemsize for leaf in jax.tree.leaves(g_layers)]
    return tie.parted(bytes_of, next(filter(None, self.inside_s)))

  def _run_back(
    self, back, num_steps: int, totals: Totals, *, alone: bool, sums_pending: bool, num_done: int
  ) -> Totals:
    """Runs the next backward steps, and lays beside those that send what nothing waits for.

    Beside the layer's first gather inside the host: its large weights, which the next step
    multiplies by. Alone: beside the layer's first step the sums of gradients, if they may be
    missing. With a forward unit: beside the first of several steps in a slot, where it sends inside
    the host, what forward steps saved, unless steps that run again stand there already; beside the
    layer's last the weights' gradients that are left.
    """
    for number in range(num_steps):
      place = len(back.of_parameters)
      back.run()
      if alone and sums_pending and place == 0:
        back.gradients, g_layers = _both(back.gradients, totals.g_layers)
        totals = totals._replace(g_layers=g_layers)
      if not self.inside_s[-1 - place]:
        continue
      leads = number == 0 and num_steps > 1
      if (alone or leads) and not any(self.inside_s[-1 - before] for before in range(place)):
        back.cut_weights()
      if alone:
        continue
      if leads and not self.steps.runs_again:
        back.gradients, stash = _both(back.gradients, totals.stash)
        totals = totals._replace(stash=stash)
      if back.is_done:
        left = slice(num_done, place)
        back.gradients, back.of_parameters[left] = _both(back.gradients, back.of_parameters[left])
    return totals

  def _read(self, backward, l, totals: Totals) -> tuple[Tree, Totals]:
    """Returns what a layer saved, and the totals, whose stash is to be written only now."""
    if backward is None:
      return None, totals
    place = (backward.slot, _place(l, backward.is_reversed, self.num_layers))
    saved = buffers.at(totals.stash, place)
    # XLA does not order a read before a write that does not need it, and would copy the stash.
    saved, stash = _both(saved, totals.stash)
    return saved, totals._replace(stash=stash)


class _ForwardLayer:
  """One layer on its way forwards."""

  def __init__(self, chunk: Chunk, unit: Forward, l: jax.Array, x: Tree, ring: Tree):
    self.chunk, self.unit, self.l = chunk, unit, l
    # With x, or XLA cuts the weights of all layers of both units out of the stack at once, and the
    # first product waits for all of them.
    self.carry, number = _both(x, unit.first + l)
    self.weights, self.ring, self.coming = chunk.weights.take(number, l, unit.coming, ring)
    self.kept: list[list[jax.Array]] = []
    self.num_written = 0

  def run(self) -> None:
    """Runs the next step."""
    step = self.chunk.steps.forward[len(self.kept)]
    self.carry, kept = step(self.weights, self.chunk.shared, self.carry, self.unit.inputs)
    self.kept.append(kept)

  @property
  def is_done(self) -> bool:
    """Whether all steps ran, so that the carry is (y, statistics, report)."""
    return len(self.kept) == len(self.chunk.steps.forward)

  def write(self, stash: Tree, end: int | None = None) -> Tree:
    """Returns the stash with what the steps keep that ran since the last call, up to step `end`."""
    end = len(self.kept) if end is None else max(end, self.num_written)
    place = (self.unit.slot, _place(self.l, self.unit.is_reversed, self.chunk.num_layers))
    keep = self._keep if self.unit.is_masked else lambda new, old: new
    put = lambda leaf, new: buffers.put(leaf, place, keep(new, lambda: leaf[place]))
    stash = list(stash)
    for i in range(self.num_written, end):
      stash[i] = jax.tree.map(put, stash[i], self.kept[i])
    self.num_written = end
    return tuple(stash)

  def finish(self, totals: Totals) -> tuple[Totals, Tree]:
    y, statistics, report = self.carry
    number = self.unit.first + self.l
    stash = self.write(totals.stash)
    or_nothing = lambda new: self._keep(new, lambda: jnp.zeros_like(new))
    reports = buffers.add_packed(totals.reports, number, report, or_nothing)
    place = (self.unit.micro, number)
    put = lambda array, new: buffers.put(array, place, self._keep(new, lambda: array[place]))
    found = [*map(put, totals.statistics, buffers.packed(statistics))]
    return totals._replace(stash=stash, statistics=found, reports=reports), y

  def _keep(self, new: jax.Array, old: Callable[[], jax.Array]) -> jax.Array:
    return new if self.unit.runs is None else jnp.where(self.unit.runs, new, old())


class _BackwardLayer:
  """One layer on its way backwards."""

  def __init__(
    self, chunk: Chunk, unit: Backward, place: jax.Array, gy: Tree, saved: Tree, ring: Tree
  ):
    self.chunk, self.unit = chunk, unit
    self.number = unit.first + (chunk.num_layers - 1 - place)
    gy, number = _both(gy, self.number)  # as of a forward layer
    self.weights, self.ring, self.coming = chunk.weights.take(number, place, unit.coming, ring)
    self.restored = chunk.steps.restore(self.weights, chunk.shared, unit.inputs, saved)
    self.gy_tree = jax.tree.structure(gy)
    of_layer = buffers.at(unit.g_statistics, chunk.num_layers - 1 - place)
    g_statistics = buffers.unpacked(of_layer, chunk.statistics)
    self.gradients = [*jax.tree.leaves(gy), *jax.tree.leaves(g_statistics)]
    self.of_parameters: list[dict[int, jax.Array]] = []

  def run(self) -> None:
    """Runs the next step."""
    step = self.chunk.steps.backward[-1 - len(self.of_parameters)]
    of_parameters, self.gradients = step(
      self.weights, self.chunk.shared, self.unit.inputs, self.restored, self.gradients
    )
    self.of_parameters.append(of_parameters)

  def cut_weights(self) -> None:
    """Has the large weights cut out of their stack before the next step; what is smaller is read
    where it lies.
    """
    leaves, tree = jax.tree.flatten(self.weights)
    least = _LARGE * sum(leaf.size for leaf in leaves)
    large = [i for i, leaf in enumerate(leaves) if leaf.size >= least]
    self.gradients, cut = _both(self.gradients, [leaves[i] for i in large])
    for i, leaf in zip(large, cut, strict=True):
      leaves[i] = leaf
    self.weights = jax.tree.unflatten(tree, leaves)

  @property
  def is_done(self) -> bool:
    """Whether all steps ran."""
    return len(self.of_parameters) == len(self.chunk.steps.backward)

  def finish(self, totals: Totals) -> tuple[Totals, Tree]:
    sums, tree = jax.tree.flatten((totals.g_layers, totals.g_shared))
    num_weights = len(jax.tree.leaves(totals.g_layers))
    for i, total in enumerate(sums):
      parts = [part[i] for part in self.of_parameters if i in part]
      if not parts:
        continue
      gradient = sum(parts[1:], parts[0])
      if i >= num_weights:
        sums[i] = total + gradient.astype(total.dtype)
      elif self.chunk.adds:
        sums[i] = buffers.add(total, self.number, gradient)
      else:
        sums[i] = buffers.put(total, self.number, gradient)
    g_layers, g_shared = jax.tree.unflatten(tree, sums)
    gx = jax.tree.unflatten(self.gy_tree, self.gradients)
    return totals._replace(g_layers=g_layers, g_shared=g_shared), gx


def _both(one: Tree, other: Tree) -> tuple[Tree, Tree]:
  """Returns both; nothing that reads either runs before both are there."""
  return jax.lax.optimization_barrier((one, other))


def _place(l: jax.Array, is_reversed: jax.Array, num_layers: int) -> jax.Array:
  """Returns where a layer's part lies in its slot."""
  return jnp.where(is_reversed, num_layers - 1 - l, l)
