"""The state of a training run: what it holds, where it lies, and its order on disk.

Knows the parameter tree and the mesh; must not know how a step computes or how files are written.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.model import transformer
from moe_jax.model.transformer import Parameters
from moe_jax.parallel import sharding


class State(NamedTuple):
  """All that a step changes.

  Attributes:
    step: steps done, int32.
    parameters: master weights, float32; layers in the pipeline's placement order.
    optimizer: optax state; its trees lie as the parameters.
    skipped_steps: steps left out because the loss or gradient was not finite, int32.
    skipped_in_a_row: of those, how many the run ends with, int32.
  """

  step: jax.Array
  parameters: Parameters
  optimizer: optax.OptState
  skipped_steps: jax.Array
  skipped_in_a_row: jax.Array


def create(key: jax.Array, model: config.Model, optimizer: optax.GradientTransformation) -> State:
  """Returns the state of a run that has not begun, layers in logical order."""
  parameters = transformer.init(key, model)
  zero = jnp.zeros((), jnp.int32)
  return State(zero, parameters, optimizer.init(parameters), zero, zero)


def shardings(settings: config.Config, mesh: Mesh, optimizer) -> State:
  """Returns the NamedSharding of every leaf: as `transformer.specs`, split over `expert` too
  (ZeRO-1).

  A leaf of the optimizer lies as the parameter whose path its own path ends with; scalars lie on
  every device.
  """
  state = abstract(settings.model, optimizer)
  specs = jax.tree.leaves_with_path(transformer.specs(settings.model), is_leaf=_is_spec)
  by_path = {jax.tree_util.keystr(path): spec for path, spec in specs}

  def place(path, leaf):
    name = jax.tree_util.keystr(path)
    found = [spec for suffix, spec in by_path.items() if name.endswith(suffix)]
    spec = sharding.zero_spec(found[0], leaf.shape, mesh) if found else P()
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(place, state)


def abstract(model: config.Model, optimizer: optax.GradientTransformation) -> State:
  """Returns the shapes and dtypes of a run's state."""
  return jax.eval_shape(lambda: create(jax.random.key(0), model, optimizer))


def reorder(state: State, order: np.ndarray) -> State:
  """Returns `state` with layer `order[i]` at place i, in parameters and optimizer alike.

  Args:
    order: a permutation of the layers, [L].
  """
  if (order == np.arange(len(order))).all():
    return state

  def leaf(path, value):
    is_layer = any(getattr(key, "name", None) == "layers" for key in path)
    return jnp.take(value, order, axis=0) if is_layer else value

  return jax.tree_util.tree_map_with_path(leaf, state)


def placement(settings: config.Config, layer_order: np.ndarray) -> np.ndarray:
  """Returns the logical layer at each place along L, from the virtual stage at each place.

  Args:
    layer_order: `Table.layer_order`, [virtual stages].
  """
  per_chunk = settings.model.layers // len(layer_order)
  return (layer_order[:, None] * per_chunk + np.arange(per_chunk)).reshape(-1)


def by_name(state: State) -> dict[str, jax.Array]:
  """Returns the leaves of `state` by their path, the form in which they are written to disk."""
  return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}


def from_names(like: State, leaves: dict[str, jax.Array]) -> State:
  """Returns the state that `by_name` took apart; `like` gives its structure."""
  return jax.tree_util.tree_map_with_path(lambda path, _: leaves[_name(path)], like)


def initialiser(settings: config.Config, mesh: Mesh, optimizer, order: np.ndarray) -> Callable:
  """Returns key -> State, jitted so that each device makes only its own part."""
  make = lambda key: reorder(create(key, settings.model, optimizer), order)
  return jax.jit(make, out_shardings=shardings(settings, mesh, optimizer))


def _name(path) -> str:
  if isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
    path = path[:-1]  # of the nnx.Variable that holds the array
  parts = (getattr(key, "name", getattr(key, "key", getattr(key, "idx", None))) for key in path)
  return ".".join(map(str, parts))


def _is_spec(node) -> bool:
  return isinstance(node, P)
