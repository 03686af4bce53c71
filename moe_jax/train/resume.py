"""How a run begins and is kept: a new state, or the newest checkpoint on whatever mesh this is.

On disk layers and experts lie in logical order; in a run layers lie as the schedule places them
and experts where their loads put them. Knows the state and checkpoints; must not know steps,
metrics or the terminal.
"""

from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from moe_jax import config
from moe_jax.train import migration, rebalance
from moe_jax.train import state as state_lib
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.data import Dataset
from moe_jax.train.rebalance import Placed
from moe_jax.train.state import State


class Beginning(NamedTuple):
  """Where a run starts.

  Attributes:
    state: layers as the schedule places them, experts as `placed` says.
    placed: where they are, and the loads since they were last looked at.
    step: steps done.
    train_seconds: spent on them.
    notes: lines that the user should see: what is resumed, and what differs since.
  """

  state: State
  placed: Placed
  step: int
  train_seconds: float
  notes: tuple[str, ...]


class Keeper:
  """Begins a run's state and saves it.

  Attributes:
    shardings: NamedSharding of every leaf of the state, in either order.
    order: logical layer at each place, [L].
  """

  def __init__(
    self,
    settings: config.Config,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    order: np.ndarray,
    checkpoints: Checkpoints,
  ):
    self._settings, self._mesh, self._optimizer = settings, mesh, optimizer
    self.order, self._checkpoints = order, checkpoints
    self.shardings = state_lib.shardings(settings, mesh, optimizer)
    self._logical_LP = rebalance.begin(settings.model).expert_LP
    permute = migration.permute(settings, mesh, optimizer)
    reorder, inverse = state_lib.reorder, np.argsort(order)
    self._to_logical = self._jitted(lambda state: reorder(state, inverse))
    self._to_logical_experts = self._jitted(
      lambda state, moves: reorder(permute(state, moves), inverse)
    )
    self._from_logical = self._jitted(lambda state: reorder(state, order))
    self._from_logical_experts = self._jitted(
      lambda state, moves: permute(reorder(state, order), moves)
    )

  def abstract(self) -> State:
    """Returns the shapes, dtypes and shardings of the state."""
    struct = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    state = state_lib.abstract(self._settings.model, self._optimizer)
    return jax.tree.map(struct, state, self.shardings)

  def begin(self, dataset: Dataset) -> Beginning:
    """Returns a new run's state, or that of the newest intact checkpoint; changes no file.

    Raises:
      ValueError: the checkpoint is of another model, or of another tokenizer, or on this mesh
        tokens would choose among other experts, though nobody asked.
    """
    abstract = self.abstract()
    found = self._checkpoints.restore(state_lib.by_name(abstract))
    if found is None:
      make = state_lib.initialiser(self._settings, self._mesh, self._optimizer, self.order)
      state = make(jax.random.key(self._settings.train.seed))
      return Beginning(state, rebalance.begin(self._settings.model), 0, 0.0, ())
    step, leaves, meta = found
    _check_same_model(step, meta["config"], self._settings)
    of_others = _other_choice(step, meta["config"], self._settings)
    _, differences = dataset.resume(meta["data"])
    changes = _changes(meta["config"], config.as_dict(self._settings))
    notes = [f"resumed after step {step}"]
    if changes:
      notes.append(f"changed since that checkpoint: {', '.join(changes)}")
    notes += of_others
    placed, is_kept = rebalance.from_meta(meta.get("experts"), self._settings)
    if not is_kept:
      notes.append(
        "experts are at home again: as they were, hosts would hold others, and"
        " moe.hosts_per_token let tokens choose among others"
      )
    state = state_lib.from_names(abstract, leaves)
    moves = self._moves(self._logical_LP, placed.expert_LP)
    state = self._from_logical_experts(state, moves) if moves else self._from_logical(state)
    return Beginning(state, placed, step, meta["train_seconds"], (*notes, *differences))

  def save(
    self, step: int, state: State, placed: Placed, dataset: Dataset, train_seconds: float
  ) -> None:
    """Saves in the background; returns once `state` may be donated.

    Args:
      placed: where the experts of `state` are.

    Raises:
      OSError: this save cannot begin, or the one before failed.
    """
    meta = {
      "config": config.as_dict(self._settings),
      "data": dataset.state(step),
      "experts": rebalance.as_meta(placed),
      "train_seconds": train_seconds,
    }
    moves = self._moves(placed.expert_LP, self._logical_LP)
    state = self._to_logical_experts(state, moves) if moves else self._to_logical(state)
    self._checkpoints.save(step, state_lib.by_name(state), meta)

  def _moves(self, before_LP: np.ndarray, after_LP: np.ndarray) -> migration.Moves | None:
    """Returns what leads from one placement to another on the devices, None where they are one."""
    if (before_LP == after_LP).all():
      return None
    moves = migration.moves(before_LP, after_LP, self.order, self._settings.mesh)
    return migration.on_devices(moves, self._mesh)

  def _jitted(self, function):
    return jax.jit(function, out_shardings=self.shardings)


def _check_same_model(step: int, saved: dict, settings: config.Config) -> None:
  # Most fields show in the arrays' shapes too, but not all: experts_per_token does not.
  now = config.as_dict(settings)["model"]
  for name, value in _before(saved, "model").items():
    if name != "dtype" and now.get(name) != value:
      raise ValueError(
        f"the checkpoint after step {step} is of another model: model.{name} is {value} there and"
        f" {now.get(name)} in this config; take the config that it was saved with, or another"
        " --workdir"
      )


def _other_choice(step: int, saved: dict, settings: config.Config) -> list[str]:
  """Returns a line if a token's experts are chosen among others than before, as was asked for.

  Raises:
    ValueError: they would be, only because of how hosts lie on this mesh.
  """
  mesh, fields = _before(saved, "mesh"), _before(saved, "moe")
  names = ("hosts_per_token", "expert_ranks_per_host")
  moe = config.Moe(**{name: fields[name] for name in names})
  hosts = config.router_hosts(config.Mesh(expert=mesh["expert"]), moe)
  before, now = _choice(moe, hosts), _choice(settings.moe, settings.router_hosts)
  if before == now:
    return []
  if moe.hosts_per_token != settings.moe.hosts_per_token:
    return [f"tokens choose among {now}, until then among {before}"]
  num_ranks = settings.mesh.expert
  if hosts == 1:
    advice = "moe.hosts_per_token=0"
  elif num_ranks % hosts:
    advice = f"mesh.expert from multiples of {hosts}"
  else:
    advice = f"moe.expert_ranks_per_host={num_ranks // hosts}"
  raise ValueError(
    f"in the checkpoint after step {step} tokens chose among {before}; on mesh.expert={num_ranks}"
    f" with moe.expert_ranks_per_host={settings.moe.expert_ranks_per_host} they would among {now};"
    f" choose {advice}, or another moe.hosts_per_token if they are to"
  )


def _choice(moe: config.Moe, hosts: int) -> str:
  return "all experts" if hosts == 1 else f"those of {moe.hosts_per_token} of {hosts} hosts"


def _changes(saved: dict, now: dict) -> list[str]:
  before = {section: _before(saved, section) for section in now}
  return [
    f"{section}.{name} {before[section][name]} -> {value}"
    for section, fields in now.items()
    for name, value in fields.items()
    if before[section][name] != value
  ]


def _before(saved: dict, section: str) -> dict:
  """Returns a section of a saved config; a field that is younger had, in effect, its default."""
  return {**config.as_dict(config.Config())[section], **saved.get(section, {})}
