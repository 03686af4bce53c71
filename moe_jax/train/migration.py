"""Moves experts between slots, in parameters and optimizer state alike: one exchange.

A layer computes the same whatever slots its experts sit in, so an exchange is all that a new
placement takes: no step is compiled anew. Which leaves have experts is read off their logical axes.
Knows the state, its shardings and slots; must not know loads or when it pays to move.

Letters: X ranks of `expert`, S slots of a rank, P = X * S = E, W = X - 1 distances between ranks,
l layers of a stage.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.model import transformer
from moe_jax.parallel import collectives
from moe_jax.parallel.axes import EXPERT, STAGE
from moe_jax.train import state as state_lib
from moe_jax.train.state import State

_SPLIT, _WHOLE = "experts", "all_experts"  # logical axes with an entry for each expert


class Moves(NamedTuple):
  """What an exchange is told: data, so that every exchange is the same program.

  Attributes:
    source_LP: the slot that the expert of each slot comes from; layers as the schedule places them.
    rounds_lW: how many experts a rank sends, at most, w + 1 ranks further, for each layer of any
      stage.
  """

  source_LP: np.ndarray
  rounds_lW: np.ndarray


def moves(
  before_LP: np.ndarray, after_LP: np.ndarray, order: np.ndarray, mesh: config.Mesh
) -> Moves:
  """Returns what leads from one placement to another.

  Args:
    before_LP, after_LP: the expert that each slot holds, layers in logical order.
    order: logical layer at each place along L.
    mesh: ranks and stages.
  """
  source_LP = np.take_along_axis(np.argsort(before_LP, 1), after_LP, 1)[order].astype(np.int32)
  num_layers, num_slots = source_LP.shape
  of_rank = num_slots // mesh.expert
  from_LP = source_LP // of_rank
  distance_LP = (np.arange(num_slots) // of_rank - from_LP) % mesh.expert
  sent_LXX = np.zeros((num_layers, mesh.expert, mesh.expert), np.int32)
  np.add.at(sent_LXX, (np.arange(num_layers)[:, None], from_LP, distance_LP), 1)
  sent_ZlXX = sent_LXX.reshape(mesh.stage, -1, mesh.expert, mesh.expert)
  return Moves(source_LP, sent_ZlXX.max((0, 2))[:, 1:])


def num_rounds(moves_: Moves) -> int:
  """Returns how often each rank sends one expert and waits for one, in the whole exchange."""
  return int(moves_.rounds_lW.sum())


def expert_bytes(settings: config.Config, optimizer) -> int:
  """Returns the bytes of one expert in one layer that move: weights and optimizer state."""
  model = settings.model
  found = _found(settings.model, state_lib.abstract(model, optimizer))
  sizes = [leaf.size * leaf.dtype.itemsize for leaf, axis in found if axis and axis[0] == _SPLIT]
  return sum(sizes) // (model.layers * model.experts)


def permute(settings: config.Config, mesh: Mesh, optimizer) -> Callable[[State, Moves], State]:
  """Returns (state, moves) -> state with the experts in their new slots; to be jitted.

  It moves bits and computes nothing. Beside the state it holds two layers' experts at a time, if
  the state is donated.

  Communication: for each round of `Moves`, collective-permute over `expert` of one expert of one
  layer, in every leaf; all-gathers of what ZeRO-1 splits of leaves that every rank has whole.
  """
  shardings = state_lib.shardings(settings, mesh, optimizer)
  specs = [sharding.spec for sharding in jax.tree.leaves(shardings)]
  axes = [axis for _, axis in _found(settings.model, state_lib.abstract(settings.model, optimizer))]
  split = [i for i, axis in enumerate(axes) if axis and axis == (_SPLIT, 1)]
  whole = [i for i, axis in enumerate(axes) if axis and i not in split]
  split_specs = [specs[i] for i in split]
  exchange = jax.shard_map(
    _exchange, mesh=mesh, in_specs=(split_specs, Moves(P(), P())), out_specs=split_specs
  )

  def run(state: State, moves_: Moves) -> State:
    leaves, tree = jax.tree.flatten(state)
    for i, leaf in zip(split, exchange([leaves[i] for i in split], moves_), strict=True):
      leaves[i] = leaf
    for i in whole:
      take = lambda layer, source_P, i=i: jnp.take(layer, source_P, axis=axes[i][1] - 1)
      leaves[i] = jax.vmap(take)(leaves[i], moves_.source_LP)
    return jax.tree.unflatten(tree, leaves)

  return run


def program(
  settings: config.Config, mesh: Mesh, optimizer, state: State
) -> Callable[[State, Moves], State]:
  """Returns the exchange, compiled; it takes the state's buffers.

  Args:
    state: shapes, dtypes and shardings.
  """
  model, ranks = settings.model, settings.mesh
  shapes = Moves(
    (model.layers, model.experts), (model.layers // ranks.stage, max(ranks.expert - 1, 0))
  )
  everywhere = NamedSharding(mesh, P())
  told = Moves(*(jax.ShapeDtypeStruct(shape, jnp.int32, sharding=everywhere) for shape in shapes))
  places = jax.tree.map(lambda leaf: leaf.sharding, state)
  jitted = jax.jit(permute(settings, mesh, optimizer), donate_argnums=0, out_shardings=places)
  compiled = jitted.lower(state, told).compile()
  return lambda state, moves_: compiled(state, on_devices(moves_, mesh))


def on_devices(moves_: Moves, mesh: Mesh) -> Moves:
  """Returns `moves_` on every device, however many processes hold them."""
  everywhere = NamedSharding(mesh, P())
  put = lambda values: jax.make_array_from_callback(
    values.shape, everywhere, lambda index: values[index]
  )
  return Moves(*map(put, moves_))


def _exchange(leaves: list[jax.Array], moves_: Moves) -> list[jax.Array]:
  """Returns this device's leaves [l, S, ...] with their new experts, inside the region.

  Ranks at each distance exchange in turn, an expert a round, so that what travels is what moves and
  not what might.
  """
  num_layers, num_slots = leaves[0].shape[:2]
  num_ranks, me = jax.lax.axis_size(EXPERT), jax.lax.axis_index(EXPERT)
  first = jax.lax.axis_index(STAGE) * num_layers
  source_lP = jax.lax.dynamic_slice_in_dim(moves_.source_LP, first, num_layers)

  def one_layer(layer, leaves):
    source_XS = source_lP[layer].reshape(num_ranks, num_slots)
    rank_XS, slot_XS = source_XS // num_slots, source_XS % num_slots
    # What comes from elsewhere overwrites whatever is there meanwhile.
    stays_S = jnp.where(rank_XS[me] == me, slot_XS[me], 0)
    new = [leaf[layer, stays_S] for leaf in leaves]
    for distance in range(1, num_ranks):
      to, of = (me + distance) % num_ranks, (me - distance) % num_ranks
      # Both ends go through the receiver's slots in order.
      gives_S = slot_XS[to][jnp.argsort(rank_XS[to] != me, stable=True)]
      gets_S = jnp.argsort(rank_XS[me] != of, stable=True)
      num_gets = (rank_XS[me] == of).sum()

      def one_round(i, new, gives_S=gives_S, gets_S=gets_S, num_gets=num_gets, distance=distance):
        sent = [leaf[layer, gives_S[i]] for leaf in leaves]
        arrived = collectives.shift(sent, EXPERT, distance)
        place = gets_S[i]
        return [
          leaf.at[place].set(jnp.where(i < num_gets, expert, leaf[place]))
          for leaf, expert in zip(new, arrived, strict=True)
        ]

      new = jax.lax.fori_loop(0, moves_.rounds_lW[layer, distance - 1], one_round, new)
    return [leaf.at[layer].set(each) for leaf, each in zip(leaves, new, strict=True)]

  return jax.lax.fori_loop(0, num_layers, one_layer, leaves)


def _found(model: config.Model, state: State) -> list[tuple[jax.Array, tuple[str, int] | None]]:
  """Returns every leaf of `state` with the name and place of its experts' axis, if it has one.

  A leaf of the optimizer has the axes of the parameter whose path its own path ends with.

  Raises:
    ValueError: such a leaf is not of its parameter's shape, so that its experts are not to be told
      apart.
  """
  parameters = jax.eval_shape(lambda: transformer.init(jax.random.key(0), model))
  is_variable = lambda node: isinstance(node, nnx.Variable)
  by_suffix = {}
  for path, variable in jax.tree.leaves_with_path(parameters.layers, is_leaf=is_variable):
    names = ("layers", *variable.get_metadata("axes"))
    axis = next(((name, i) for i, name in enumerate(names) if name in (_SPLIT, _WHOLE)), None)
    if axis:
      by_suffix[f".layers{jax.tree_util.keystr(path)}"] = (variable.get_value().shape, axis)

  def axis_of(path, leaf):
    name = jax.tree_util.keystr(path).removesuffix(".value")
    for suffix, (shape, axis) in by_suffix.items():
      if name.endswith(suffix):
        if leaf.shape != shape:
          raise ValueError(
            f"{name} has shape {leaf.shape}, expected {shape} as its parameter; experts move only"
            " with optimizers whose state is laid out as the parameters"
          )
        return axis
    return None

  return [(leaf, axis_of(path, leaf)) for path, leaf in jax.tree.leaves_with_path(state)]
