"""What the host does with a step that the devices have finished: files, terminal, and a verdict.

Knows figures and where they go; must not know how a step is computed or saved.
"""

import functools
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from moe_jax import config
from moe_jax.observe import metrics as metrics_lib
from moe_jax.observe import plot
from moe_jax.observe.progress import Progress
from moe_jax.train import figures, optimizer
from moe_jax.train.evaluation import Evaluation
from moe_jax.train.rebalance import Balancer, Look
from moe_jax.train.step import Metrics

_BLOCK = 4096  # learning rates that are computed at once


class Diverged(Exception):
  """Too many steps in a row had a loss or gradient that was not finite."""


class Dispatched(NamedTuple):
  """A step that the devices may still be computing.

  Attributes:
    step: its index.
    metrics: what it reports.
    evaluation: what `Evaluation.start` gave, if the state after it is evaluated.
    targets_per_byte: of its batch.
    expert_LP: the expert at each slot in this step, layers in logical order.
    look: at the loads after it, if there was one.
  """

  step: int
  metrics: Metrics
  evaluation: list[jax.Array] | None
  targets_per_byte: float
  expert_LP: np.ndarray
  look: Look | None


class Log:
  """Logs one step after the other. Only process 0 writes files; all come to the same verdict."""

  def __init__(
    self,
    settings: config.Config,
    workdir: Path,
    progress: Progress,
    evaluation: Evaluation,
    balancer: Balancer,
    order: np.ndarray,
    first_step: int,
  ):
    """Opens the files; of an earlier run the steps before `first_step` stay in them.

    Args:
      balancer: it is told each step's loads.
      order: logical layer at each place, [L].
      first_step: that this run begins with.

    Raises:
      OSError: a file cannot be written.
    """
    self._settings, self._workdir, self._progress = settings, workdir, progress
    self._evaluation, self._balancer, self._order = evaluation, balancer, order
    schedule = optimizer.schedule(settings.train)
    # Many at once, for jax computes them behind the steps that are dispatched; the first ones now.
    self._learning_rates = functools.lru_cache(maxsize=1)(
      lambda block: np.asarray(schedule(np.arange(block * _BLOCK, (block + 1) * _BLOCK)))
    )
    self._learning_rate(first_step)
    self._saved = {first_step} if first_step else set()  # steps with a checkpoint
    self._last_good: int | None = None
    # When the last step was done, or what was waited for after it: the next one's time counts from
    # here, for the devices compute it while this one is logged.
    self._mark_s: float | None = None
    writers, loads = [], []
    if jax.process_index() == 0:
      writers = [
        metrics_lib.JsonlWriter(workdir / "metrics.jsonl", first_step),
        metrics_lib.TensorBoardWriter(workdir / "tensorboard", first_step),
      ]
      loads = [metrics_lib.JsonlWriter(workdir / "load.jsonl", first_step)]
    self._writers, self._loads = metrics_lib.Writers(writers), metrics_lib.Writers(loads)

  def step(self, dispatched: Dispatched) -> float | None:
    """Logs a step, and returns its held-out loss if it was evaluated; waits for the devices.

    Raises:
      Diverged: it is the last of `train.max_skipped_steps` in a row that were not finite.
    """
    metrics = jax.device_get(dispatched.metrics)
    now_s, train = time.monotonic(), self._settings.train
    num_tokens = train.batch * train.sequence
    rate = None if self._mark_s is None else num_tokens / (now_s - self._mark_s)
    self._mark_s, eval_loss = now_s, None
    if dispatched.evaluation is not None:
      eval_loss = self._evaluation.finish(dispatched.evaluation)
      self._mark_s = time.monotonic()
      self._progress.message(f"held-out loss after step {dispatched.step + 1}: {eval_loss:.4f}")
    row = figures.row(metrics, self._order, dispatched.expert_LP, self._settings)
    num_skipped_before = int(metrics.skipped_steps) - (not metrics.is_finite)
    row |= {
      "loss": row["loss"] * dispatched.targets_per_byte,
      "eval_loss": eval_loss,
      "tokens_per_s": rate,
      # Of as many steps as were not skipped, which are those that the optimizer counts.
      "learning_rate": self._learning_rate(dispatched.step - num_skipped_before),
    }
    if dispatched.look is not None:
      row |= dispatched.look.figures()
    self._writers.write(dispatched.step, row)
    tokens_LE = figures.expert_tokens(metrics, self._order, dispatched.expert_LP)
    self._loads.write(dispatched.step, {"expert_tokens": tokens_LE})
    if metrics.is_finite:
      self._balancer.observe(tokens_LE)
    self._progress.update(dispatched.step, row)
    if metrics.is_finite and dispatched.step in self._saved:
      self._last_good = dispatched.step
    if metrics.skipped_in_a_row >= train.max_skipped_steps:
      raise Diverged(self._diverged(dispatched.step))
    return eval_loss

  def saved(self, num_done: int) -> None:
    """Takes note of a checkpoint; it counts as good once the step after it is finite."""
    self._saved.add(num_done)
    self._mark_s = time.monotonic()

  def close(self) -> None:
    """Closes the files."""
    self._writers.close()
    self._loads.close()

  def _learning_rate(self, count: int) -> float:
    block, place = divmod(count, _BLOCK)
    return float(self._learning_rates(block)[place])

  def _diverged(self, step: int) -> str:
    train = self._settings.train
    good = "no checkpoint of this run that is known to be good is left"
    path = self._workdir / "checkpoints" / str(self._last_good)
    # Newer ones that are not known to be good may have pushed it out.
    if self._last_good is not None and path.exists():
      good = f"the last good checkpoint is {path}"
    return (
      f"stopped after step {step + 1}: loss or gradient was not finite in"
      f" {train.max_skipped_steps} steps in a row (train.max_skipped_steps); {good};"
      f" lower train.learning_rate={train.learning_rate:g}, delete newer checkpoints if there are"
      " any, and go on"
    )


def summarise(workdir: Path, known: dict) -> None:
  """Writes summary.json and loss.png; does nothing except in process 0.

  Args:
    known: what the summary holds besides figures of the metrics file; with `bigram_loss`.

  Raises:
    OSError: a file cannot be written.
  """
  if jax.process_index() > 0:
    return
  path = workdir / "metrics.jsonl"
  lines = metrics_lib.read_jsonl(path) if path.exists() else []
  metrics_lib.write_summary(workdir / "summary.json", {**known, **figures.over_run(lines)})
  if any(line["loss"] is not None for line in lines):
    plot.loss_plot(path, workdir / "loss.png", known["bigram_loss"])
