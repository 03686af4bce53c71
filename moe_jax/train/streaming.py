"""Which weights of a layer lie in shares in a step, and how they become whole; and which gradients
are summed into them layer by layer.

ZeRO-1 leaves the master weights in shares already, and wants gradients summed in the same shares.
Where the schedule lets them come while the pipeline fills, or with `pipeline.prefetch_layers`, the
copy that the step computes with enters the region in those shares too, and the pipeline gathers
one layer at a time. It is the large matrices that several ranks hold alike: attention's along
`expert` and `data`, experts' along `data`; norms and routers, float32 and small, stay whole. Knows
parameters, the mesh and of a schedule whether weights may come late.
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
from moe_jax.pipeline import ends, segments
from moe_jax.pipeline.reduction import Reduce
from moe_jax.pipeline.schedules import SCHEDULES
from moe_jax.pipeline.table import Table
from moe_jax.pipeline.weights import Arriving, Late, Shares, Streamed


def specs(settings: config.Config, mesh: Mesh) -> Parameters:
  """Returns the PartitionSpec of every parameter that a training step computes with.

  Raises:
    ValueError: layers are to be gathered ahead, and no weight can be laid in shares.
  """
  whole = transformer.specs(settings.model)
  ahead, model = settings.pipeline.prefetch_layers, settings.model
  shapes = _shapes(settings.model)
  whole = whole._replace(shared=_placed(whole.shared, shapes.shared, _late(settings, mesh), mesh))
  if not ahead and not _arrive(settings, mesh):
    return whole
  if not any(_shares(settings, mesh)):
    raise ValueError(
      f"pipeline.prefetch_layers={ahead} gathers weights, of which none lies in shares:"
      f" no dimension of theirs that mesh.expert={settings.mesh.expert} or"
      f" mesh.data={settings.mesh.data} divides is as large as model.layers={model.layers}; choose"
      f" a larger model.d_model={model.d_model} that they divide, or prefetch_layers=0"
    )
  return whole._replace(layers=_placed(whole.layers, shapes.layers, _shares(settings, mesh), mesh))


def _placed(specs: nnx.State, shapes: nnx.State, shares: list, mesh: Mesh) -> nnx.State:
  """Returns the specs, of what has shares those of ZeRO-1."""
  leaves = zip(jax.tree.leaves(specs), jax.tree.leaves(shapes), shares, strict=True)
  placed = [
    sharding.zero_spec(spec, shape.shape, mesh) if share else spec for spec, shape, share in leaves
  ]
  return jax.tree.unflatten(jax.tree.structure(shapes), placed)


def to_weights(
  settings: config.Config, mesh: Mesh
) -> Callable[[nnx.State], nnx.State | Streamed | Arriving]:
  """Returns the function from a device's layers, laid out by `specs`, to what the pipeline runs.

  Communication: none; the pipeline's gathers are, for each weight that lies in shares, an
  all-gather over each of their axes, of a layer or of several.
  """
  ahead = settings.pipeline.prefetch_layers
  if not ahead and not _arrive(settings, mesh):
    return lambda layers: layers
  gathers = _of_layers(settings, mesh, _gather)
  if ahead:
    return lambda layers: Streamed(Shares(layers, gathers), ahead)
  return lambda layers: Arriving(Shares(layers, gathers))


def reduces(settings: config.Config, mesh: Mesh) -> list[Reduce | None]:
  """Returns, of each leaf of the layers, what sums gradients into shares where its weights lie, or
  might, in them: those of a layer, or of several stacked; None for the others.

  Communication: none; that of each is a reduce-scatter over each axis of the shares.
  """
  return _of_layers(settings, mesh, sum_into)


def late(settings: config.Config, mesh: Mesh) -> Callable[[nnx.State], nnx.State | Late]:
  """Returns the function from a device's parameters outside the layers, laid out by `specs`, to
  what the pipeline takes.

  Communication: none; the pipeline's gather is, of what lies in shares, an all-gather over each of
  their axes, and its sum a reduce-scatter.
  """
  shares = _late(settings, mesh)
  if not any(shares):
    return lambda shared: shared
  gathers, reduces = (
    [functools.partial(collective, share) if share else None for share in shares]
    for collective in (_gather, sum_into)
  )
  return lambda shared: Late(shared, gathers, reduces)


def are_summed(settings: config.Config, mesh: Mesh) -> Parameters:
  """Returns of which parameters the pipeline sums gradients into shares."""
  shapes = _shapes(settings.model)
  mark = lambda tree, marks: jax.tree.unflatten(jax.tree.structure(tree), map(bool, marks))
  return Parameters(
    mark(shapes.layers, _shares(settings, mesh)), mark(shapes.shared, _late(settings, mesh))
  )


def sum_into(shares: sharding.Shares, x: jax.Array) -> jax.Array:
  """Returns this device's share of the sum of `x`, all of it where there are no shares: between
  copies a share of it travels.

  Communication: a reduce-scatter over each axis of the shares.
  """
  for name in shares.axes:
    x = collectives.reduce_scatter(x, name, shares.dimension)
  return x


def _of_layers(settings: config.Config, mesh: Mesh, collective: Callable) -> list[Callable | None]:
  """Returns `collective` of the shares in which each leaf lies, their dimension counted from the
  last one, for one of layers may stand before the others; None where it lies in none.
  """
  ranks = [len(leaf.shape) for leaf in jax.tree.leaves(_shapes(settings.model).layers)]
  from_last = lambda shares, rank: shares._replace(dimension=shares.dimension - rank)
  return [
    functools.partial(collective, from_last(shares, rank)) if shares else None
    for shares, rank in zip(_shares(settings, mesh), ranks, strict=True)
  ]


def _gather(shares: sharding.Shares, x: jax.Array) -> jax.Array:
  """Returns `x` whole: between copies, which lie far apart, a share of it travels."""
  for name in reversed(shares.axes):
    x = collectives.gather(x, name, shares.dimension)
  return x


def _arrive(settings: config.Config, mesh: Mesh) -> bool:
  """Says whether weights come while the pipeline fills."""
  come = bool((ends.coming(_table(settings)) >= 0).any())
  return come and any(_shares(settings, mesh))


def _table(settings: config.Config) -> Table:
  pipeline = settings.pipeline
  return SCHEDULES[pipeline.schedule](settings.mesh.stage, pipeline.micro_batches, pipeline.chunks)


def _shares(settings: config.Config, mesh: Mesh) -> list[sharding.Shares | None]:
  """Returns the shares in which each leaf of the layers lies; None: it is whole."""
  found = _shares_of(_shapes(settings.model).layers, transformer.specs(settings.model).layers, mesh)
  # ZeRO-1 may split the dimension of the layers, where no other is larger: those stay whole.
  return [shares if shares and shares.dimension else None for shares in found]


def _late(settings: config.Config, mesh: Mesh) -> list[sharding.Shares | None]:
  """Returns the shares in which each parameter outside the layers lies, if heads alone read it and
  there is something to gather it beside; None: it is whole.
  """
  shapes, model = _shapes(settings.model).shared, settings.model
  if not segments.has_room_beside_heads(_table(settings)):
    return [None] * len(jax.tree.leaves(shapes))
  found = _shares_of(shapes, transformer.specs(model).shared, mesh)
  of_head = transformer.is_of_head(shapes)
  return [shares if mine else None for shares, mine in zip(found, of_head, strict=True)]


def _shares_of(shapes: nnx.State, specs: nnx.State, mesh: Mesh) -> list[sharding.Shares | None]:
  variables = jax.tree.leaves(shapes, is_leaf=_is_variable)
  of_leaf = zip(variables, jax.tree.leaves(specs), strict=True)
  return [_shares_of_leaf(variable, spec, mesh) for variable, spec in of_leaf]


def _shares_of_leaf(variable: nnx.Param, spec: P, mesh: Mesh) -> sharding.Shares | None:
  if variable.get_metadata("keep_float32"):
    return None
  shares = sharding.shares(spec, variable.get_value().shape, mesh)
  return shares if shares.axes else None


def _shapes(model: config.Model) -> Parameters:
  return jax.eval_shape(lambda: transformer.init(jax.random.key(0), model))


def _is_variable(node) -> bool:
  return isinstance(node, nnx.Variable)
