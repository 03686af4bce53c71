"""The weights of a stage's layers: whole, or in shares, which are gathered while the pipeline fills
(ZeRO-1), or a few layers ahead of each use (ZeRO-3).

The layers that a stage runs forwards, tick after tick, are a sequence that the schedule's table
knows, and so are those that it runs backwards. A ring holds the next few layers of each whole. A
layer takes its weights out of the ring and puts there, gathered, those of the layer that comes as
many layers later as the ring is long: nothing in between waits for them. An idle cell takes and
gathers as if it ran its first chunk: the program of all stages is one.

Source: ZeRO (arXiv:1910.02054), section 5.3: parameters are split over the data-parallel ranks, and
those of a layer are gathered where it is used.

Knows tables and trees; must not know which weights lie in shares, or along which axis.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.parallel import collectives
from moe_jax.pipeline import buffers, ends
from moe_jax.pipeline.table import Table
from moe_jax.pipeline.together import Together

Tree = Any


class Coming(NamedTuple):
  """What a unit gathers beside its layers.

  Attributes:
    slot: of the ring, where the weights of the unit's first layer wait; None where every layer's
      weights have a place of their own.
    layers: [layers of a chunk] which layer's weights come beside each of the unit's.
  """

  slot: jax.Array | None
  layers: jax.Array


class Whole(NamedTuple):
  """Weights that lie whole on this device.

  Attributes:
    layers: [layers of this stage, ...].
  """

  layers: Tree

  def layer(self, number: jax.Array | int) -> Tree:
    """Returns a layer's weights."""
    return buffers.at(self.layers, number)

  def coming(self, table: Table, stage: jax.Array) -> tuple[None, None]:
    """Returns what forward and backward units gather in each tick: nothing."""
    return None, None

  def start(self, table: Table, stage: jax.Array) -> tuple[tuple, tuple]:
    """Returns the rings of both directions before the first tick, which hold nothing."""
    return (), ()

  def take(
    self, number: jax.Array, place: int, coming: None, ring: tuple
  ) -> tuple[Tree, tuple, tuple]:
    """Returns a layer's weights, and twice nothing."""
    return self.layer(number), (), ()

  def gather(self, shares: tuple) -> tuple:
    """Returns nothing."""
    return ()

  def put(self, place: int, coming: None, ring: tuple, gathered: tuple) -> tuple:
    """Returns the ring."""
    return ()


class Shares(NamedTuple):
  """Weights of which some lie in shares.

  Attributes:
    layers: [layers of this stage, ...], whole or this device's share.
    whole: what makes a layer's shares, or those of several stacked, whole.
  """

  layers: Tree
  whole: Together

  def at(self, number: jax.Array | int | slice) -> list[jax.Array]:
    """Returns those weights of a layer, or of several, that lie in shares."""
    return [leaf[number] for leaf in self.whole.of(self.layers)]

  def gather(self, shares: list[jax.Array]) -> list[jax.Array]:
    """Returns whole what `at` gave.

    Communication: that of `whole`.
    """
    return self.whole.run(shares)

  def several(self, first: jax.Array, number: int) -> list[jax.Array]:
    """Returns what `at` does of so many layers that follow each other, stacked."""
    return buffers.several(self.whole.of(self.layers), first, number)

  def joined(self, gathered: list[jax.Array]) -> Tree:
    """Returns the tree with what was gathered where shares lie."""
    return self.whole.put(self.layers, gathered)

  def layer(self, number: jax.Array | int, gathered: list[jax.Array] | None = None) -> Tree:
    """Returns a layer's weights, with what was gathered of it, or gathered now.

    Communication: that of `whole`, if they are to be gathered.
    """
    gathered = self.gather(self.at(number)) if gathered is None else gathered
    return self.whole.put(self.layers, gathered, lambda leaf: leaf[number])


@dataclasses.dataclass(frozen=True)
class _InShares:
  """Weights in shares.

  Attributes:
    shares: of the layers.
  """

  shares: Shares

  @property
  def layers(self) -> Tree:
    """[layers of this stage, ...], whole or this device's share."""
    return self.shares.layers

  def layer(self, number: jax.Array | int) -> Tree:
    """Returns a layer's weights, gathered now.

    Communication: that of the shares.
    """
    return self.shares.layer(number)

  def gather(self, shares: list) -> list:
    """Returns whole what `take` gave.

    Communication: that of the shares.
    """
    return self.shares.gather(shares) if shares else []


