"""What a step's line in the metrics file and the summary hold: plain numbers from reports.

Knows reports and counts; must not know where the numbers go.
"""

import numpy as np

from moe_jax import config
from moe_jax.balance import monitor
from moe_jax.train.step import Metrics


def row(
  metrics: Metrics, order: np.ndarray, expert_LP: np.ndarray, settings: config.Config
) -> dict:
  """Returns the figures of one step.

  Args:
    metrics: of the step, as numpy arrays; layers in the pipeline's placement.
    order: logical layer at each place, [L].
    expert_LP: the expert at each slot, layers in logical order.
    settings: of the run.

  Returns:
    `loss` (cross-entropy in nats per token), `grad_norm`, `load_max_over_mean` (one number for each
    layer in logical order; so `load_variation`, the coefficient of variation, `load_p99`, the 99th
    percentile over the mean, and `load_queue`, the tokens that the most asked expert has beyond
    `moe.capacity_factor` times an even share; `rank_load_max_over_mean` is of ranks of `expert`, as
    routed), `dropped_fraction`, `stolen_fraction` (of assignments, served by another rank than the
    expert's own), `skipped_steps`, `load_balance_loss` and `router_z_loss` (unweighted means over
    layers and micro-batches).
  """
  report, counts_LE = metrics.losses.report, expert_tokens(metrics, order, expert_LP)
  mean = lambda loss_L: float(loss_L.mean()) / settings.pipeline.micro_batches
  counts_LP = np.take_along_axis(counts_LE, expert_LP, 1)
  room_L1 = np.ceil(settings.moe.capacity_factor * counts_LE.mean(1, keepdims=True)).astype(int)
  return {
    "loss": float(metrics.losses.cross_entropy),
    "grad_norm": float(metrics.gradient_norm),
    "load_max_over_mean": monitor.max_over_mean(counts_LE),
    "rank_load_max_over_mean": monitor.max_over_mean(
      monitor.rank_counts(counts_LP, settings.mesh.expert)
    ),
    "load_variation": monitor.coefficient_of_variation(counts_LE),
    "load_p99": monitor.percentiles(counts_LE, (99,))[:, 0],
    "load_queue": monitor.queue(counts_LE, room_L1).max(1),
    "dropped_fraction": float(monitor.dropped_fraction(report.counts._asdict())),
    "stolen_fraction": float(report.counts.stolen.sum() / max(report.counts.sent.sum(), 1)),
    "skipped_steps": int(metrics.skipped_steps),
    "load_balance_loss": mean(metrics.losses.auxiliary.load_balance),
    "router_z_loss": mean(metrics.losses.auxiliary.router_z),
  }


def expert_tokens(metrics: Metrics, order: np.ndarray, expert_LP: np.ndarray) -> np.ndarray:
  """Returns counts_LE, the step's assignments to each expert, layers and experts in logical order.

  Args:
    metrics: of the step, as numpy arrays; layers in the pipeline's placement, experts in slots.
    order: logical layer at each place, [L].
    expert_LP: the expert at each slot, layers in logical order.
  """
  counts_LP = metrics.losses.report.assigned_E[np.argsort(order)]
  return np.take_along_axis(counts_LP, np.argsort(expert_LP, 1), 1)


def over_run(lines: list[dict]) -> dict:
  """Returns `tokens_per_s`, the median over the steps, and `dropped_fraction`, the mean over them.

  Args:
    lines: of the metrics file; a figure that none of them holds is None.
  """
  known = lambda name: [line[name] for line in lines if line.get(name) is not None]
  rates, dropped = known("tokens_per_s"), known("dropped_fraction")
  return {
    "tokens_per_s": float(np.median(rates)) if rates else None,
    "dropped_fraction": float(np.mean(dropped)) if dropped else None,
  }
