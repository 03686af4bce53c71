"""Policies against workloads: the rows of launch.bench_balance, its tables and verdicts.

Knows policies and streams; must not know flags or files.
"""

import statistics

import numpy as np

from launch import recording as recording_lib
from moe_jax.balance import bandit, forecast, monitor, policies

_WARMUP_WINDOWS = 2  # left out of the averages: a placement needs one to look at
_BANDIT_STEPS = 2000
_SAME = 0.002  # of the ideal step: less is no difference
_NOT_AVERAGED = ("workload", "policy", "step_over_ideal", "train_with")


def measure(name: str, stream: list[policies.Seen], setting: policies.Setting) -> list[dict]:
  """Returns the rows of one workload, one for each policy, the bandit last.

  Args:
    name: of the workload.
    stream: its micro-batches.
    setting: what they work with.
  """
  first = min(_WARMUP_WINDOWS * setting.window, len(stream) // 2)
  ideal_U = np.array([policies.ideal_seconds(seen, setting) for seen in stream])
  rows, seconds, flags = [], {}, train_flags(setting)
  for policy, make in policies.POLICIES.items():
    if make.needs_scores and stream[0].scores_LTE is None:
      continue
    balancer = make(setting)
    taken = [balancer.take(seen) for seen in stream]
    seconds[policy] = np.array([policies.seconds(each, setting) for each in taken])
    late = taken[first:]
    ratios = np.array([monitor.max_over_mean(each.served_LX) for each in late])
    sent = sum(int(seen.counts_LE.sum()) for seen in stream[first:])
    decided = [each.decision_s for each in late if each.decision_s]
    rows.append(
      {
        "workload": name,
        "policy": policy,
        "max_over_mean": float(ratios.mean()),
        "max_over_mean_p99": float(np.percentile(ratios, 99)),
        "dropped_fraction": sum(each.dropped for each in late) / sent,
        "moved_bytes": float(np.mean([each.moved_bytes for each in late])),
        "decision_us": statistics.median(decided) * 1e6 if decided else 0.0,
        "step_over_ideal": float(seconds[policy][first:].sum() / ideal_U[first:].sum()),
        "train_with": flags.get(policy),
      }
    )
  late_seconds = {policy: each[first:] for policy, each in seconds.items()}
  rows.append(_bandit_row(name, rows, late_seconds, ideal_U[first:], setting.window))
  return rows


def train_flags(setting: policies.Setting) -> dict[str, str]:
  """Returns, for each policy that the train step carries out, the flags that make it do so; the
  others are modelled here only.
  """
  dispatch = "--config.moe.dispatch="
  stealing = f"{dispatch}stealing --config.moe.shadows={setting.num_shadows}"
  biased = "--config.model.router_bias --config.moe.router_balance="
  shadow_tokens = setting.shadow_bytes / setting.link_bytes_per_s / setting.token_s
  return {
    "none": f"{dispatch}dropless",
    "capacity": f"{dispatch}capacity",
    "spill": f"{dispatch}capacity --config.moe.spill",
    "aux": f"{dispatch}dropless --config.moe.load_balance_weight=0.01",
    "bias": f"{dispatch}dropless {biased}bias",
    "quantile": f"{dispatch}dropless {biased}quantile",
    "stealing": stealing,
    "stealing if it pays": f"{stealing} --config.moe.shadow_tokens={shadow_tokens:.0f}",
  }


def verdict(rows: list[dict]) -> str:
  """Returns what to do under a workload, by step time and with every token served.

  First of what leaves the network's result alone; then of the rest, if that is faster.
  """
  served = {
    row["policy"]: row["step_over_ideal"]
    for row in rows
    if row["policy"] in policies.POLICIES and not row["dropped_fraction"]
  }
  exact = [policy for policy in served if policies.POLICIES[policy].is_exact]
  best = min(exact, key=served.get)
  if served["none"] <= served[best] + _SAME:
    best, said = "none", "doing nothing is best"
  else:
    said = f"best is {best}: {served[best]:.3f} of the ideal step, {served['none']:.3f} without"
  other = min(served, key=served.get)
  if served[other] < served[best] - _SAME:
    said += f"; {other}, which changes what tokens get, {served[other]:.3f}"
  return said


def to_text(rows: list[dict]) -> str:
  """Returns the rows of one workload as a table, and the verdict."""
  lines = [
    f"{rows[0]['workload']:<32}{'max/mean':>10}{'P99':>8}{'dropped':>9}{'moved MB':>10}"
    f"{'decision us':>13}{'step/ideal':>12}  launch.train with"
  ]
  for row in rows:
    lines.append(
      f"  {row['policy']:<30}{row['max_over_mean']:>10.3f}{row['max_over_mean_p99']:>8.3f}"
      f"{row['dropped_fraction']:>9.2%}{row['moved_bytes'] / 1e6:>10.2f}"
      f"{row['decision_us']:>13.0f}{row['step_over_ideal']:>12.3f}"
      f"  {row['train_with'] or '(modelled only)'}"
    )
  return "\n".join([*lines, f"  {verdict(rows)}", ""])


def forecast_text(name: str, recording: recording_lib.Recording, window: int) -> str:
  """Returns how well each forecaster would have foreseen the windows of a recording, or that it has
  too few.
  """
  counts_WLE, tokens_WV = windows(recording, window)
  record = forecast.walk_forward(counts_WLE, tokens_WV)
  if not any(map(len, record.values())):
    return (
      f"{name}: no window is foreseen: {len(counts_WLE)} of --window={window} in"
      f" {len(recording.counts_ULE)} micro-batches are too few to judge a forecast by"
    )
  figures = ", ".join(f"{key} {values.mean():.1%}" for key, values in record.items())
  return f"{name}: next window foreseen: {figures}; best by its record: {forecast.best(record)}"


def windows(recording: recording_lib.Recording, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns (counts_WLE, tokens_WV) of whole windows of `size` micro-batches."""
  return (
    monitor.over_windows(recording.counts_ULE.astype(np.int64), size),
    monitor.over_windows(recording.tokens_UV, size),
  )


def ahead(tokens_UV, window: int) -> np.ndarray:
  """Returns ahead_UV, the tokens of the window that begins at each micro-batch."""
  tokens_UV = np.asarray(tokens_UV)
  return np.stack([tokens_UV[u : u + window].sum(0) for u in range(len(tokens_UV))])


def _bandit_row(name, rows, seconds, ideal_U, window: int) -> dict:
  """Returns the row of a bandit over the policies that serve every token; its stream is repeated.

  It knows at first what the cost model says of the first window, and then what it measures.
  """
  whole = [row["policy"] for row in rows if not row["dropped_fraction"]]
  few = window
  chooser = bandit.Bandit({policy: float(seconds[policy][:few].mean()) for policy in whole})
  spent_s = ideal_s = 0.0
  chosen: dict[str, int] = dict.fromkeys(whole, 0)
  for step in range(_BANDIT_STEPS):
    policy, at = chooser.choose(), step % len(ideal_U)
    chooser.observe(policy, float(seconds[policy][at]))
    spent_s, ideal_s = spent_s + seconds[policy][at], ideal_s + ideal_U[at]
    chosen[policy] += 1
  mean = lambda key: (
    sum(row[key] * chosen.get(row["policy"], 0) for row in rows if row["policy"] in chosen)
    / _BANDIT_STEPS
  )
  return {
    "workload": name,
    "policy": "bandit",
    **{key: mean(key) for key in rows[0] if key not in _NOT_AVERAGED},
    "step_over_ideal": float(spent_s / ideal_s),
    "train_with": None,
  }
