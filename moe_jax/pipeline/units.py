"""Forward and backward units of a tick, and one layer of each on its way, step by step.

A layer reads its weights and what it saved, and adds what it makes to the stage's totals, where
they lie. Knows layers as steps; must not know what runs beside them, ticks, stages or the model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.parallel import collectives
from moe_jax.pipeline import buffers
from moe_jax.pipeline.functions import Functions
from moe_jax.pipeline.reduction import Reduction
from moe_jax.pipeline.saving import SavedLayer
from moe_jax.pipeline.weights import Arriving, Coming, Streamed, Whole

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
    landed: weights that came in a message and are still to be put into the forward ring, as
      `Arriving.send` returns them; () where none do.
    sums: [layers of this stage, ...] those of `g_layers` that left, summed over ranks.
  """

  stash: Tree
  statistics: list[jax.Array]
  reports: Tree
  g_layers: Tree
  g_shared: Tree
  rings: tuple[Tree, Tree]
  landed: Tree
  sums: list[jax.Array]


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
    leaving: number of the first layer of the chunk whose gradients leave beside it; None where none
      do.
    is_last: whether those of its own chunk may leave too, beside the layer that runs last.
  """

  gy: Tree
  g_statistics: list[jax.Array]
  inputs: Tree
  first: jax.Array
  coming: Coming | None
  slot: jax.Array
  is_reversed: jax.Array
  leaving: jax.Array | None
  is_last: bool


class Layers(NamedTuple):
  """What all layers of this stage share.

  Attributes:
    functions: of the model.
    steps: of a layer, with what they save.
    weights: of all of them.
    shared: parameters outside the layers.
    statistics: shapes of those of a layer.
    num_layers: of a chunk.
    adds: whether gradients add to those of other units; else they are written.
    reduction: what sums gradients over ranks.
  """

  functions: Functions
  steps: SavedLayer
  weights: Whole | Streamed | Arriving
  shared: Tree
  statistics: Tree
  num_layers: int
  adds: bool
  reduction: Reduction


class ForwardLayer:
  """One layer on its way forwards."""

  def __init__(self, stage: Layers, unit: Forward, l: jax.Array, x: Tree, ring: Tree):
    self.stage, self.unit, self.l = stage, unit, l
    # With x, or XLA cuts the weights of all layers of both units out of the stack at once, and the
    # first product waits for all of them. Of halves with the one that is ahead.
    self.carry, number = with_part(x, 0, unit.first + l)
    self.weights, self.ring, self.coming = stage.weights.take(number, l, unit.coming, ring)
    self.inputs = stage.functions.inputs_of(unit.inputs, stage.weights.layers, number)
    self.kept: list[list[jax.Array]] = []
    self.num_written = 0

  def run(self) -> None:
    """Runs the next step."""
    step = self.stage.steps.forward[len(self.kept)]
    self.carry, kept = step(self.weights, self.stage.shared, self.carry, self.inputs)
    self.kept.append(kept)

  @property
  def is_done(self) -> bool:
    """Whether all steps ran, so that the carry is (y, statistics, report)."""
    return len(self.kept) == len(self.stage.steps.forward)

  def send(self, coming: Tree) -> Tree:
    """Returns what the messages beside the layer bring."""
    return self.stage.weights.gather(coming)

  def receive(self, totals: Totals, brought: Tree) -> Totals:
    """Puts away what they brought."""
    ring = self.stage.weights.put(self.l, self.unit.coming, self.ring, brought)
    return totals._replace(rings=(ring, totals.rings[1]))

  def write(self, stash: Tree, end: int | None = None) -> Tree:
    """Returns the stash with what the steps keep that ran since the last call, up to step `end`."""
    end = len(self.kept) if end is None else max(end, self.num_written)
    place = (self.unit.slot, place_of(self.l, self.unit.is_reversed, self.stage.num_layers))
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
    found = buffers.put_packed(totals.statistics, place, statistics, self.unit.runs)
    return totals._replace(stash=stash, statistics=found, reports=reports), y

  def _keep(self, new: jax.Array, old: Callable[[], jax.Array]) -> jax.Array:
    return new if self.unit.runs is None else jnp.where(self.unit.runs, new, old())


class BackwardLayer:
  """One layer on its way backwards."""

  def __init__(
    self, stage: Layers, unit: Backward, place: jax.Array, gy: Tree, saved: Tree, ring: Tree,
    leaving: list[jax.Array],
  ):  # fmt: skip
    self.stage, self.unit, self.place = stage, unit, place
    self.number = unit.first + (stage.num_layers - 1 - place)
    gy, number = with_part(gy, -1, self.number)  # as of a forward layer; the second half is ahead
    self.weights, self.ring, shares = stage.weights.take(number, place, unit.coming, ring)
    self.coming = (shares, leaving)
    self.inputs = stage.functions.inputs_of(unit.inputs, stage.weights.layers, number)
    self.restored = stage.steps.restore(self.weights, stage.shared, self.inputs, saved)
    self.gy_tree = jax.tree.structure(gy)
    of_layer = buffers.at(unit.g_statistics, stage.num_layers - 1 - place)
    g_statistics = buffers.unpacked(of_layer, stage.statistics)
    self.gradients = [*jax.tree.leaves(gy), *jax.tree.leaves(g_statistics)]
    self.of_parameters: list[dict[int, jax.Array]] = []

  def run(self) -> None:
    """Runs the next step."""
    step = self.stage.steps.backward[-1 - len(self.of_parameters)]
    of_parameters, self.gradients = step(
      self.weights, self.stage.shared, self.inputs, self.restored, self.gradients
    )
    self.of_parameters.append(of_parameters)

  def send(self, coming: Tree) -> Tree:
    """As of a forward layer."""
    shares, leaving = coming
    return self.stage.weights.gather(shares), self.stage.reduction.summed(
      leaving
    ) if leaving else []

  def receive(self, totals: Totals, brought: Tree) -> Totals:
    """As of a forward layer."""
    gathered, reduced = brought
    ring = self.stage.weights.put(self.place, self.unit.coming, self.ring, gathered)
    totals = totals._replace(rings=(totals.rings[0], ring))
    if self.unit.leaving is None:
      return totals
    number = self.unit.leaving + self.place
    sums = [buffers.put(leaf, number, new) for leaf, new in zip(totals.sums, reduced, strict=True)]
    return totals._replace(sums=sums)

  def cut_weights(self) -> None:
    """Has the large weights cut out of their stack before the next step; what is smaller is read
    where it lies.
    """
    leaves, tree = jax.tree.flatten(self.weights)
    least = _LARGE * sum(leaf.size for leaf in leaves)
    large = [i for i, leaf in enumerate(leaves) if leaf.size >= least]
    self.gradients, cut = both(self.gradients, [leaves[i] for i in large])
    for i, leaf in zip(large, cut, strict=True):
      leaves[i] = leaf
    self.weights = jax.tree.unflatten(tree, leaves)

  @property
  def is_done(self) -> bool:
    """Whether all steps ran."""
    return len(self.of_parameters) == len(self.stage.steps.backward)

  @property
  def is_of_parts(self) -> bool:
    """Whether cotangents are of several parts, as of halves, which need not wait for each other."""
    return self.gy_tree.num_leaves > 1

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
      elif self.stage.adds:
        sums[i] = buffers.add(total, self.number, gradient)
      else:
        sums[i] = buffers.put(total, self.number, gradient)
    g_layers, g_shared = jax.tree.unflatten(tree, sums)
    gx = jax.tree.unflatten(self.gy_tree, self.gradients)
    return totals._replace(g_layers=g_layers, g_shared=g_shared), gx


class Moves(NamedTuple):
  """Weights that come beside a forward unit, or gradients that leave beside a backward unit, those
  of several layers in one message.

  Attributes:
    stage: of the units.
    forward, backward: the unit, None for the other.
    num_layers: how many layers' gradients leave, from `Backward.leaving` on.
  """

  stage: Layers
  forward: Forward | None
  backward: Backward | None
  num_layers: int

  @classmethod
  def beside(cls, stage: Layers, forward: Forward | None, backward: Backward | None):
    """Returns what comes or leaves beside a unit, a chunk's; None if nothing does."""
    if forward:
      comes = forward.coming is not None and isinstance(stage.weights, Arriving)
      return cls(stage, forward, None, 0) if comes else None
    return None if backward.leaving is None else cls(stage, None, backward, stage.num_layers)

  def beside_last_layer(self) -> "Moves | None":
    """Returns what leaves beside the layer of the stage that runs last: the gradients of the others
    of its chunk. None if that layer is not in this unit, or alone there.
    """
    if not self.backward or not self.backward.is_last or self.num_layers == 1:
      return None
    backward = self.backward._replace(leaving=self.backward.first + 1)
    return Moves(self.stage, None, backward, self.num_layers - 1)

  def begin(self, totals: Totals) -> tuple[Tree, Totals]:
    """Returns what the messages bring, and the totals, to which is to be added only now."""
    stage = self.stage
    if self.forward:
      # What the message before brought is put away beside this one.
      brought = stage.weights.send(self.forward.coming.layers)
      ring, other = totals.rings
      ring = stage.weights.put_landed(collectives.after(brought, totals.landed), ring)
      # Or XLA reads what is not written over where it lay before, and copies the ring for it.
      ring = jax.lax.optimization_barrier(ring)
      return brought, totals._replace(rings=(ring, other), landed=())
    leaving, g_layers = both(
      stage.reduction.of_chunk(totals.g_layers, self.backward.leaving, self.num_layers),
      totals.g_layers,
    )
    return stage.reduction.summed(leaving), totals._replace(g_layers=g_layers)

  def others(self, brought: Tree, totals: Totals) -> tuple[Forward | None, Backward | None]:
    """Returns the units without what moves; on XLA:CPU they wait for it (`collectives.after`)."""
    if self.forward:
      x = collectives.after((brought, totals.rings[0]), self.forward.x)
      return self.forward._replace(x=x, coming=None), None
    gy = collectives.after(brought, self.backward.gy)
    return None, self.backward._replace(gy=gy, leaving=None)

  def end_before(self, x: Tree, brought: Tree, totals: Totals) -> tuple[Tree, Totals]:
    """Returns `x` and the totals with what messages brought put away, which are there before either
    is read: where no loop ends, XLA would have messages leave together, behind everything.
    """
    (x, g_layers), brought = both((x, totals.g_layers), brought)
    return x, self.end(totals._replace(g_layers=g_layers), brought)

  def end(self, totals: Totals, brought: Tree) -> Totals:
    """Puts away what they brought."""
    if self.forward:
      return totals._replace(landed=brought)
    place = (self.backward.leaving,)
    sums = [buffers.put(leaf, place, new) for leaf, new in zip(totals.sums, brought, strict=True)]
    return totals._replace(sums=sums)


def both(one: Tree, other: Tree) -> tuple[Tree, Tree]:
  """Returns both; nothing that reads either runs before both are there."""
  return jax.lax.optimization_barrier((one, other))


def with_part(tree: Tree, part: int, other: Tree) -> tuple[Tree, Tree]:
  """Returns both; nothing that reads `other`, or leaf `part` of the tree, runs before both are
  there. Other leaves, as of the other half, wait for neither.
  """
  leaves, structure = jax.tree.flatten(tree)
  leaves[part], other = both(leaves[part], other)
  return jax.tree.unflatten(structure, leaves), other


def place_of(l: jax.Array, is_reversed: jax.Array, num_layers: int) -> jax.Array:
  """Returns where a layer's part lies in its slot."""
  return jnp.where(is_reversed, num_layers - 1 - l, l)