@dataclasses.dataclass(frozen=True)
class Arriving(_InShares):
  """Weights in shares, each chunk's to be whole when it first runs, as `ends.coming` says.

  In place of a ring stand the whole weights of all layers, of which the first chunk's are there;
  with messages, once the first of them is put away.

  Attributes:
    in_messages: whether those of a chunk come in one message, which is put away in the next tick.
  """

  in_messages: bool = False

  def coming(self, table: Table, stage: jax.Array) -> tuple[Coming, None]:
    """Returns what forward units gather in each tick, leaves [ticks, ...]."""
    num_layers = _num_layers(self.layers, table)
    first_Q = np.maximum(ends.coming(table), 0) * num_layers
    layers_QL = jnp.asarray(first_Q[:, None] + np.arange(num_layers), jnp.int32)
    return Coming(None, layers_QL), None

  def start(self, table: Table, stage: jax.Array) -> tuple[list, tuple]:
    """Returns the whole weights of all layers before the first tick, but for those to come.

    Communication: that of the shares, once for the first chunk's layers, but with messages none.
    """
    of_first = lambda: self.shares.gather(self.shares.at(slice(_num_layers(self.layers, table))))
    num_layers = len(jax.tree.leaves(self.layers)[0])
    whole = lambda leaf: jax.ShapeDtypeStruct((num_layers, *leaf.shape[1:]), leaf.dtype)
    stacks = collectives.zeros_like([whole(leaf) for leaf in jax.eval_shape(of_first)])
    if self.in_messages:
      return stacks, ()
    return [buffers.put(s, (), leaf) for s, leaf in zip(stacks, of_first(), strict=True)], ()

  def first(self, table: Table) -> jax.Array:
    """Returns the numbers of the first chunk's layers."""
    numbers = jnp.arange(_num_layers(self.layers, table), dtype=jnp.int32)
    return collectives.varying(numbers)

  def take(
    self, number: jax.Array, place: int, coming: Coming, ring: list
  ) -> tuple[Tree, list, list]:
    """Returns a layer's weights, the ring, which may be written only now, and this device's shares
    of those of the layer to come.

    Args:
      number: of the layer.
      place: of the layer in its unit.
      coming: of the unit.
      ring: all layers' weights.
    """
    taken, ring = jax.lax.optimization_barrier((buffers.at(ring, number), ring))
    shares = self.shares.at(coming.layers[place]) if coming else []
    return self.shares.layer(number, taken), ring, shares

  def put(self, place: int, coming: Coming, ring: list, gathered: list) -> list:
    """Returns the ring with what was gathered."""
    if not coming:
      return ring
    number = coming.layers[place]
    return [buffers.put(leaf, number, new) for leaf, new in zip(ring, gathered, strict=True)]

  def send(self, layers: jax.Array) -> tuple[Tree, jax.Array]:
    """Returns the weights of layers that follow each other, as they arrive, and those numbers.

    Communication: that of the shares, as far as it is between copies.
    """
    return self.shares.whole.send(self.several(layers)), layers

  def put_landed(self, landed: tuple[Tree, jax.Array], ring: list) -> list:
    """Returns the ring with what `send` returned.

    Communication: the rest of that of the shares.
    """
    arrived, layers = landed
    like = jax.eval_shape(lambda: self.several(layers))
    whole = self.shares.whole.open(arrived, like)
    return [buffers.put(leaf, (layers[0],), new) for leaf, new in zip(ring, whole, strict=True)]

  def several(self, layers: jax.Array) -> list[jax.Array]:
    """Returns this device's shares of layers that follow each other."""
    return self.shares.several(layers[0], len(layers))

  def arrived(self, ring: list) -> Whole:
    """Returns the weights when all have come."""
    return Whole(self.shares.joined(ring))


