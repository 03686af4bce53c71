"""Which weights of a layer lie in shares over `expert` in a step, and how they become whole; and
which gradients are summed there layer by layer.

ZeRO-1 leaves the master weights in shares already, and wants gradients summed in the same shares.
Where the schedule lets them come while the pipeline fills, or with `pipeline.prefetch_layers`, the
copy that the step computes with enters the region in those shares too, and the pipeline gathers
one layer at a time. It is the large matrices that every rank of `expert` holds alike, attention's;
norms and routers, float32 and small, stay whole. Knows parameters, the mesh and of a schedule
whether weights may come late.
"""

import functools
from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.model import transformer
from moe_jax.model.transformer import Parameters
from moe_jax.parallel import collectives, sharding
from moe_jax.parallel.axes import EXPERT
from moe_jax.pipeline import ends
from moe_jax.pipeline.reduction import Reduce
from moe_jax.pipeline.schedules import SCHEDULES
from moe_jax.pipeline.weights import Arriving, Shares, Streamed


def specs(settings: config.Config, mesh: Mesh) -> Parameters:
  """Returns the PartitionSpec of every parameter that a training step computes with.

  Raises:
    ValueError: layers are to be gathered ahead, and no weight can be laid in shares.
  """
  whole = transformer.specs(settings.model)
  ahead, model = settings.pipeline.prefetch_layers, settings.model
  if not ahead and not _arrive(settings, mesh):
    return whole
  if set(_dimensions(settings, mesh)) == {None}:
    raise ValueError(
      f"pipeline.prefetch_layers={ahead} gathers attention's weights, of which none lies in shares:"
      f" no dimension of theirs that mesh.expert={settings.mesh.expert} divides is as large as"
      f" model.layers={model.layers}; choose a larger model.d_model={model.d_model} that"
      " mesh.expert divides, or prefetch_layers=0"
    )
  shapes = _shapes(settings.model)
  tree = jax.tree.structure(shapes)
  placed = [
    spec if dimension is None else sharding.zero_spec(spec, shape.shape, mesh)
    for spec, shape, dimension in zip(
      jax.tree.leaves(whole.layers), jax.tree.leaves(shapes), _dimensions(settings, mesh),
      strict=True,
    )
  ]  # fmt: skip
  return whole._replace(layers=jax.tree.unflatten(tree, placed))


def to_weights(
  settings: config.Config, mesh: Mesh
) -> Callable[[nnx.State], nnx.State | Streamed | Arriving]:
  """Returns the function from a device's layers, laid out by `specs`, to what the pipeline runs.

  Communication: none; the pipeline's gathers are, for each weight that lies in shares, an
  all-gather over `expert` of a layer, or of several.
  """
  ahead = settings.pipeline.prefetch_layers
  if not ahead and not _arrive(settings, mesh):
    return lambda layers: layers
  gathers = _of_shares(settings, mesh, collectives.gather)
  if ahead:
    return lambda layers: Streamed(Shares(layers, gathers), ahead)
  return lambda layers: Arriving(Shares(layers, gathers))


def reduces(settings: config.Config, mesh: Mesh) -> list[Reduce | None]:
  """Returns, of each leaf of the layers, what sums gradients over `expert` where its weights lie,
  or might, in shares: those of a layer, or of several stacked; None for the others.

  Communication: none; that of each is a reduce-scatter over `expert`.
  """
  return _of_shares(settings, mesh, collectives.reduce_scatter)


def _of_shares(settings: config.Config, mesh: Mesh, collective: Callable) -> list[Callable | None]:
  """Returns the collective along the dimension in which each leaf lies in shares, counted from the
  last one, for one of layers may stand before the others; None where it lies in none.
  """
  ranks = [len(leaf.shape) for leaf in jax.tree.leaves(_shapes(settings.model))]
  return [
    None if dimension is None else functools.partial(
      collective, axis_name=EXPERT, dimension=dimension - rank
    )
    for dimension, rank in zip(_dimensions(settings, mesh), ranks, strict=True)
  ]  # fmt: skip


def _arrive(settings: config.Config, mesh: Mesh) -> bool:
  """Says whether weights come while the pipeline fills."""
  pipeline = settings.pipeline
  schedule = SCHEDULES[pipeline.schedule](
    settings.mesh.stage, pipeline.micro_batches, pipeline.chunks
  )
  come = bool((ends.coming(schedule) >= 0).any())
  return come and mesh.shape[EXPERT] > 1 and set(_dimensions(settings, mesh)) != {None}


def _dimensions(settings: config.Config, mesh: Mesh) -> list[int | None]:
  """Returns along which dimension each leaf of the layers lies in shares; None: it does not."""
  variables = jax.tree.leaves(_shapes(settings.model), is_leaf=_is_variable)
  specs = jax.tree.leaves(transformer.specs(settings.model).layers)
  return [_dimension(variable, spec, mesh) for variable, spec in zip(variables, specs, strict=True)]


def _dimension(variable: nnx.Param, spec: P, mesh: Mesh) -> int | None:
  if variable.get_metadata("keep_float32"):
    return None
  # ZeRO-1 may split the dimension of the layers, where no other is larger: those stay whole.
  return sharding.zero_dimension(spec, variable.get_value().shape, mesh) or None


def _shapes(model: config.Model) -> nnx.State:
  return jax.eval_shape(lambda: transformer.init(jax.random.key(0), model)).layers


def _is_variable(node) -> bool:
  return isinstance(node, nnx.Variable)
