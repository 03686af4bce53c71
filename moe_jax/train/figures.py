"""What a step's line in the metrics file and the summary hold: plain numbers from reports.

Knows reports and counts; must not know where the numbers go.
"""

import numpy as np

from moe_jax.balance import monitor
from moe_jax.train.step import Metrics


def row(metrics: Metrics, order: np.ndarray, micro_batches: int) -> dict:
  """Returns the figures of one step.

  Args:
    metrics: of the step, as numpy arrays; layers in the pipeline's placement.
    order: logical layer at each place, [L].
    micro_batches: of the step.

  Returns:
    `loss` (cross-entropy in nats per token), `grad_norm`, `load_max_over_mean` (one number for each
    layer in logical order; so `load_variation`, the coefficient of variation, and `load_p99`, the
    99th percentile over the mean), `dropped_fraction`, `stolen_fraction` (of assignments, served
    by another rank than the expert's own), `skipped_steps`, `load_balance_loss` and `router_z_loss`
    (unweighted means over layers and micro-batches).
  """
  report, counts_LE = metrics.losses.report, expert_tokens(metrics, order)
  mean = lambda loss_L: float(loss_L.mean()) / micro_batches
  return {
    "loss": float(metrics.losses.cross_entropy),
    "grad_norm": float(metrics.gradient_norm),
    "load_max_over_mean": monitor.max_over_mean(counts_LE),
    "load_variation": monitor.coefficient_of_variation(counts_LE),
    "load_p99": monitor.percentiles(counts_LE, (99,))[:, 0],
    "dropped_fraction": float(monitor.dropped_fraction(report.counts._asdict())),
    "stolen_fraction": float(report.counts.stolen.sum() / max(report.counts.sent.sum(), 1)),
    "skipped_steps": int(metrics.skipped_steps),
    "load_balance_loss": mean(report.losses.load_balance),
    "router_z_loss": mean(report.losses.router_z),
  }


def expert_tokens(metrics: Metrics, order: np.ndarray) -> np.ndarray:
  """Returns counts_LE, the step's assignments to each expert, layers in logical order.

  Args:
    metrics: of the step, as numpy arrays; layers in the pipeline's placement.
    order: logical layer at each place, [L].
  """
  return metrics.losses.report.assigned_E[np.argsort(order)]


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
