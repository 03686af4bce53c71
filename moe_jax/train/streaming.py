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
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.model import transformer
from moe_jax.model.transformer import Parameters
from moe_jax.parallel import collectives, messages, sharding
from moe_jax.parallel.axes import DATA, EXPERT
from moe_jax.pipeline import ends, segments
from moe_jax.pipeline.schedules import SCHEDULES
from moe_jax.pipeline.table import Table
from moe_jax.pipeline.together import Together
from moe_jax.pipeline.weights import Arriving, Outside, Shares, Streamed


def specs(settings: config.Config, mesh: Mesh) -> Parameters:
  """Returns the PartitionSpec of every parameter that a training step computes with.

  Raises:
    ValueError: layers are to be gathered ahead, and no weight can be laid in shares.
  """
  whole = transformer.specs(settings.model)
  ahead, model = settings.pipeline.prefetch_layers, settings.model
  shapes = _shapes(settings.model)
  whole = whole._replace(
    shared=_placed(whole.shared, shapes.shared, _outside(settings, mesh), mesh)
  )
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

  Communication: none; the pipeline's is, of the weights of a layer or of several that lie in
  shares, `messages.send_together` over `data`, and over `expert` an all-gather.
  """
  ahead = settings.pipeline.prefetch_layers
  if not ahead and not _arrive(settings, mesh):
    return lambda layers: layers
  whole = _gathered(_of_layers(settings, mesh))
  if ahead:
    return lambda layers: Streamed(Shares(layers, whole), ahead)
  return lambda layers: Arriving(Shares(layers, whole))


def summed(settings: config.Config, mesh: Mesh) -> Together:
  """Returns what sums gradients of a layer, or of several stacked, into shares: of those leaves
  whose weights lie, or might, in them.

  Communication: none; that of it is over `expert` a reduce-scatter, and over `data`
  `messages.reduce_scatter_together`.
  """
  return _summed(_of_layers(settings, mesh))


def to_shared(settings: config.Config, mesh: Mesh) -> Callable[[nnx.State], nnx.State | Outside]:
  """Returns the function from a device's parameters outside the layers, laid out by `specs`, to
  what the pipeline takes.

  Communication: none; the pipeline's is, of those that lie in shares, as `to_weights` says of
  layers.
  """
  late, outside = _late(settings, mesh), _outside(settings, mesh)
  first = [None if is_late else shares for shares, is_late in zip(outside, late, strict=True)]
  if not any(outside):
    return lambda shared: shared
  parts = (_gathered(first), _gathered(late), _summed(late))
  beside = _gathered_beside(first, _of_layers(settings, mesh))
  return lambda shared: Outside(shared, *parts, beside)


def are_summed(settings: config.Config, mesh: Mesh) -> Parameters:
  """Returns of which parameters the pipeline sums gradients into shares."""
  shapes = _shapes(settings.model)
  mark = lambda tree, marks: jax.tree.unflatten(jax.tree.structure(tree), map(bool, marks))
  return Parameters(
    mark(shapes.layers, _shares(settings, mesh)), mark(shapes.shared, _late(settings, mesh))
  )


def remaining(settings: config.Config, mesh: Mesh) -> Together:
  """Returns what sums all gradients that are left when the pipeline is through: of (those of layers
  that it did not sum itself, a list; all others, Parameters).

  Each becomes this device's share, or stays whole where it has none.

  Communication: none; that of it is as `summed` says.
  """
  shapes, specs = _shapes(settings.model), transformer.specs(settings.model)
  of_layers = [shares for shares in _of_layers(settings, mesh) if shares]
  of_all = [
    sharding.shares(spec, leaf.shape, mesh)
    for spec, leaf in zip(jax.tree.leaves(specs), jax.tree.leaves(shapes), strict=True)
  ]
  are_others = [not done for done in jax.tree.leaves(are_summed(settings, mesh))]
  of_others = [shares for shares, is_other in zip(of_all, are_others, strict=True) if is_other]
  takes = [*[True] * len(of_layers), *are_others]
  return Together.at_once(takes, functools.partial(_sum_into, [*of_layers, *of_others]))


def _sum_into(shares: Sequence[sharding.Shares], leaves: list[jax.Array]) -> list[jax.Array]:
  """Returns this device's shares of the sums, a leaf whole where it has no shares: between copies a
  share of it travels.
  """
  leaves = [
    collectives.reduce_scatter(leaf, EXPERT, of.dimension) if EXPERT in of.axes else leaf
    for of, leaf in zip(shares, leaves, strict=True)
  ]
  are_over, dimensions = _over_copies(shares)
  scatter = lambda mine: messages.reduce_scatter_together(mine, DATA, dimensions) if mine else []
  return Together.at_once(are_over, scatter).of_tree(leaves)


def _gathered(shares: Sequence[sharding.Shares | None]) -> Together:
  """Returns what makes leaves whole: between copies, which lie far apart, a share of each travels.

  Communication: over `data` `messages.send_together`, and over `expert` an all-gather.
  """
  present = [each for each in shares if each]
  are_over, dimensions = _over_copies(present)
  copies = Together(
    are_over,
    lambda mine: messages.send_together(mine, DATA) if mine else (),
    lambda arrived, mine: messages.joined(arrived, mine, dimensions) if mine else [],
  )

  def send(leaves):
    return leaves, copies.send(copies.of(leaves))

  def open_(arrived, like):
    leaves, of_copies = arrived
    leaves = copies.put(leaves, copies.open(of_copies, copies.of(like)))
    return [
      collectives.gather(leaf, EXPERT, of.dimension) if EXPERT in of.axes else leaf
      for of, leaf in zip(present, leaves, strict=True)
    ]

  return Together(tuple(map(bool, shares)), send, open_)


def _gathered_beside(
  first: Sequence[sharding.Shares | None], of_layers: Sequence[sharding.Shares | None]
) -> Callable[[list, list], tuple[list, Any]]:
  """Returns what `_gathered` of `first` does, and sends what it does of layers, between copies in
  one message (`weights.Outside`).
  """
  one, both = _gathered(first), _gathered([*first, *of_layers])

  def run(leaves: list, more: list) -> tuple[list, Any]:
    sent, of_copies = both.send([*leaves, *more])
    number = len(leaves)
    width = sum(
      leaf.size for leaf, of in zip(leaves, filter(None, first), strict=True) if DATA in of.axes
    )
    part = lambda columns: jax.tree.map(lambda all_nw: all_nw[:, columns], of_copies)
    made = one.open((sent[:number], part(slice(width))), leaves)
    return made, (sent[number:], part(slice(width, None)))

  return run


def _summed(shares: Sequence[sharding.Shares | None]) -> Together:
  present = [each for each in shares if each]
  return Together.at_once(map(bool, shares), functools.partial(_sum_into, present))


def _over_copies(shares: Sequence[sharding.Shares]) -> tuple[tuple[bool, ...], list[int]]:
  """Returns which shares lie along `data`, and the dimensions of those."""
  are_over = tuple(DATA in of.axes for of in shares)
  return are_over, [of.dimension for of, is_over in zip(shares, are_over, strict=True) if is_over]


def _of_layers(settings: config.Config, mesh: Mesh) -> list[sharding.Shares | None]:
  """Returns `_shares`, their dimensions counted from the last one: one of layers may stand before
  the others.
  """
  ranks = [len(leaf.shape) for leaf in jax.tree.leaves(_shapes(settings.model).layers)]
  return [
    shares and shares._replace(dimension=shares.dimension - rank)
    for shares, rank in zip(_shares(settings, mesh), ranks, strict=True)
  ]


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


def _outside(settings: config.Config, mesh: Mesh) -> list[sharding.Shares | None]:
  """Returns the shares in which each parameter outside the layers enters the region; None: whole.

  Between copies the region gathers all itself, where XLA sends to them what `expert` brings.
  """
  if mesh.shape[DATA] == 1:
    return _late(settings, mesh)
  return _shares_of(_shapes(settings.model).shared, transformer.specs(settings.model).shared, mesh)


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
