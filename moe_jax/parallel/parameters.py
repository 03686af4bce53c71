"""A parameter is declared once: shape, logical axes, initial scale, and the dtype it computes in.

Also the trees that follow from declarations: specs for the mesh, and the cast to the compute dtype.
Knows logical axes; must not know which parameters a model has.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from moe_jax.parallel import sharding


def parameter(
  rngs: nnx.Rngs,
  shape: tuple[int, ...],
  logical_axes: tuple[str, ...],
  *,
  fan_in: int,
  keep_float32: bool = False,
) -> nnx.Param:
  """Returns a float32 parameter, normal with standard deviation fan_in ** -0.5.

  Args:
    logical_axes: a name of `sharding.RULES` for each dimension.
    keep_float32: compute in float32 whatever the model's dtype (router, norms).
  """
  value = jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5
  return nnx.Param(value, axes=logical_axes, keep_float32=keep_float32)


def scale(shape: tuple[int, ...], logical_axes: tuple[str, ...]) -> nnx.Param:
  """Returns the scale of a norm: ones, float32 also in the computation."""
  return nnx.Param(jnp.ones(shape, jnp.float32), axes=logical_axes, keep_float32=True)


def offset(shape: tuple[int, ...], logical_axes: tuple[str, ...]) -> nnx.Param:
  """Returns what is added and begins as nothing: zeros, float32 also in the computation."""
  return nnx.Param(jnp.zeros(shape, jnp.float32), axes=logical_axes, keep_float32=True)


def specs(state: nnx.State, *leading_axes: str) -> nnx.State:
  """Returns the PartitionSpec of every parameter in `state`.

  Args:
    leading_axes: logical axes of dimensions that stand before the declared ones, such as "layers".
  """

  def of(variable: nnx.Param) -> PartitionSpec:
    return sharding.spec((*leading_axes, *variable.get_metadata("axes")))

  return _map_variables(of, state)


def cast(state: nnx.State, dtype: jnp.dtype) -> nnx.State:
  """Returns `state` in `dtype`, but for the parameters declared `keep_float32`."""

  def of(variable: nnx.Param) -> jax.Array:
    value = variable[...]
    return value if variable.get_metadata("keep_float32") else value.astype(dtype)

  return _map_variables(of, state)


def _map_variables(function, state: nnx.State) -> nnx.State:
  return jax.tree.map(
    lambda variable: variable.replace(function(variable)),
    state,
    is_leaf=lambda node: isinstance(node, nnx.Variable),
  )
