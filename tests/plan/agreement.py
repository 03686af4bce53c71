"""python -m tests.plan.agreement [--rounds=3]

Predicted against executed step times on eight virtual devices, which share this machine's cores.
Calibrated on one configuration: its units timed alone, and its step. Then a dozen others, unlike it
in mesh, schedule, micro-batches and dispatch, are predicted and run; prints both, the rank
correlation and the median error. Ten minutes on 2 quiet cores; on a busy machine it is worth less.

Devices that share cores hide nothing behind anything: a step costs the sum over devices of what
their units take, masked cells included, and what a tick takes whatever is in it. A unit takes what
its products take at this machine's rate and its bytes at this machine's bandwidth, times what that
kind of unit took of both in the calibration. Seconds are of this process on all cores, which
neighbours disturb least.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from launch import environment

if __name__ == "__main__":  # before jax is imported
  environment.virtual_devices(8)
  environment.keep_freed_memory(8)

import jax
import jax.numpy as jnp

from launch import config_file, stopwatch
from moe_jax import config as config_lib
from moe_jax.pipeline.table import KINDS
from moe_jax.plan import memory, units
from moe_jax.train import step

CALIBRATED = "1f1b 2x2x2, 8 micro-batches"
CASES = {
  CALIBRATED: {},
  "1f1b 2x2x2, 4 micro-batches": {"pipeline": {"micro_batches": 4}},
  "1f1b 2x2x2, 16 micro-batches": {"pipeline": {"micro_batches": 16}},
  "gpipe 2x2x2": {"pipeline": {"schedule": "gpipe"}},
  "interleaved x2 2x2x2": {"pipeline": {"schedule": "interleaved", "chunks": 2}},
  "interleaved x4 2x2x2": {"pipeline": {"schedule": "interleaved", "chunks": 4}},
  "8x1x1": {"mesh": {"expert": 8, "tensor": 1, "stage": 1}, "pipeline": {"micro_batches": 4}},
  "1x2x4": {"mesh": {"expert": 1, "tensor": 2, "stage": 4}},
  "4x2x1": {"mesh": {"expert": 4, "tensor": 2, "stage": 1}},
  "2x1x4": {"mesh": {"expert": 2, "tensor": 1, "stage": 4}},
  "1x1x8, 16 micro-batches": {
    "mesh": {"expert": 1, "tensor": 1, "stage": 8},
    "pipeline": {"micro_batches": 16},
  },
  "saves residuals 2x2x2": {"pipeline": {"save": "residuals"}},
  "saves everything 4x1x2": {
    "mesh": {"expert": 4, "tensor": 1},
    "pipeline": {"save": "everything"},
  },
  "capacity factor 2": {"moe": {"capacity_factor": 2.0}},
  "dropless 2x2x2": {"moe": {"dispatch": "dropless"}},
  "dense 4x2x1": {
    "mesh": {"expert": 4, "tensor": 2, "stage": 1},
    "moe": {"dispatch": "dense"},
  },
}


def settings_of(sections) -> config_lib.Config:
  """Returns configs/laptop.py with 8 layers, a batch that every mesh divides, and some changes."""
  values = config_lib.as_dict(config_lib.from_mapping(config_file.load("configs/laptop.py")))
  values["model"]["layers"] = 8
  values["train"].update(batch=128, sequence=128)
  values["pipeline"].update(schedule="1f1b", chunks=1, micro_batches=8)
  for section, fields in sections.items():
    values[section].update(fields)
  return config_lib.from_mapping(values)


class Machine(NamedTuple):
  """Rates of all cores together: of matrix products, and of reading and writing memory."""

  flops_per_cpu_s: float
  bytes_per_cpu_s: float


def measure() -> Machine:
  """Returns the best rates of a few tries."""
  side = jnp.ones((1536, 1536), jnp.float32)
  many = jnp.ones((2**26,), jnp.float32)
  multiply, add = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
  best = lambda call: min(stopwatch.timed(call)[0].cpu_s for _ in range(6))
  return Machine(
    2 * side.shape[0] ** 3 / best(lambda: multiply(side, side)),
    2 * many.nbytes / best(lambda: add(many)),
  )


def ideal_seconds(settings, on: Machine) -> dict[str, float]:
  """Returns what one unit of each kind takes on all devices at the machine's rates."""
  found = {}
  for kind in KINDS:
    layers = units.layers_per_unit(settings) if kind in ("forward", "backward") else 1
    steps = units.unit(settings, kind)
    each = sum(s.flops / on.flops_per_cpu_s + s.num_bytes / on.bytes_per_cpu_s for s in steps)
    found[kind] = each * layers * settings.mesh.num_devices
  return found


