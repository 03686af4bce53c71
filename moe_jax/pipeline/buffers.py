"""Trees of arrays that are indexed by their first dimension: what ticks hand to each other by slot.

Must not know what the arrays hold.
"""

from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
Place = jax.Array | int | tuple[jax.Array | int, ...]


def at(tree: Tree, index: jax.Array | int) -> Tree:
  """Returns entry `index` of every leaf."""
  return jax.tree.map(lambda leaf: leaf[index], tree)


def put(array: jax.Array, place: Place, new: jax.Array) -> jax.Array:
  """Returns `array` with `new` at `place`, in place, where `.at[place].set` would guard the place
  against the range, and so read what it writes over.

  Args:
    place: indices of the first dimensions, within the range.
  """
  places = place if isinstance(place, tuple) else (place,)
  new = new.astype(array.dtype)[(None,) * len(places)]
  starts = (*places, *(0,) * (array.ndim - len(places)))
  return jax.lax.dynamic_update_slice(array, new, [jnp.asarray(i, jnp.int32) for i in starts])


def add(array: jax.Array, place: Place, more: jax.Array) -> jax.Array:
  """Returns `array` with `more` added at `place`, as `put` does."""
  return put(array, place, array[place] + more.astype(array.dtype))


def write(tree: Tree, slot: jax.Array, entry: Tree) -> Tree:
  """Returns `tree` with `entry` at `slot`; a slot of -1 writes nothing."""
  place = jnp.maximum(slot, 0)
  keep = lambda leaf, new: put(leaf, place, jnp.where(slot >= 0, new, leaf[place]))
  return jax.tree.map(keep, tree, entry)


def select(condition: jax.Array, on_true: Tree, on_false: Tree) -> Tree:
  """Returns one of two trees by a scalar."""
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def stacked(tree: Tree, *sizes: int) -> Tree:
  """Returns the shapes of `tree` with dimensions of these sizes before its own."""
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*sizes, *leaf.shape), leaf.dtype), tree)
