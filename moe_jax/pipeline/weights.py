"""The weights of a stage's layers: whole, or in shares, gathered a few layers ahead (ZeRO-3).

The layers that a stage runs forwards, tick after tick, are a sequence that the schedule's table
knows, and so are those that it runs backwards. A ring holds the next few layers of each whole. A
layer takes its weights out of the ring and puts there, gathered, those of the layer that comes as
many layers later as the ring is long: nothing in between waits for them. An idle cell takes and
gathers as if it ran its first chunk: the program of all stages is one.

Source: ZeRO (arXiv:1910.02054), section 5.3: parameters are split over the data-parallel ranks, and
those of a layer are gathered where it is used.

Knows tables and trees; must not know which weights lie in shares, or along which axis.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.pipeline import buffers
from moe_jax.pipeline.table import Table

Tree = Any


class Coming(NamedTuple):
  """What a unit gathers beside its layers.

  Attributes:
    slot: of the ring, where the weights of the unit's first layer wait.
    layers: [layers of a chunk] which layer's weights take the place of those that are used up.
  """

  slot: jax.Array
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


class Streamed(NamedTuple):
  """Weights of which some lie in shares.

  Attributes:
    layers: [layers of this stage, ...], whole or this device's share.
    gathers: of each leaf, what makes a layer's share the whole; None where it is whole.
    ahead: layers of a ring.
  """

  layers: Tree
  gathers: Sequence[Callable[[jax.Array], jax.Array] | None]
  ahead: int

  def layer(self, number: jax.Array | int) -> Tree:
    """Returns a layer's weights, gathered now.

    Communication: that of the gathers.
    """
    return self._with(number, self._gathered(number))

  def coming(self, table: Table, stage: jax.Array) -> tuple[Coming, Coming]:
    """Returns what forward and backward units gather in each tick, leaves [ticks, ...]."""
    num_layers = self._num_layers(table)
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
      each = [self._gathered(numbers[i]) for i in range(self.ahead)]
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
    return self._with(number, taken), ring, self._shares(coming.layers[place])

  def gather(self, shares: list) -> list:
    """Returns whole what `take` gave.

    Communication: that of the gathers.
    """
    present = filter(None, self.gathers)
    return [gather(share) for gather, share in zip(present, shares, strict=True)]

  def put(self, place: int, coming: Coming, ring: list, gathered: list) -> list:
    """Returns the ring with what was gathered, where `take` took."""
    slot = self._slot(place, coming)
    return [buffers.put(leaf, slot, new) for leaf, new in zip(ring, gathered, strict=True)]

  def _slot(self, place: int, coming: Coming) -> jax.Array:
    return (coming.slot + place) % self.ahead

  def _shares(self, number: jax.Array | int) -> list[jax.Array]:
    """Returns those weights of a layer that lie in shares."""
    leaves = jax.tree.leaves(self.layers)
    return [leaf[number] for gather, leaf in zip(self.gathers, leaves, strict=True) if gather]

  def _gathered(self, number: jax.Array | int) -> list[jax.Array]:
    return self.gather(self._shares(number))

  def _with(self, number: jax.Array | int, gathered: list[jax.Array]) -> Tree:
    leaves, tree = jax.tree.flatten(self.layers)
    given = iter(gathered)
    whole = [
      next(given) if gather else leaf[number]
      for gather, leaf in zip(self.gathers, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, whole)

  def _num_layers(self, table: Table) -> int:
    return jax.tree.leaves(self.layers)[0].shape[0] // table.num_chunks

  def _orders(self, table: Table) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns, of forward and of backward units, the layers in the order in which each stage runs
    them, [places, stages], and which ticks have such a unit on any stage, bool [ticks].
    """
    of_chunk = np.arange(self._num_layers(table))
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