@dataclasses.dataclass(frozen=True)
class Model:
  """Seconds of a step; each constant from one configuration.

  Attributes:
    on: the machine.
    times_ideal: of one unit of each kind.
    tick_s: of a tick, whatever is in it.
  """

  on: Machine
  times_ideal: Mapping[str, float]
  tick_s: float

  def seconds(self, settings) -> float:
    """Returns the predicted seconds of a step."""
    table = memory.table(settings.pipeline, settings.mesh.stage)
    ideal = ideal_seconds(settings, self.on)
    in_units = sum(ideal[k] * self.times_ideal[k] * table.ticks_by_kind[k] for k in KINDS)
    return in_units + table.num_ticks * self.tick_s


class Program(stopwatch.Program):
  """A deployment whose units are timed in seconds of all cores."""

  def unit_cpu_seconds(self, rounds: int) -> Mapping[str, float]:
    """Returns the least seconds of each unit of a tick, run alone on all devices."""
    given = (self._to_compute(self.state.parameters), step.normalised(self.inputs))
    found = {}

    def take(kind, *arrays):
      call = lambda: self._units[kind](*given, *arrays)
      result = stopwatch.timed(call)[1]  # compiles
      found[kind] = min(stopwatch.timed(call)[0].cpu_s for _ in range(3 * rounds))
      return result

    y, saved = take("forward", take("embed"))
    _, _, gy = take("head", y)
    _, gx = take("backward", saved, gy)
    take("embed_gradient", gx)
    return found


def calibrate(settings, unit_s: Mapping[str, float], step_s: float) -> Model:
  """Returns the model that one configuration's measured units and step give."""
  table, on = memory.table(settings.pipeline, settings.mesh.stage), measure()
  ideal = ideal_seconds(settings, on)
  in_units = sum(unit_s[kind] * table.ticks_by_kind[kind] for kind in KINDS)
  print(f"{on}; units {in_units:.3f} s of a step of {step_s:.3f} s", flush=True)
  times_ideal = {kind: unit_s[kind] / ideal[kind] for kind in KINDS}
  return Model(on, times_ideal, max(0.0, step_s - in_units) / table.num_ticks)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=3)
  rounds = parser.parse_args().rounds
  measured, model = {}, None
  for name, sections in CASES.items():
    settings = settings_of(sections)
    run = Program(settings)
    run.train()
    measured[name] = min(run.train().time.cpu_s for _ in range(rounds))
    if model is None:
      model = calibrate(settings, run.unit_cpu_seconds(rounds), measured[name])
    del run
    predicted = model.seconds(settings)
    error = predicted / measured[name] - 1
    print(f"{name:<32}{measured[name]:>8.3f} s{predicted:>9.3f} s{error:>+8.1%}", flush=True)
  names = [name for name in CASES if name != CALIBRATED]
  predicted = [model.seconds(settings_of(CASES[name])) for name in names]
  found = [measured[name] for name in names]
  errors = [abs(p / m - 1) for p, m in zip(predicted, found, strict=True)]
  print(
    f"{len(names)} configurations, calibrated on {CALIBRATED}: rank correlation"
    f" {spearman(predicted, found):.3f}, median error {statistics.median(errors):.1%},"
    f" largest {max(errors):.1%}"
  )


def spearman(a, b) -> float:
  """Returns the correlation of ranks.

  Source: Spearman 1904, The proof and measurement of association between two things.
  """
  ranks = lambda values: [sorted(values).index(value) for value in values]
  return statistics.correlation(ranks(a), ranks(b))


if __name__ == "__main__":
  main()
