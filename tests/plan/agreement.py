"""python -m tests.plan.agreement [memory [CASE ...]] [times [CASE ...]] [--rounds=3] [--json=PATH]

What is planned beside what is: memory against the compiled program (tests.plan.footprint), and
step times against execution on eight virtual devices, which share this machine's cores. Without
words both; exits with 1 where a case of memory is off by more than its bar, or times by theirs.

Times are calibrated on one configuration: its units timed alone, and its step; and on the machine:
matrix products, passes over memory, collectives of much and of nothing. Then the others, unlike it
in mesh, schedule, micro-batches and dispatch, are predicted (shared_cores) and run; printed
are both, the rank correlation and the median error. Seconds are of this process on all cores, which
neighbours disturb least. 20 minutes each on 2 quiet cores; on a busy machine times are worth less.
With `--json` times may be stopped anywhere: the calibration and each case are written when they are
done, and the same command goes on with the others.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence

from launch import environment

if __name__ == "__main__":  # before jax is imported
  environment.described_devices("h100:16x4")
  environment.virtual_devices(8)
  environment.keep_freed_memory(8)

import jax
import jax.numpy as jnp

from launch import config_file, stopwatch
from moe_jax import config as config_lib
from moe_jax.parallel import collectives
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel.axes import ALL, TENSOR
from moe_jax.train import step
from tests.plan import footprint, shared_cores

_MANY, _GATHERS = 2**18, 20  # elements of a large collective; how many one after the other
LEAST_CORRELATION, MOST_MEDIAN = 0.9, 0.15
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
# The model of shared_cores was made without a look at these.
HELD_OUT = (
  "2x1x4", "1x1x8, 16 micro-batches", "saves residuals 2x2x2", "capacity factor 2",
  "dropless 2x2x2", "dense 4x2x1",
)  # fmt: skip


def settings_of(sections) -> config_lib.Config:
  """Returns configs/laptop.py with 8 layers, a batch that every mesh divides, and some changes."""
  values = config_lib.as_dict(config_lib.from_mapping(config_file.load("configs/laptop.py")))
  values["model"]["layers"] = 8
  values["train"].update(batch=128, sequence=128)
  values["pipeline"].update(schedule="1f1b", chunks=1, micro_batches=8)
  for section, fields in sections.items():
    values[section].update(fields)
  return config_lib.from_mapping(values)


def measure() -> shared_cores.Cores:
  """Returns the best rates of a few tries."""
  side = jnp.ones((1536, 1536), jnp.float32)
  many = jnp.ones((2**26,), jnp.float32)
  multiply, add = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
  nothing_s, much_s = (_gather_seconds(elements) for elements in (1, _MANY))
  return shared_cores.Cores(
    2 * side.shape[0] ** 3 / _least(lambda: multiply(side, side)),
    2 * many.nbytes / _least(lambda: add(many)),
    4 * _MANY / (much_s - nothing_s),
    nothing_s,
  )


def _gather_seconds(elements: int) -> float:
  """Returns what one device of eight spends on an all-gather between pairs."""
  mesh = mesh_lib.make(config_lib.Mesh(expert=2, tensor=2, stage=2))

  def region(x):
    def again(_, x):
      return collectives.gather(x, TENSOR, 0)[: x.size] + 1

    return jax.lax.fori_loop(0, _GATHERS, again, x)

  spec = jax.P(ALL)
  program = jax.jit(jax.shard_map(region, mesh=mesh, in_specs=spec, out_specs=spec))
  x = jax.device_put(jnp.ones(8 * elements), jax.NamedSharding(mesh, spec))
  return _least(lambda: program(x)) / (_GATHERS * 8)


def _least(call: Callable) -> float:
  stopwatch.timed(call)  # compiles
  return min(stopwatch.timed(call)[0].cpu_s for _ in range(20))


class Program(stopwatch.Program):
  """A deployment whose units are timed in seconds of all cores."""

  def calibrate(self, settings: config_lib.Config, rounds: int) -> tuple[shared_cores.Model, float]:
    """Returns the model that the least seconds of its units and of its step give, in turns; and
    those of the step.
    """
    self._unit_cpu_seconds()  # compiles
    units, steps = [], []
    for _ in range(2 * rounds):
      units.append(self._unit_cpu_seconds())
      steps.append(self.train().time.cpu_s)
    unit_s = {kind: min(each[kind] for each in units) for kind in units[0]}
    model = shared_cores.calibrate(settings, measure(), unit_s, min(steps))
    print(model, flush=True)
    return model, min(steps)

  def _compile(self, kind: str, function):
    # An evaluation is not compared, and takes as long to compile as half a case.
    return super()._compile(kind, function) if kind == "train" else None

  def _unit_cpu_seconds(self) -> Mapping[str, float]:
    given = (self._to_compute(self.state.parameters), step.normalised(self.inputs))
    found = {}

    def take(kind, *arrays):
      time, result = stopwatch.timed(lambda: self._units[kind](*given, *arrays))
      found[kind] = time.cpu_s
      return result

    y, saved = take("forward", take("embed"))
    _, _, gy = take("head", y)
    _, gx = take("backward", saved, gy)
    take("embed_gradient", gx)
    return found


class Times:
  """Measured and predicted seconds of each case, kept in a file where there is one."""

  def __init__(self, path: str):
    self._path = pathlib.Path(path) if path else None
    known = json.loads(self._path.read_text()) if path and self._path.exists() else {}
    self.calibration, self.measured = known.get("calibration"), known.get("measured", {})

  def keep(self) -> None:
    if self._path:
      found = {"calibration": self.calibration, "measured": self.measured}
      self._path.write_text(json.dumps(found, indent=2) + "\n")

  @property
  def model(self) -> shared_cores.Model:
    cores, *rest = self.calibration["model"]
    return shared_cores.Model(shared_cores.Cores(*cores), *rest)


def times(rounds: int, names: Sequence[str], path: str) -> bool:
  """Prints predicted and executed step times of some cases, of none all; returns whether those that
  are known by then keep to the bars.

  Each takes turns with the calibrated one, and counts as much more or less than that did beside it:
  what neighbours slow down for minutes they slow down in both.
  """
  found = Times(path)
  settings = settings_of(CASES[CALIBRATED])
  reference = Program(settings)
  reference.train()
  if not found.calibration:
    model, step_s = reference.calibrate(settings, rounds)
    found.calibration = {"model": dataclasses.astuple(model), "step_s": step_s}
    found.keep()
  for name in names or CASES:
    if name != CALIBRATED and name not in found.measured:
      found.measured[name] = _measured(name, reference, rounds) * found.calibration["step_s"]
      found.keep()
  predicted = {name: found.model.seconds(settings_of(CASES[name])) for name in found.measured}
  for name, measured_s in found.measured.items():
    error = predicted[name] / measured_s - 1
    print(f"{name:<32}{measured_s:>8.3f} s{predicted[name]:>9.3f} s{error:>+8.1%}")
  held_out = {name: s for name, s in found.measured.items() if name in HELD_OUT}
  if len(held_out) > 1:
    print(f"of the {len(held_out)} held out: ", end="")
    summary(held_out, predicted)
  if len(found.measured) < 2:
    return True
  correlation, error = summary(found.measured, predicted)
  return correlation >= LEAST_CORRELATION and error <= MOST_MEDIAN


def _measured(name: str, reference: Program, rounds: int) -> float:
  """Returns what a case took over what the calibrated one did beside it."""
  run = Program(settings_of(CASES[name]))
  run.train()
  turns = [(run.train().time.cpu_s, reference.train().time.cpu_s) for _ in range(rounds)]
  mine_s, beside_s = (min(each) for each in zip(*turns, strict=True))
  print(f"{name:<32}{mine_s:>8.3f} s beside {beside_s:.3f} s", flush=True)
  return mine_s / beside_s


def summary(measured: Mapping[str, float], predicted: Mapping[str, float]) -> tuple[float, float]:
  """Prints and returns rank correlation and median error over the cases of `measured`."""
  found, planned = ([of[name] for name in measured] for of in (measured, predicted))
  errors = [abs(p / m - 1) for p, m in zip(planned, found, strict=True)]
  correlation, error = spearman(planned, found), statistics.median(errors)
  print(
    f"{len(measured)} configurations, calibrated on {CALIBRATED}: rank correlation"
    f" {correlation:.3f}, median error {error:.1%}, largest {max(errors):.1%}"
  )
  return correlation, error


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
  parser.add_argument("what", nargs="*", default=["memory", "times"])
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--json", default="", help="where measured times are kept, and gone on from")
  given = parser.parse_args()
  names = [word for word in given.what if word not in ("memory", "times")]
  are_asked = {
    "memory": (footprint.CASES, "memory" in given.what), "times": (CASES, "times" in given.what)
  }  # fmt: skip
  known = [name for cases, is_asked in are_asked.values() if is_asked for name in cases]
  if unknown := [name for name in names if name not in known]:
    print(f"{unknown[0]!r} is no case; choose from {', '.join(known)}", file=sys.stderr)
    return 2
  asked_of = lambda cases: [name for name in names if name in cases]
  kept = count = 0
  if "memory" in given.what and (asked_of(footprint.CASES) or not names):
    kept, count = footprint.table(asked_of(footprint.CASES))
    print(f"{kept} of {count} within {footprint.BAR:.0%}", flush=True)
  are_timed = True
  if "times" in given.what and (asked_of(CASES) or not names):
    are_timed = times(given.rounds, asked_of(CASES), given.json)
  return 0 if kept == count and are_timed else 1


def spearman(a, b) -> float:
  """Returns the correlation of ranks.

  Source: Spearman 1904, The proof and measurement of association between two things.
  """
  ranks = lambda values: [sorted(values).index(value) for value in values]
  return statistics.correlation(ranks(a), ranks(b))


if __name__ == "__main__":
  sys.exit(main())
