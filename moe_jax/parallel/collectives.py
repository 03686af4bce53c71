"""Communication inside the manual region: each function names its axis and what it sends.

Every function takes and returns this device's part. Elements sent are counted per device, for an
axis of n devices, as the ring or direct algorithm moves them: what a link carries. This module
knows axes and arrays; it must not know tokens, experts or stages.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

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


def varying_along(tree, axis_name: str):
  """Returns `tree` typed as different along one axis."""
  return _cast(tree, (axis_name,))


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
  """Returns the parts of all devices along `axis_name`, joined at `dimension`; counted from the
  last one where it is negative.

  Communication: all-gather over `axis_name`, (n - 1) * x.size elements.
  """
  if jax.lax.axis_size(axis_name) == 1:
    return x
  return jax.lax.all_gather(x, axis_name, axis=dimension % x.ndim, tiled=True)


def stack(x, axis_names: tuple[str, ...]):
  """Returns `x` of all devices along the axes, the first axis major, stacked before its own
  dimensions.

  Communication: all-gather over the axes, (n - 1) * x.size elements, n devices along all of them.
  """
  if math.prod(jax.lax.axis_size(name) for name in axis_names) == 1:
    return x[None]
  return jax.lax.all_gather(x, axis_names)


def reduce_scatter(x, axis_name: str, dimension: int):
  """Returns this device's piece, along `dimension`, counted as `gather` does, of the sum over
  `axis_name`.

  Communication: reduce-scatter over `axis_name`, (n - 1) / n * x.size elements.
  """
  if jax.lax.axis_size(axis_name) == 1:
    return x
  return jax.lax.psum_scatter(x, axis_name, scatter_dimension=dimension % x.ndim, tiled=True)


def exchange(x_n, axis_name: str):
  """Returns what every device along `axis_name` addressed to this one: row i comes from device i.

  Args:
    x_n: rows addressed to each device, [n, ...].

  Communication: all-to-all over `axis_name`, (n - 1) / n * x.size elements.
  """
  if jax.lax.axis_size(axis_name) == 1:
    return x_n
  return jax.lax.all_to_all(x_n, axis_name, split_axis=0, concat_axis=0, tiled=True)


def exchange_between_hosts(x_H, axis_name: str, ranks_per_host: int):
  """Returns what the devices of this one's place on every host addressed to it: row i comes from
  host i.

  Args:
    x_H: rows addressed to each host, [H, ...], H hosts of `ranks_per_host` consecutive devices.

  Communication: all-to-all over `axis_name`, (H - 1) / H * x.size elements.
  """
  num_ranks = jax.lax.axis_size(axis_name)
  rails = [list(range(place, num_ranks, ranks_per_host)) for place in range(ranks_per_host)]
  return _exchange_among(x_H, axis_name, rails)


def exchange_inside_host(x_G, axis_name: str, ranks_per_host: int):
  """Returns what every device of this host addressed to this one: row i comes from device i.

  Args:
    x_G: rows addressed to each device, [G, ...]; the G = `ranks_per_host` devices of a host are
      consecutive.

  Communication: all-to-all over `axis_name`, (G - 1) / G * x.size elements.
  """
  firsts = range(0, jax.lax.axis_size(axis_name), ranks_per_host)
  hosts = [list(range(first, first + ranks_per_host)) for first in firsts]
  return _exchange_among(x_G, axis_name, hosts)


def _exchange_among(x_n, axis_name, groups):
  if len(groups[0]) == 1:
    return x_n
  return jax.lax.all_to_all(
    x_n, axis_name, split_axis=0, concat_axis=0, axis_index_groups=groups, tiled=True
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def exchange_filled(x_nB, sent_n, received_n, axis_name: str):
  """Returns what every device along `axis_name` addressed to this one; rows that were not sent are
  zero.

  Where the platform can, only filled rows travel; elsewhere all do, with equal results.

  Args:
    x_nB: rows addressed to each device, [n, B, ...], the first `sent_n` of each filled.
    sent_n: how many are, int32.
    received_n: how many each device addressed to this one, int32.

  Communication: all-to-all over `axis_name`, (n - 1) / n * x.size elements; where the platform has
  it, instead, ragged-all-to-all over `axis_name`, as many elements at most.
  """
  return jax.lax.platform_dependent(
    x_nB,
    sent_n,
    received_n,
    **{name: functools.partial(f, axis_name=axis_name) for name, f in _EXCHANGE_FILLED.items()},
  )


def _exchange_filled_forward(x_nB, sent_n, received_n, axis_name):
  return exchange_filled(x_nB, sent_n, received_n, axis_name), (sent_n, received_n)


def _exchange_filled_backward(axis_name, saved, gradient_nB):
  sent_n, received_n = saved
  nothing = np.zeros(sent_n.shape, jax.dtypes.float0)
  return exchange_filled(gradient_nB, received_n, sent_n, axis_name), nothing, nothing


exchange_filled.defvjp(_exchange_filled_forward, _exchange_filled_backward)


def _exchange_all(x_nB, sent_n, received_n, axis_name):
  del sent_n
  x_nB = exchange(x_nB, axis_name)
  is_filled_nB = jnp.arange(x_nB.shape[1], dtype=jnp.int32)[None, :] < received_n[:, None]
  is_filled = is_filled_nB.reshape(*is_filled_nB.shape, *[1] * (x_nB.ndim - 2))
  return jnp.where(is_filled, x_nB, jnp.zeros((), x_nB.dtype))


def _exchange_ragged(x_nB, sent_n, received_n, axis_name):
  num_devices, num_rows = x_nB.shape[:2]
  rows = x_nB.reshape(num_devices * num_rows, *x_nB.shape[2:])
  first_n = jnp.arange(num_devices, dtype=jnp.int32) * num_rows
  mine_n = jnp.full_like(first_n, num_rows) * jax.lax.axis_index(axis_name)
  received = jax.lax.ragged_all_to_all(
    rows,
    varying_like(jnp.zeros_like(rows), rows),
    varying_like(first_n, rows),
    sent_n,
    varying_like(mine_n, rows),
    received_n,
    axis_name=axis_name,
  )
  return received.reshape(x_nB.shape)


# By platform, as `jax.lax.platform_dependent` names them. XLA:CPU has no ragged-all-to-all.
_EXCHANGE_FILLED = {"cuda": _exchange_ragged, "default": _exchange_all}


def sum_small(x, axis_names: tuple[str, ...]):
  """Returns the sum of `x` over the axes, of an array so small that only latency counts.

  One direct message to each device along each axis, where an all-reduce goes from one to the next:
  24 us against 40 us over 8 hosts x 4 GPUs by NCCL's own formulas.

  Communication: all-to-all over each axis, (n - 1) * x.size elements.
  """
  return _reduce_small(x, axis_names, lambda x_n: x_n.sum(0, dtype=x.dtype))


def max_small(x, axis_names: tuple[str, ...]):
  """Returns the maximum of `x` over the axes, as `sum_small` does the sum.

  Communication: all-to-all over each axis, (n - 1) * x.size elements.
  """
  return _reduce_small(x, axis_names, lambda x_n: x_n.max(0))


def _reduce_small(x, axis_names, reduce):
  for name in axis_names:
    copies = jnp.broadcast_to(x[None], (jax.lax.axis_size(name), *x.shape))
    x = reduce(exchange(varying_along(copies, name), name))
  return x


def after(first, then):
  """Returns `then`, on XLA:CPU as values that wait for `first`.

  There a loop runs beside whatever needs nothing of it, and each device starts the collectives of
  both in an order of its own: they hang, or meet another's. Between a loop with collectives and
  another collective there must be an array that one makes and the other needs.

  Args:
    first, then: trees of arrays; `then` comes out varying along the axes along which `first` is.
  """
  leaves = [leaf for leaf in jax.tree.leaves(first) if leaf.size]
  if not leaves:
    return then
  names = tuple({name: None for leaf in leaves for name in _varies_over(leaf)})
  if jax.sharding.get_abstract_mesh().size == 1:
    return _cast(then, names)  # nothing is sent
  zero = lambda *_: _cast(jnp.zeros((), jnp.int32), names)
  nothing = jax.lax.platform_dependent(*leaves, cpu=_nothing, default=zero)
  return jax.tree.map(lambda leaf: leaf + nothing.astype(leaf.dtype), then)


def _nothing(*leaves):
  # Nothing times a float may be NaN, so XLA cannot know that this is 0; as an integer it is.
  first = [leaf.ravel()[0].astype(jnp.float32) for leaf in leaves]
  return sum((0 * x).astype(jnp.int32) for x in first)


def shift(tree, axis_name: str, by: int):
  """Returns what the device `by` places before this one on the ring of `axis_name` holds.

  Communication: collective-permute over `axis_name`, the size of `tree` in elements.
  """
  size = jax.lax.axis_size(axis_name)
  if size == 1:
    return tree
  ring = [(i, (i + by) % size) for i in range(size)]
  return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis_name, ring), tree)


def shift_both(ahead, back, axis_name: str):
  """Returns what the device before this one on the ring of `axis_name` holds as `ahead`, and what
  the one behind it holds as `back`.

  Two devices are each other's neighbour on either side: one message carries both, where mostly it
  is latency that counts.

  Args:
    ahead, back: trees of one structure, shapes and dtypes; None where nothing goes that way.

  Communication: collective-permute over `axis_name`, the size of each tree in elements, of two
  devices in one.
  """
  if ahead is None or back is None or jax.lax.axis_size(axis_name) != 2:
    return shift(ahead, axis_name, +1), shift(back, axis_name, -1)
  joined = jax.tree.map(lambda one, other: jnp.stack([one, other]), ahead, back)
  arrived = shift(joined, axis_name, +1)
  return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], arrived) for i in (0, 1))


def broadcast_from(tree, axis_name: str, index: int):
  """Returns, on every device of `axis_name`, what device `index` holds.

  Communication: all-reduce over `axis_name`, 2 * (n - 1) / n times the size of `tree` in elements.
  """
  here = jax.lax.axis_index(axis_name) == index
  return jax.tree.map(
    lambda leaf: jax.lax.psum(jnp.where(here, leaf, jnp.zeros_like(leaf)), axis_name), tree
  )
