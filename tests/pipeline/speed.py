"""What the executor costs in time and memory: 1f1b against gpipe and against a plain scan pipeline.

  python -m tests.pipeline.speed

prints the figures and exits with 1 where a bar is missed. Times are of loss and gradients of
configs/laptop.py with 8 layers, on 8 virtual devices, the three in turns; and, without a bar, of a
toy of two small products a layer, where what the executor adds weighs most. It is a command and not
a test because a difference of 2% needs a machine that does nothing else: a test of it would fail by
chance.
"""

import sys
import time

from launch import environment

if __name__ == "__main__":  # before jax is imported
  environment.virtual_devices(8)
  environment.keep_freed_memory(8)

from unittest import mock

import jax
import numpy as np
from jax.sharding import NamedSharding

from launch import config_file, stopwatch
from moe_jax import config
from moe_jax.model import transformer
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.pipeline.saving import SAVE
from moe_jax.train import step
from tests.pipeline import baseline, toy
from tests.pipeline.test_cost import SCHEDULES, STAGES, temporary_bytes
from tests.pipeline.toy import Case

BARS = {"gpipe": 1.02, "baseline": 1.0}  # of the time of each, at most, that 1f1b may take
NUM_LAYERS = 8


def of_model():
  """Returns {name: (compiled step, its arrays)} of the model."""
  values = config_file.load("configs/laptop.py").to_dict()
  values["model"]["layers"] = NUM_LAYERS
  result = {}
  for name in ("1f1b", "gpipe", "baseline"):
    schedule = "1f1b" if name == "1f1b" else "gpipe"
    pipeline = {**values["pipeline"], "schedule": schedule, "chunks": 1}
    settings = config.from_mapping({**values, "pipeline": pipeline})
    mesh = mesh_lib.make(settings.mesh)
    specs = (transformer.specs(settings.model), step.inputs_spec())
    place = lambda leaf, spec, mesh=mesh: jax.device_put(leaf, NamedSharding(mesh, spec))
    parameters = transformer.init(jax.random.key(0), settings.model)
    inputs = step.normalised(stopwatch.random_inputs(settings))
    arrays = jax.tree.map(place, (parameters, inputs), specs)
    run = baseline.run if name == "baseline" else step.executor.run
    with (
      mock.patch.object(transformer, "loss_functions", _without_reports),
      mock.patch.object(step.executor, "run", run),
    ):
      jitted = jax.jit(step.loss_and_gradients(settings, mesh))
      result[name] = (jitted.lower(*arrays).compile(), arrays)
  return result


_LOSS_FUNCTIONS = transformer.loss_functions


def _without_reports(settings: config.Config):
  """Returns the model's functions; the plain pipeline has nowhere to count."""
  functions = _LOSS_FUNCTIONS(settings)

  def layer(*arguments):
    y, statistics, _ = functions.layer(*arguments)
    return y, statistics, ()

  return functions._replace(layer=layer)


def of_toy():
  """Returns {name: (compiled step, its arrays)} of the toy."""
  cases = {
    name: Case(name, STAGES, 16, chunks, expert=2, layers_per_chunk=2 // chunks)
    for name, chunks in SCHEDULES.items()
  }
  arrays = toy.make(2 * STAGES, 16, rows=128, width=256, hidden=512)
  mesh, gpipe = toy.make_mesh(cases["gpipe"]), cases["gpipe"].table()
  steps = {
    name: (toy.pipelined(mesh, case.table(), has_outputs=False), case.table())
    for name, case in cases.items()
  }
  steps["baseline"] = (baseline.pipelined(mesh, toy.functions(has_outputs=False), gpipe), gpipe)
  result = {}
  for name, (function, table) in steps.items():
    placed = toy.place(mesh, table, *arrays)
    result[name] = (jax.jit(function).lower(*placed).compile(), placed)
  return result


def step_seconds(steps, repeats: int = 7) -> dict[str, float]:
  """Returns the median of each step's seconds, the steps taking turns."""
  seconds = {name: [] for name in steps}
  for repeat in range(repeats + 1):
    # Each goes first as often as the others.
    for name in np.roll(list(steps), repeat):
      program, arrays = steps[name]
      start = time.perf_counter()
      jax.block_until_ready(program(*arrays))
      seconds[name].append(time.perf_counter() - start)
  return {name: float(np.median(each[1:])) for name, each in seconds.items()}


def main() -> int:
  for schedule in SCHEDULES:
    for save in SAVE:
      found = [temporary_bytes(schedule, m, save) for m in (16, 64)]
      print(f"{schedule} {save}: {found[0]:,} temporary bytes at m=16, {found[1]:,} at m=64")
  code = 0
  for of, programs, has_bars in (("model", of_model, True), ("toy", of_toy, False)):
    steps = programs()
    rounds = [step_seconds(steps) for _ in range(5)]
    for name, bar in BARS.items():
      ratios = sorted(each["1f1b"] / each[name] for each in rounds)
      said = f", bar {bar}" if has_bars else ""
      print(f"{of}, 1f1b / {name}: median {ratios[2]:.3f} of {[round(r, 3) for r in ratios]}{said}")
      code |= has_bars and ratios[2] > bar
  return int(code)


if __name__ == "__main__":
  sys.exit(main())
