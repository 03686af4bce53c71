"""Parameters on a mesh, taken and filled one tensor at a time.

A parameter stacks the tensors of all layers, and of all experts. A slab is one of those tensors for
each part of a stacked dimension: the devices' parts of it, in the file's order of dimensions, are
what travels between host and devices. Turning, casting and stacking happen on the devices. Knows
arrays on meshes; must not know files or models.
"""

import gc
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


class Part(NamedTuple):
  """What one device, or several with the same, holds of one tensor.

  Attributes:
    stacked: the tensor's place along each stacked dimension.
    slices: of the parameter's other dimensions, in the file's order.
  """

  stacked: tuple[int, ...]
  slices: tuple[slice, ...]


class Slabs:
  """How one parameter is taken apart.

  Args:
    struct: shape, dtype and NamedSharding of the parameter.
    stacked: its dimensions along which tensors are stacked.
    order: its other dimensions, as they follow each other in the file.
  """

  def __init__(
    self, struct: jax.ShapeDtypeStruct, stacked: tuple[int, ...], order: tuple[int, ...]
  ):
    self._struct, self._stacked, self._order = struct, stacked, order
    self._sharding = struct.sharding
    spec = tuple(struct.sharding.spec)
    spec += (None,) * (len(struct.shape) - len(spec))
    self._spec = P(*spec)
    local = struct.sharding.shard_shape(struct.shape)
    self._steps = tuple(local[d] for d in stacked)
    num_parts = (struct.shape[d] // local[d] for d in stacked)
    self._slab_shape = (*num_parts, *(struct.shape[d] for d in order))
    self._slab_spec = P(*(spec[d] for d in (*stacked, *order)))

  def fill(self, read: Callable[[Part], np.ndarray]) -> jax.Array:
    """Returns the parameter, filled part by part; each is on its devices before the next is read.

    Args:
      read: gives a part in any float dtype, the same for all parts, shaped as its slices.
    """
    parameter = jax.jit(
      lambda: jnp.zeros(self._struct.shape, self._struct.dtype), out_shardings=self._sharding
    )()
    write = self._mapped(self._write, (self._spec, self._slab_spec, P()), self._spec, donate=(0,))
    for at in np.ndindex(*self._steps):
      pieces = {}
      for part, devices in self._parts(at):
        gc.collect(0)  # jax lets go of the host's array before only when Python collects
        piece = np.expand_dims(read(part), tuple(range(len(self._stacked))))
        pieces |= {device: jax.device_put(piece, device) for device in devices}
        jax.block_until_ready([pieces[device] for device in devices])
        del piece
      slab = jax.make_array_from_single_device_arrays(
        self._slab_shape,
        NamedSharding(self._sharding.mesh, self._slab_spec),
        [pieces[device] for device in self._sharding.addressable_devices],
      )
      parameter = jax.block_until_ready(write(parameter, slab, self._at(at)))
    return parameter

  def take(self, parameter: jax.Array, dtype: np.dtype) -> Iterator[tuple[Part, np.ndarray]]:
    """Yields each part once, on the host, in `dtype`; the one before it is given up."""
    read = self._mapped(
      lambda parameter, at: self._read(parameter, at, dtype), (self._spec, P()), self._slab_spec
    )
    for at in np.ndindex(*self._steps):
      slab = read(parameter, self._at(at))
      by_device = {shard.device: shard.data for shard in slab.addressable_shards}
      for part, devices in self._parts(at):
        array = by_device[devices[0]]
        yield part, np.asarray(array).reshape(array.shape[len(self._stacked) :])
        array.delete()  # jax keeps the host's copy with the array

  def _parts(self, at: tuple[int, ...]) -> Iterator[tuple[Part, list[jax.Device]]]:
    devices_by_part: dict = {}
    indices = self._sharding.addressable_devices_indices_map(self._struct.shape)
    for device, index in indices.items():
      bounds = tuple(s.indices(n)[:2] for s, n in zip(index, self._struct.shape, strict=True))
      devices_by_part.setdefault(bounds, []).append(device)
    for bounds, devices in devices_by_part.items():
      stacked = tuple(bounds[d][0] + i for d, i in zip(self._stacked, at, strict=True))
      yield Part(stacked, tuple(slice(*bounds[d]) for d in self._order)), devices

  def _at(self, at):
    return np.asarray(at, np.int32).reshape(len(self._stacked))

  def _write(self, parameter, slab, at):
    back = np.argsort((*self._stacked, *self._order))
    piece = jnp.transpose(slab, tuple(map(int, back))).astype(parameter.dtype)
    return jax.lax.dynamic_update_slice(parameter, piece, self._starts(parameter, at))

  def _read(self, parameter, at, dtype):
    sizes = [1 if d in self._stacked else size for d, size in enumerate(parameter.shape)]
    piece = jax.lax.dynamic_slice(parameter, self._starts(parameter, at), sizes)
    return jnp.transpose(piece, (*self._stacked, *self._order)).astype(dtype)

  def _starts(self, parameter, at):
    starts = dict(zip(self._stacked, at, strict=True))
    return [starts.get(d, jnp.int32(0)) for d in range(parameter.ndim)]

  def _mapped(self, function, in_specs, out_specs, donate=()):
    mapped = jax.shard_map(
      function, mesh=self._sharding.mesh, in_specs=in_specs, out_specs=out_specs
    )
    return jax.jit(mapped, donate_argnums=donate)
