"""How a run begins and is kept: a new state, or the newest checkpoint on whatever mesh this is.

On disk the layers lie in logical order; in a run they lie as the schedule places them. Knows the
state and checkpoints; must not know steps, metrics or the terminal.
"""

from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from moe_jax import config
from moe_jax.train import state as state_lib
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.data import Dataset
from moe_jax.train.state import State


class Beginning(NamedTuple):
  """Where a run starts.

  Attributes:
    state: layers as the schedule places them.
    step: steps done.
    train_seconds: spent on them.
    notes: lines that the user should see: what is resumed, and what differs since.
  """

  state: State
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
    inverse = np.argsort(order)
    self._to_logical = self._reordering(inverse)

  def abstract(self) -> State:
    """Returns the shapes, dtypes and shardings of the state."""
    struct = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    state = state_lib.abstract(self._settings.model, self._optimizer)
    return jax.tree.map(struct, state, self.shardings)

  def begin(self, dataset: Dataset) -> Beginning:
    """Returns a new run's state, or that of the newest intact checkpoint; changes no file.

    Raises:
      ValueError: the checkpoint is of another model, or of another tokenizer.
    """
    abstract = self.abstract()
    found = self._checkpoints.restore(state_lib.by_name(abstract))
    if found is None:
      make = state_lib.initialiser(self._settings, self._mesh, self._optimizer, self.order)
      return Beginning(make(jax.random.key(self._settings.train.seed)), 0, 0.0, ())
    step, leaves, meta = found
    _check_same_model(step, meta["config"], self._settings)
    _, differences = dataset.resume(meta["data"])
    changes = _changes(meta["config"], config.as_dict(self._settings))
    notes = [f"resumed after step {step}"]
    if changes:
      notes.append(f"changed since that checkpoint: {', '.join(changes)}")
    state = self._reordering(self.order)(state_lib.from_names(abstract, leaves))
    return Beginning(state, step, meta["train_seconds"], (*notes, *differences))

  def save(self, step: int, state: State, dataset: Dataset, train_seconds: float) -> None:
    """Saves in the background; returns once `state` may be donated.

    Raises:
      OSError: this save cannot begin, or the one before failed.
    """
    meta = {
      "config": config.as_dict(self._settings),
      "data": dataset.state(step),
      "train_seconds": train_seconds,
    }
    self._checkpoints.save(step, state_lib.by_name(self._to_logical(state)), meta)

  def _reordering(self, order: np.ndarray):
    return jax.jit(lambda state: state_lib.reorder(state, order), out_shardings=self.shardings)


def _check_same_model(step: int, saved: dict, settings: config.Config) -> None:
  # Most fields show in the arrays' shapes too, but not all: experts_per_token does not.
  now = config.as_dict(settings)["model"]
  for name, value in saved["model"].items():
    if name != "dtype" and now.get(name) != value:
      raise ValueError(
        f"the checkpoint after step {step} is of another model: model.{name} is {value} there and"
        f" {now.get(name)} in this config; take the config that it was saved with, or another"
        " --workdir"
      )


def _changes(saved: dict, now: dict) -> list[str]:
  return [
    f"{section}.{name} {saved.get(section, {}).get(name)} -> {value}"
    for section, fields in now.items()
    for name, value in fields.items()
    if saved.get(section, {}).get(name) != value
  ]
