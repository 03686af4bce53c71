"""Trees of arrays that are indexed by their first dimension: what ticks hand to each other by slot.

Must not know what the arrays hold.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
Place = jax.Array | int | tuple[jax.Array | int, ...]


def at(tree: Tree, index: jax.Array | int) -> Tree:
  """Returns entry `index` of every leaf."""
  return jax.tree.map(lambda leaf: leaf[index], tree)


def several(tree: Tree, first: jax.Array, number: int) -> Tree:
  """Returns so many entries of every leaf, from `first` on."""
  return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, number), tree)


def put(array: jax.Array, place: Place, new: jax.Array) -> jax.Array:
  """Returns `array` with `new` at `place`, in place, where `.at[place].set` would guard the place
  against the range, and so read what it writes over.

  Args:
    place: indices of the first dimensions, within the range; of none, `new` may be smaller and
      lies at the beginning.
  """
  starts = _starts(array, place)
  new = new.astype(array.dtype)[(None,) * (array.ndim - new.ndim)]
  return jax.lax.dynamic_update_slice(array, new, starts)


def add(array: jax.Array, place: Place, more: jax.Array) -> jax.Array:
  """Returns `array` with `more` added at `place`, as `put` does.

  Gradients in bfloat16 are added to sums in float32. XLA:GPU would cut the sum's slice out as soon
  as it can, with whatever is indexed likewise, and copy it: so it waits for what is added, and what
  is read and what is written has one shape, for one kernel to add in place.
  """
  if more.dtype == array.dtype:
    return put(array, place, array[place] + more)
  more, place = jax.lax.optimization_barrier((more, place))
  starts = _starts(array, place)
  more = more.astype(array.dtype)[(None,) * (array.ndim - more.ndim)]
  old = jax.lax.dynamic_slice(array, starts, more.shape)
  return jax.lax.dynamic_update_slice(array, old + more, starts)


def _starts(array: jax.Array, place: Place) -> list[jax.Array]:
  """Returns where the slice at `place` begins, in every dimension."""
  places = place if isinstance(place, tuple) else (place,)
  return [jnp.asarray(i, jnp.int32) for i in (*places, *(0,) * (array.ndim - len(places)))]


def write(tree: Tree, slot: jax.Array, entry: Tree) -> Tree:
  """Returns `tree` with `entry` at `slot`; a slot of -1 writes nothing."""
  place = jnp.maximum(slot, 0)
  keep = lambda leaf, new: put(leaf, place, jnp.where(slot >= 0, new, leaf[place]))
  return jax.tree.map(keep, tree, entry)


def select(condition: jax.Array, on_true: Tree, on_false: Tree) -> Tree:
  """Returns one of two trees by a scalar."""
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def packed(tree: Tree) -> list[jax.Array]:
  """Returns the leaves flat and joined, an array for each dtype: many small ones are then added to
  in one kernel, where each would take one of its own.
  """
  by_dtype: dict[str, list[jax.Array]] = {}
  for leaf in jax.tree.leaves(tree):
    by_dtype.setdefault(leaf.dtype.name, []).append(leaf.reshape(-1))
  return [jnp.concatenate(leaves) for leaves in by_dtype.values()]


def add_packed(
  totals: list[jax.Array], place: Place, tree: Tree, keep: Callable[[jax.Array], jax.Array]
) -> list[jax.Array]:
  """Returns `totals`, stacked as `packed` makes them, with `keep` of a packed tree added at
  `place`.
  """
  return [add(total, place, keep(more)) for total, more in zip(totals, packed(tree), strict=True)]


def put_packed(
  arrays: list[jax.Array], place: Place, tree: Tree, runs: jax.Array | None
) -> list[jax.Array]:
  """Returns `arrays`, stacked as `packed` makes them, with a packed tree at `place`, where `runs`;
  None is always.
  """
  keep = lambda new, array: new if runs is None else jnp.where(runs, new, array[place])
  return [
    put(array, place, keep(new, array)) for array, new in zip(arrays, packed(tree), strict=True)
  ]


def unpacked(arrays: list[jax.Array], like: Tree) -> Tree:
  """Returns the tree that `packed` joined.

  Args:
    arrays: as it returned them, or stacked, [..., elements].
    like: shapes of the tree; leaves come out with the leading dimensions of `arrays`.
  """
  leaves, tree = jax.tree.flatten(like)
  names = dict.fromkeys(leaf.dtype.name for leaf in leaves)
  rest = dict(zip(names, arrays, strict=True))
  found = []
  for leaf in leaves:
    array = rest[leaf.dtype.name]
    found.append(array[..., : leaf.size].reshape(*array.shape[:-1], *leaf.shape))
    rest[leaf.dtype.name] = array[..., leaf.size :]
  return jax.tree.unflatten(tree, found)


def stacked(tree: Tree, *sizes: int) -> Tree:
  """Returns the shapes of `tree` with dimensions of these sizes before its own."""
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*sizes, *leaf.shape), leaf.dtype), tree)
