"""A stage's gradients, summed over the ranks that hold a parameter alike.

Those of a chunk that leaves (`ends.leaving`) are summed layer by layer beside the last ticks. What
is left when all ticks are over is for whoever has more to sum then. Knows stacks of layers; must
not know ticks, or which axes a sum is over.
"""

from typing import Any, NamedTuple

import jax

from moe_jax.parallel import collectives
from moe_jax.pipeline import buffers, ends
from moe_jax.pipeline.table import Table
from moe_jax.pipeline.together import Together

Tree = Any


class Reduction(NamedTuple):
  """Which gradients are summed, and when.

  Attributes:
    sums: what sums a layer's gradients, or those of several stacked; others are this device's own,
      or summed elsewhere.
    num_left: layers, from the first on, that are left when all ticks are over; None if all are.
  """

  sums: Together
  num_left: int | None

  @classmethod
  def of(cls, sums: Together, table: Table, layers_per_chunk: int) -> "Reduction":
    """Returns that of a schedule."""
    some_leave = sums.are_any and bool((ends.leaving(table) >= 0).any())
    return cls(sums, layers_per_chunk if some_leave else None)

  def of_layers(self, g_layers: Tree, number: jax.Array | slice) -> list[jax.Array]:
    """Returns the gradients of a layer, or of several, that are to be summed."""
    return [leaf[number] for leaf in self.sums.of(g_layers)]

  def of_chunk(self, g_layers: Tree, first: jax.Array, number: int) -> list[jax.Array]:
    """Returns the same of so many layers that follow each other, stacked."""
    return buffers.several(self.sums.of(g_layers), first, number)

  def summed(self, gradients: list[jax.Array]) -> list[jax.Array]:
    """Returns what `of_layers` gave, summed.

    Communication: that of `sums`.
    """
    return self.sums.run(gradients)

  def start(self, g_layers: Tree) -> list[jax.Array]:
    """Returns room for the sums of layers that leave; none if none does.

    Args:
      g_layers: shapes, [layers of this stage, ...].
    """
    if self.num_left is None:
      return []
    of_all = lambda tree: self.of_layers(collectives.varying(tree), slice(None))
    return collectives.zeros_like(jax.eval_shape(lambda tree: self.summed(of_all(tree)), g_layers))

  def finish(self, g_layers: Tree, sums: list[jax.Array]) -> tuple[Tree, list[jax.Array]]:
    """Returns all gradients, of layers that left their sums, and of those that are to be summed
    what is left, [layers, ...].

    Args:
      g_layers: [layers of this stage, ...].
      sums: as `start` made them, with those of the layers that left.
    """
    left = self.of_layers(g_layers, slice(self.num_left))
    return g_layers if self.num_left is None else self.sums.put(g_layers, sums), left


def completed(sums: Together, g_layers: Tree, left: list[jax.Array]) -> Tree:
  """Returns what `Reduction.finish` did, complete.

  Args:
    sums: of the reduction.
    g_layers: as it returned them.
    left: what it left, summed.
  """
  are_all = lambda leaf, new: len(leaf) == len(new)
  put = lambda leaf, new: new if are_all(leaf, new) else buffers.put(leaf, (), new)
  return sums.put(g_layers, map(put, sums.of(g_layers), left))
