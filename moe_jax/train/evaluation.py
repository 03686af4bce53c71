"""The held-out loss, in nats per byte, whatever the tokenizer.

Knows batches and the forward-only step; must not know when a run evaluates.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.train import batches, step
from moe_jax.train.data import Batch, Dataset
from moe_jax.train.state import State


class Evaluation:
  """Evaluates states on the held-out batches; compiled when it is made."""

  def __init__(self, settings: config.Config, mesh: Mesh, dataset: Dataset, abstract: State):
    """Compiles.

    Args:
      abstract: the state's shapes, dtypes and shardings.
    """
    self._settings, self._mesh, self._dataset = settings, mesh, dataset
    jitted = jax.jit(step.evaluate_step(settings, mesh), out_shardings=NamedSharding(mesh, P()))
    self._evaluate = jitted.lower(abstract, batches.abstract(settings, mesh)).compile()

  def start(self, state: State) -> list[jax.Array]:
    """Returns each held-out batch's loss, before it is computed; `state` may then be donated."""
    return [
      self._evaluate(state, batches.place(batch, self._settings, self._mesh)).cross_entropy
      for batch in self._batches()
    ]

  def finish(self, losses: list[jax.Array]) -> float:
    """Returns the mean loss in nats per byte; waits until what `start` gave is computed."""
    num_targets = [np.count_nonzero(batch["weights"]) for batch in self._batches()]
    return float(np.dot(jax.device_get(losses), num_targets) / self._dataset.num_eval_bytes)

  def _batches(self) -> list[Batch]:
    return [self._dataset.eval_batch(i) for i in range(self._dataset.num_eval_batches)]


def targets_per_byte(dataset: Dataset, batch: Batch) -> float:
  """Returns what turns a loss per target into one per byte; 0 for a batch without targets."""
  return np.count_nonzero(batch["weights"]) / max(dataset.num_target_bytes(batch), 1)
