"""The report of a rehearsal: one dict, which JSON takes, made from a compiled program.

Knows the order of things: read, lay the schedule table over, simulate, count. Must not know flags,
files, or how the report is shown.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from moe_jax import config
from moe_jax.pipeline.table import Table
from moe_jax.plan import cost
from moe_jax.plan.hardware import CHIPS
from moe_jax.rehearse import (
  bubble,
  claims,
  figures,
  kernels,
  lowering,
  memory,
  picture,
  profile,
  program,
  ticks,
)
from moe_jax.rehearse.exposure import Event, Run, Simulator
from moe_jax.rehearse.pod import Pod
from moe_jax.train import step as step_lib

_PLANNED = CHIPS["planned"]


def train(
  settings: config.Config, pod: Pod, progress: Callable[[str], None] = lambda _: None
) -> tuple[dict, list[Event], str]:
  """Returns the report of the train step on a pod, the timeline of a steady tick on its chip, and
  the profile by which it was scheduled.

  The program is compiled twice: what the first schedule's kernels and collectives take, by the cost
  model, is the profile that XLA schedules the second by. The faster one is reported; the profile is
  empty where that is the first.

  Args:
    settings: the deployment.
    pod: the described pod.
    progress: is told what is being done.

  Raises:
    ValueError: the mesh does not fit the pod.
  """
  mesh = pod.mesh(settings.mesh)
  schedule = step_lib.table(settings)
  first = lowering.train(settings, mesh, progress)
  progress("reading the compiled schedule")
  by_guess = _simulated(first, schedule, pod, mesh)
  schedule_profile = profile.of(by_guess.simulator, by_guess.run)
  compiled = lowering.schedule_again(first, schedule_profile, progress)
  progress("reading the compiled schedule")
  best = by_profile = _simulated(compiled, schedule, pod, mesh)
  if by_guess.run.total_s <= by_profile.run.total_s:
    best, compiled = by_guess, compiled._replace(text=first.text, memory=first.memory)
    schedule_profile = ""
  found, taken = best.program, best.taken
  parts = {}
  for name, chip in (("compiled", pod.chip), ("planned", _PLANNED)):
    simulator = Simulator(chip, pod.gpus_per_host, taken.branch_of_turn)
    run = simulator.run(found)
    if name == "compiled":
      events = picture.steady_tick(found, simulator)
    rows = figures.collectives(simulator, run)
    waiting = bubble.fraction(found, schedule, taken, chip, pod.gpus_per_host)
    parts[name] = {
      "collectives": rows,
      "exposure": figures.exposure(rows, run.compute_s),
      "prediction": figures.prediction(settings, simulator, run, rows, waiting),
    }
  bytes_by_part = memory.by_part(settings, mesh, compiled)
  executed = figures.executed_flops(run)
  report = {
    "pod": {
      "name": pod.name,
      "topology": pod.topology,
      "gpus": len(pod.devices),
      "memory_bytes": pod.chip.memory_bytes,
    },
    "binding": figures.binding(parts["compiled"]["prediction"]),
    "fits": bytes_by_part["total"] <= pod.chip.memory_bytes,
    "memory_bytes": bytes_by_part,
    **parts["compiled"],
    "planned": parts["planned"],
    "flops": {
      "executed_by_phase": executed,
      "executed": sum(executed.values()),
      "model": _model_flops(settings),
    },
    "unknown": {**found.unknown, **taken.unknown},
    "schedule_s": {
      "by_guess": by_guess.run.total_s,
      "by_profile": by_profile.run.total_s,
    },
    "seconds": {"lower": compiled.lower_s, "compile": compiled.compile_s},
    "jax": jax.__version__,
    "config": config.as_dict(settings),
  }
  report["claims"] = [row._asdict() for row in claims.rows(settings, report)]
  return report, events, schedule_profile


class _Simulated(NamedTuple):
  """A compiled program, read and run on its chip."""

  program: program.Program
  taken: ticks.Taken
  simulator: Simulator
  run: Run


def _simulated(compiled: lowering.Compiled, schedule: Table, pod: Pod, mesh) -> _Simulated:
  found = program.read(compiled.text, dict(mesh.shape), kernels.FLOPS)
  taken = ticks.branches_taken(found, schedule)
  simulator = Simulator(pod.chip, pod.gpus_per_host, taken.branch_of_turn)
  return _Simulated(found, taken, simulator, simulator.run(found))


def _model_flops(settings: config.Config) -> float:
  """Returns the model FLOPs of one GPU's share of a step."""
  train = settings.train
  total = cost.train_flops(settings.model, [train.sequence] * train.batch).total
  return total / settings.mesh.num_devices
