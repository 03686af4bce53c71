"""A stage's gradients, summed over the ranks that hold a parameter alike.

Those of a chunk that leaves (`ends.leaving`) are summed layer by layer beside the last ticks, what
is left when all ticks are over. Knows stacks of layers; must not know ticks, or which axes a sum is
over.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from moe_jax.parallel import collectives
from moe_jax.pipeline import buffers, ends
from moe_jax.pipeline.table import Table

Tree = Any
Reduce = Callable[[jax.Array], jax.Array]


class Reduction(NamedTuple):
  """Which gradients are summed, and when.

  Attributes:
    reduces: of each leaf, what sums a layer's, or those of several stacked; None where it is this
      device's own, or summed elsewhere.
    num_left: layers, from the first on, that are summed when all ticks are over; None if all are.
  """

  reduces: Sequence[Reduce | None]
  num_left: int | None

  @classmethod
  def of(cls, reduces: Sequence[Reduce | None], table: Table, layers_per_chunk: int) -> "Reduction":
    """Returns that of a schedule."""
    some_leave = any(reduces) and bool((ends.leaving(table) >= 0).any())
    return cls(reduces, layers_per_chunk if some_leave else None)

  def of_layers(self, g_layers: Tree, number: jax.Array | slice) -> list[jax.Array]:
    """Returns the gradients of a layer, or of several, that are to be summed."""
    leaves = jax.tree.leaves(g_layers)
    return [leaf[number] for reduce, leaf in zip(self.reduces, leaves, strict=True) if reduce]

  def of_chunk(self, g_layers: Tree, first: jax.Array, number: int) -> list[jax.Array]:
    """Returns the same of so many layers that follow each other, stacked."""
    leaves = jax.tree.leaves(g_layers)
    mine = [leaf for reduce, leaf in zip(self.reduces, leaves, strict=True) if reduce]
    return buffers.several(mine, first, number)

  def summed(self, gradients: list[jax.Array]) -> list[jax.Array]:
    """Returns what `of_layers` gave, summed.

    Communication: that of `reduces`.
    """
    present = filter(None, self.reduces)
    return [reduce(leaf) for reduce, leaf in zip(present, gradients, strict=True)]

  def start(self, g_layers: Tree) -> list[jax.Array]:
    """Returns room for the sums of layers that leave; none if none does.

    Args:
      g_layers: shapes, [layers of this stage, ...].
    """
    if self.num_left is None:
      return []
    of_all = lambda tree: self.of_layers(collectives.varying(tree), slice(None))
    return collectives.zeros_like(jax.eval_shape(lambda tree: self.summed(of_all(tree)), g_layers))

  def finish(self, g_layers: Tree, sums: list[jax.Array]) -> Tree:
    """Returns all gradients, those that are to be summed in their sums' place.

    Args:
      g_layers: [layers of this stage, ...].
      sums: as `start` made them, with those of the layers that left.

    Communication: that of `reduces`.
    """
    left = self.summed(self.of_layers(g_layers, slice(self.num_left)))
    put = lambda leaf, new: buffers.put(leaf, (), new)
    found = iter(left if self.num_left is None else [*map(put, sums, left)])
    leaves, tree = jax.tree.flatten(g_layers)
    of_leaf = zip(self.reduces, leaves, strict=True)
    return jax.tree.unflatten(tree, [next(found) if reduce else leaf for reduce, leaf in of_leaf])
