"""Times what watching the load costs a balanced run, and what stealing costs that has nothing to
steal.

Run `python -m tests.balance.overhead`: the train step of configs/laptop.py, dropless, on 8 virtual
devices, in three forms that take turns: silent (the layers report nothing, and nothing is written),
watched (the step as it is; then, before the next begins, what the log makes of the load and
writes), and armed (watched, with `moe.dispatch=stealing` at a price at which no shadow pays). All
three route alike, in one round of exchanges. Exits with 1 where a bar is missed: a command and not
a test, for a difference of 1% needs a machine that does nothing else. Where others compute too,
`--clock=cpu`: the process's own time on all cores.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from launch import environment

if __name__ == "__main__":  # before jax is imported; as launch.train does
  environment.virtual_devices(8)
  environment.keep_freed_memory(8)

import jax
import numpy as np
from jax.sharding import NamedSharding

from launch import config_file, stopwatch
from moe_jax import config
from moe_jax.balance import monitor
from moe_jax.model import transformer
from moe_jax.observe import metrics as metrics_lib
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.train import optimizer, state, step

ROOT = Path(__file__).parents[2]
MOST = {"watched / silent": 1.01, "armed / watched": 1.02}
NEVER = 1e9  # tokens: no shadow is worth so many


def settings_of(batch: int | None, dispatch: str, shadow_tokens: float = 0.0) -> config.Config:
  """Returns the deployment; a round of exchanges has room for twice the even load.

  Args:
    batch: sequences of a step, by default those of the file. What stealing costs while it is idle
      goes by the experts' weights, so its share falls with the rows that an expert multiplies: of
      a micro-batch 128 here, 2048 at pod64.
  """
  values = config_file.load(str(ROOT / "configs" / "laptop.py")).to_dict()
  moe = {"dispatch": dispatch, "shadow_tokens": shadow_tokens, "capacity_factor": 2.0}
  train = {**values["train"], "batch": batch or values["train"]["batch"]}
  return config.from_mapping({**values, "moe": moe, "train": train})


class Form:
  """One form of the step, compiled, with its state on the devices."""

  def __init__(self, settings: config.Config, folder: Path | None):
    """Compiles.

    Args:
      folder: where the load is written; None for a step whose layers report nothing.
    """
    self._mesh = mesh = mesh_lib.make(settings.mesh)
    made = optimizer.make(settings.train)
    order = state.placement(settings, step.table(settings).layer_order)
    self._state = state.initialiser(settings, mesh, made, order)(jax.random.key(0))
    place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
    inputs = stopwatch.random_inputs(settings)
    self._inputs = jax.tree.map(place, inputs, step.inputs_spec())
    functions = transformer.loss_functions if folder else _silent
    with mock.patch.object(transformer, "loss_functions", functions):
      jitted = jax.jit(step.train_step(settings, mesh, made), donate_argnums=0)
      self._step = jitted.lower(self._state, self._inputs).compile()
    self._figures = self._tokens = metrics_lib.Writers([])
    if folder:
      figures = metrics_lib.JsonlWriter(folder / "metrics.jsonl")
      self._figures = metrics_lib.Writers([figures, metrics_lib.TensorBoardWriter(folder)])
      self._tokens = metrics_lib.JsonlWriter(folder / "load.jsonl")

  def run(self, number: int):
    """Takes a step, writes its load if that is watched, and returns its metrics."""
    self._state, metrics = self._step(self._state, self._inputs)
    metrics = jax.device_get(metrics)
    if metrics.losses.report:
      counts_LE = metrics.losses.report.assigned_E
      self._figures.write(number, _load(counts_LE))
      self._tokens.write(number, {"expert_tokens": counts_LE})
    return metrics

  def check(self, number: int):
    """Checks that every token is served at home in one round, and the step is finite."""
    metrics = self.run(number)
    counts, assigned_LE = metrics.losses.report.counts, metrics.losses.report.assigned_E
    assert metrics.is_finite
    assert not counts.stolen.any() and not counts.dropped.any()
    assert (counts.rounds == counts.rounds.min()).all(), counts.rounds
    return assigned_LE


def _silent(settings: config.Config):
  """Returns the model's functions, the layers without reports."""
  functions = _LOSS_FUNCTIONS(settings)

  def layer(weights, shared, x, inputs):
    y, statistics, _ = functions.layer(weights, shared, x, inputs)
    return y, statistics, ()

  return functions._replace(layer=layer)


_LOSS_FUNCTIONS = transformer.loss_functions


def _load(counts_LE) -> dict:
  """Returns the figures of the load that the log of a run writes."""
  return {
    "max_over_mean": monitor.max_over_mean(counts_LE),
    "variation": monitor.coefficient_of_variation(counts_LE),
    "p99": monitor.percentiles(counts_LE, (99,))[:, 0],
  }


def measure(forms: dict[str, Form], turns: int) -> dict[str, dict[str, np.ndarray]]:
  """Returns seconds of every turn, by clock and form."""
  seconds = {clock: {name: [] for name in forms} for clock in ("wall", "cpu")}
  for turn in range(1, turns + 1):
    for name in np.roll(list(forms), turn):  # each goes first as often as the others
      starts = time.perf_counter(), time.process_time()
      forms[name].run(turn)
      seconds["wall"][name].append(time.perf_counter() - starts[0])
      seconds["cpu"][name].append(time.process_time() - starts[1])
  return {
    clock: {name: np.array(each) for name, each in found.items()}
    for clock, found in seconds.items()
  }


def report(seconds: dict[str, dict[str, np.ndarray]], clock: str) -> int:
  """Prints the figures; returns 1 where a bar is missed by `clock`."""
  code = 0
  for name, most in MOST.items():
    form, base = name.split(" / ")
    for each, found in seconds.items():
      ratios = found[form] / found[base]
      fastest, median = found[form].min() / found[base].min(), float(np.median(ratios))
      spread = np.percentile(ratios, (25, 75))
      is_it = each == clock
      code |= is_it and median > most
      print(
        f"{name:<18}{each:>5}: median {median:.4f} (quartiles {spread[0]:.4f} to {spread[1]:.4f}),"
        f" of the fastest {fastest:.4f}" + (f"; bar {most}" if is_it else "")
      )
  for name, each in seconds[clock].items():
    print(f"{name}: {np.median(each):.4f} s a step ({clock})")
  return int(code)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--turns", type=int, default=60)
  parser.add_argument("--batch", type=int, help="sequences of a step; by default the file's")
  parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
  args = parser.parse_args()
  with (
    tempfile.TemporaryDirectory() as folder,
    jax.numpy_dtype_promotion("standard"),  # optax counts its steps in integers
  ):
    forms = {
      "silent": Form(settings_of(args.batch, "dropless"), None),
      "watched": Form(settings_of(args.batch, "dropless"), Path(folder) / "watched"),
      "armed": Form(settings_of(args.batch, "stealing", NEVER), Path(folder) / "armed"),
    }
    alike = [forms[name].check(0) for name in ("watched", "armed")]
    np.testing.assert_array_equal(*alike)
    forms["silent"].run(0)
    return report(measure(forms, args.turns), args.clock)


if __name__ == "__main__":
  sys.exit(main())
