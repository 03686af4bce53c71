"""Communication inside the manual region: each function names its axis and what it sends.

Every function takes and returns this device's part. Elements sent are counted per device, for an
axis of n devices, as the ring or direct algorithm moves them: what a link carries. This module
knows axes and arrays; it must not know tokens, experts or stages.
"""

import jax
import jax.numpy as jnp

from moe_jax.parallel import axes


def varying(tree):
  """Returns `tree` typed as different on every device, which carries of loops must be.

  Parameters pass through here once, at the mouth of the region: their gradients then come out as
  this device's own share, to be summed once per step, where the type checker would otherwise place
  an all-reduce behind every use, inside the loops.
  """

  return _cast(tree, axes.ALL)


def varying_like(tree, like: jax.Array):
  """Returns `tree` typed as different along the axes along which `like` is (outside a region:
  none).
  """
  return _cast(tree, _varies_over(like))


def _cast(tree, names):
  def cast(leaf):
    missing = tuple(name for name in names if name not in _varies_over(leaf))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

  return jax.tree.map(cast, tree)


def _varies_over(x) -> tuple[str, ...]:
  return tuple(jax.typeof(x).manual_axis_type.varying)


def zeros_like(tree):
  """Returns zeros of the shapes and dtypes of `tree` (arrays or structs), varying over every
  axis.
  """
  return varying(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree))


def gather(x, axis_name: str, dimension: int):
  """Returns the parts of all devices along `axis_name`, joined at `dimension`.

  Communication: all-gather over `axis_name`, (n - 1) * x.size elements.
  """
  if jax.lax.axis_size(axis_name) == 1:
    return x
  return jax.lax.all_gather(x, axis_name, axis=dimension, tiled=True)


def reduce_scatter(x, axis_name: str, dimension: int):
  """Returns this device's piece, along `dimension`, of the sum over `axis_name`.

  Communication: reduce-scatter over `axis_name`, (n - 1) / n * x.size elements.
  """
  if jax.lax.axis_size(axis_name) == 1:
    return x
  return jax.lax.psum_scatter(x, axis_name, scatter_dimension=dimension, tiled=True)


def exchange(x_n, axis_name: str):
  """Returns what every device along `axis_name` addressed to this one: row i comes from device i.

  Args:
    x_n: rows addressed to each device, [n, ...].

  Communication: all-to-all over `axis_name`, (n - 1) / n * x.size elements.
  """
  if jax.lax.axis_size(axis_name) == 1:
    return x_n
  return jax.lax.all_to_all(x_n, axis_name, split_axis=0, concat_axis=0, tiled=True)


def shift(tree, axis_name: str, by: int):
  """Returns what the device `by` places before this one on the ring of `axis_name` holds.

  Communication: collective-permute over `axis_name`, the size of `tree` in elements.
  """
  size = jax.lax.axis_size(axis_name)
  if size == 1:
    return tree
  ring = [(i, (i + by) % size) for i in range(size)]
  return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis_name, ring), tree)


def broadcast_from(tree, axis_name: str, index: int):
  """Returns, on every device of `axis_name`, what device `index` holds.

  Communication: all-reduce over `axis_name`, 2 * (n - 1) / n times the size of `tree` in elements.
  """
  here = jax.lax.axis_index(axis_name) == index
  return jax.tree.map(
    lambda leaf: jax.lax.psum(jnp.where(here, leaf, jnp.zeros_like(leaf)), axis_name), tree
  )


def share(x):
  """Returns this device's share of `x`, which is the same along some axes: the shares sum to it
  once.
  """
  same = [name for name in axes.ALL if name not in _varies_over(x)]
  copies = 1
  for name in same:
    copies *= jax.lax.axis_size(name)
  return varying(x / copies)