@dataclasses.dataclass(frozen=True)
class Streamed(_InShares):
  """Weights in shares, gathered a few layers ahead of each use.

  Attributes:
    shares: of the layers.
    ahead: layers of a ring.
  """

  ahead: int

  def coming(self, table: Table, stage: jax.Array) -> tuple[Coming, Coming]:
    """Returns what forward and backward units gather in each tick, leaves [ticks, ...]."""
    num_layers = _num_layers(self.layers, table)
    found = []
    for order_P, runs_Q in self._orders(table):
      num_places = len(order_P)
      later_P = np.minimum(np.arange(num_places) + self.ahead, num_places - 1)
      first_Q = np.where(runs_Q, np.cumsum(runs_Q) - 1, 0) * num_layers
      layers_QLZ = order_P[later_P][first_Q[:, None] + np.arange(num_layers)]
      slot_Q = jnp.asarray(first_Q % self.ahead, jnp.int32)
      found.append(Coming(slot_Q, jnp.asarray(layers_QLZ, jnp.int32)[..., stage]))
    forward, backward = found
    return forward, backward

  def start(self, table: Table, stage: jax.Array) -> tuple[list, list]:
    """Returns the rings of both directions before the first tick, leaves [layers of a ring, ...].

    Communication: that of the gathers, for each layer of each ring.
    """
    found = []
    for order_P, _ in self._orders(table):
      first = np.minimum(np.arange(self.ahead), len(order_P) - 1)
      numbers = jnp.asarray(order_P[first], jnp.int32)[:, stage]
      each = [self.shares.gather(self.shares.at(numbers[i])) for i in range(self.ahead)]
      found.append([jnp.stack(leaves) for leaves in zip(*each, strict=True)])
    forward, backward = found
    return forward, backward

  def take(
    self, number: jax.Array, place: int, coming: Coming, ring: list
  ) -> tuple[Tree, list, list]:
    """Returns a layer's weights out of the ring, the ring, which may be written only now, and this
    device's shares of those of the layer to come.

    Args:
      number: of the layer.
      place: of the layer in its unit, in the order in which they run.
      coming: of the unit.
      ring: of its direction.
    """
    taken = buffers.at(ring, self._slot(place, coming))
    # XLA does not order a read before a write that does not need it, and would copy the ring.
    taken, ring = jax.lax.optimization_barrier((taken, ring))
    return self.shares.layer(number, taken), ring, self.shares.at(coming.layers[place])

  def put(self, place: int, coming: Coming, ring: list, gathered: list) -> list:
    """Returns the ring with what was gathered, where `take` took."""
    slot = self._slot(place, coming)
    return [buffers.put(leaf, slot, new) for leaf, new in zip(ring, gathered, strict=True)]

  def _slot(self, place: int, coming: Coming) -> jax.Array:
    return (coming.slot + place) % self.ahead

  def _orders(self, table: Table) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns, of forward and of backward units, the layers in the order in which each stage runs
    them, [places, stages], and which ticks have such a unit on any stage, bool [ticks].
    """
    of_chunk = np.arange(_num_layers(self.layers, table))
    found = []
    for micro_QZ, chunk_QZ, order in (
      (table.forward_micro_QZ, table.forward_chunk_QZ, of_chunk),
      (table.backward_micro_QZ, table.backward_chunk_QZ, of_chunk[::-1]),
    ):
      runs_Q = (micro_QZ >= 0).any(1)
      first_QZ = np.maximum(chunk_QZ[runs_Q], 0) * len(of_chunk)
      numbers_QLZ = first_QZ[:, None, :] + order[None, :, None]
      found.append((numbers_QLZ.reshape(-1, chunk_QZ.shape[1]), runs_Q))
    return found


def _num_layers(layers: Tree, table: Table) -> int:
  """Returns the layers of a chunk."""
  return jax.tree.leaves(layers)[0].shape[0] // table.num_chunks


class Outside(NamedTuple):
  """Parameters outside the layers, of which some lie in shares.

  Those that heads alone read may be late: they come before the first head, beside the forward units
  that it waits for, and their gradients leave behind the last one, beside its backward unit.

  Attributes:
    tree: whole, or this device's share.
    first: what makes whole those that are needed at once.
    late: what makes whole those that are not.
    summed: what sums gradients into shares, of those that are late.
    beside: what `first` does, in one message with arrays of layers: (arrays of `first`, those) ->
      what `first` makes, and what arrives as `Shares.whole` sends it.
  """

  tree: Tree
  first: Together
  late: Together
  summed: Together
  beside: Callable[[list, list], tuple[list, Tree]]

  def before(self) -> Tree:
    """Returns the tree as long as no head has run: zeros, which nothing reads, for what is late.

    Communication: that of `first`.
    """
    return self._before(self.first.run(self.first.of(self.tree)))

  def before_beside(self, of_layers: list) -> tuple[Tree, Tree]:
    """Returns the same, and what arrives of arrays of layers.

    Communication: that of `beside`.
    """
    first, arrived = self.beside(self.first.of(self.tree), of_layers)
    return self._before(first), arrived

  def _before(self, first: list) -> Tree:
    made = jax.eval_shape(self.late.run, self.late.of(self.tree))
    return self.late.put(self.first.put(self.tree, first), collectives.zeros_like(made))

  def come(self, before: Tree, after: Tree) -> tuple[Tree, Tree]:
    """Returns the whole tree, and `after`, what the ticks before left for those to come: messages
    leave only then.

    Args:
      before: the tree till now.

    Communication: that of `late`.
    """
    late = self.late.of(self.tree)
    late, after = jax.lax.optimization_barrier((collectives.after(after, late), after))
    whole = self.late.put(before, self.late.run(late))
    return whole, collectives.after(whole, after)

  def leave(self, gradients: Tree, after: Tree) -> tuple[Tree, Tree]:
    """Returns the gradients, of what was late this device's share of the sum, and `after`, what is
    left for the ticks to come, which waits for them.

    Communication: that of `summed`.
    """
    gradients, after = jax.lax.optimization_barrier((self.summed.of_tree(gradients), after))
    return gradients, collectives.after(gradients, after)
