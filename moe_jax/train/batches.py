"""Host batches on the mesh: the same global arrays, however many processes hold the devices.

Knows batches and meshes; must not know what a step computes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.model.transformer import Inputs
from moe_jax.parallel.axes import ALL
from moe_jax.train import step
from moe_jax.train.data import Batch

# Fields of a Batch in the order of Inputs.
_FIELDS = ("tokens", "targets", "positions", "segments", "weights")


def place(batch: Batch, settings: config.Config, mesh: Mesh) -> Inputs:
  """Returns the batch on the devices, leaves [U, B / U, S]: micro-batch u is rows u * B / U and on.

  Args:
    batch: the whole global batch, arrays [B, S]; each process reads only its devices' rows of it.
  """
  split = (settings.pipeline.micro_batches, -1, settings.train.sequence)
  put = lambda values, spec: _put(values.reshape(split), NamedSharding(mesh, spec))
  return Inputs(*map(put, (batch[name] for name in _FIELDS), step.inputs_spec()))


def abstract(settings: config.Config, mesh: Mesh) -> Inputs:
  """Returns the shapes, dtypes and shardings of what `place` returns."""
  train, micro_batches = settings.train, settings.pipeline.micro_batches
  shape = (micro_batches, train.batch // micro_batches, train.sequence)
  dtypes = Inputs(*[jnp.int32] * 4, jnp.float32)
  struct = lambda dtype, spec: jax.ShapeDtypeStruct(
    shape, dtype, sharding=NamedSharding(mesh, spec)
  )
  return Inputs(*map(struct, dtypes, step.inputs_spec()))


def any_process(wish: bool, mesh: Mesh) -> jax.Array:
  """Returns, on every device, whether any process has the wish; returns before it is computed.

  Communication: all-reduce of one boolean over all axes.
  """
  wishes_N = np.full(mesh.size, wish)
  return _any(mesh)(_put(wishes_N, NamedSharding(mesh, P(ALL))))


@functools.cache
def _any(mesh: Mesh):
  return jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))


def _put(values: np.ndarray, sharding: NamedSharding) -> jax.Array:
  return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
