"""Trees of arrays that are indexed by their first dimension: what ticks hand to each other by slot.

Must not know what the arrays hold.
"""

from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def at(tree: Tree, index: jax.Array | int) -> Tree:
  """Returns entry `index` of every leaf."""
  return jax.tree.map(lambda leaf: leaf[index], tree)


def write(tree: Tree, slot: jax.Array, entry: Tree) -> Tree:
  """Returns `tree` with `entry` at `slot`; a slot of -1 writes nothing."""
  place = jnp.maximum(slot, 0)
  keep = lambda leaf, new: leaf.at[place].set(jnp.where(slot >= 0, new, leaf[place]))
  return jax.tree.map(keep, tree, entry)


def select(condition: jax.Array, on_true: Tree, on_false: Tree) -> Tree:
  """Returns one of two trees by a scalar."""
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def stacked(tree: Tree, *sizes: int) -> Tree:
  """Returns the shapes of `tree` with dimensions of these sizes before its own."""
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*sizes, *leaf.shape), leaf.dtype), tree)
