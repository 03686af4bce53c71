"""The report of a rehearsal: one dict, which JSON takes, made from a compiled program.

Knows the order of things: compile, read, lay the schedule table over, simulate, count. Must not
know flags, files, or how the report is shown.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from moe_jax import config
from moe_jax.pipeline.table import Table
from moe_jax.plan import claim_rows
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
from moe_jax.rehearse import workload as workloads
from moe_jax.rehearse.exposure import Run, Simulator
from moe_jax.rehearse.pod import Pod
from moe_jax.rehearse.workload import Workload

_PLANNED = CHIPS["planned"]


class Report(NamedTuple):
  """What a rehearsal finds.

  Attributes:
    found: the report.
    tick: a steady tick on the pod's chip.
    profile: by which the program was scheduled; empty where XLA's own guess was better.
  """

  found: dict
  tick: picture.Tick
  profile: str


def make(
  step: str,
  settings: config.Config,
  pod: Pod,
  progress: Callable[[str], None] = lambda _: None,
  once: bool = False,
) -> Report:
  """Returns the report of a step on a pod.

  The program is compiled twice: what the first schedule's kernels and collectives take, by the cost
  model, is the profile that XLA schedules the second by. The faster one is reported.

  Args:
    step: "train", "prefill" or "decode".
    settings: the deployment.
    pod: the described pod.
    progress: is told what is being done.
    once: whether it is compiled only once, by XLA's own guess.

  Raises:
    ValueError: the mesh does not fit the pod.
  """
  mesh = pod.mesh(settings.mesh)
  workload = workloads.WORKLOADS[step](settings)
  best = _scheduled(step, settings, pod, mesh, workload.table, progress, once)
  parts = {}
  for name, chip in (("compiled", pod.chip), ("planned", _PLANNED)):
    simulator = Simulator(chip, pod.gpus_per_host, best.taken.branch_of_turn)
    parts[name] = _on_chip(settings, workload, best, simulator)
    if name == "compiled":
      tick = picture.steady_tick(best.program, simulator)
  bytes_by_part = memory.by_part(settings, best.compiled)
  executed, prediction = figures.executed_flops(best.run), parts["compiled"]["prediction"]
  found = {
    "pod": {
      "name": pod.name,
      "topology": pod.topology,
      "gpus": len(pod.devices),
      "unit": "GPU",
      "memory_bytes": pod.chip.memory_bytes,
      "symmetric_memory": figures.is_symmetric(best.run),
    },
    "workload": workloads.as_dict(workload),
    "binding": claim_rows.binding(
      prediction["compute_s"],
      prediction["seconds_by_link"],
      prediction["step_s"],
      f" on {prediction['chip']}",
    ),
    "fits": bytes_by_part["total"] <= pod.chip.memory_bytes,
    "memory_bytes": bytes_by_part,
    **parts["compiled"],
    "planned": parts["planned"],
    "flops": {
      "executed_by_phase": executed,
      "executed": sum(executed.values()),
      "model": workload.model_flops / settings.mesh.num_devices,
    },
    "unknown": {**best.program.unknown, **best.taken.unknown},
    "assumed": {**best.program.assumed, **best.taken.assumed},
    "schedule_s": best.schedule_s,
    "seconds": {"lower": best.compiled.lower_s, "compile": best.compiled.compile_s},
    "jax": jax.__version__,
    "config": config.as_dict(settings),
  }
  found["claims"] = [row._asdict() for row in claims.rows(settings, found)]
  return Report(found, tick, best.profile)


class _Simulated(NamedTuple):
  """A compiled program, read and run on its chip."""

  program: program.Program
  taken: ticks.Taken
  simulator: Simulator
  run: Run


class _Scheduled(NamedTuple):
  """The better one of two schedules of a program, or the only one."""

  compiled: lowering.Compiled
  program: program.Program
  taken: ticks.Taken
  run: Run
  profile: str
  schedule_s: dict[str, float]


def _scheduled(step, settings, pod: Pod, mesh, table: Table, progress, once: bool) -> _Scheduled:
  compiled = lowering.COMPILED[step](settings, mesh, progress)
  progress("reading the compiled schedule")
  turns = ticks.turns(step, settings)
  best, by = _simulated(compiled, table, turns, pod, mesh), ""
  schedule_s = {"by_guess": best.run.total_s}
  if not once:
    profiled = profile.of(best.simulator, best.program)
    second = lowering.schedule_again(compiled, profiled, progress)
    progress("reading the compiled schedule")
    by_profile = _simulated(second, table, turns, pod, mesh)
    schedule_s["by_profile"] = by_profile.run.total_s
    if by_profile.run.total_s < best.run.total_s:
      compiled, best, by = second, by_profile, profiled
    else:
      compiled = second._replace(text=compiled.text, memory=compiled.memory)
  return _Scheduled(compiled, best.program, best.taken, best.run, by, schedule_s)


def _simulated(compiled: lowering.Compiled, table: Table, turns, pod: Pod, mesh) -> _Simulated:
  found = program.read(compiled.text, dict(mesh.shape), kernels.KERNELS, turns)
  taken = ticks.branches_taken(found, table)
  simulator = Simulator(pod.chip, pod.gpus_per_host, taken.branch_of_turn)
  return _Simulated(found, taken, simulator, simulator.run(found))


def _on_chip(
  settings: config.Config, workload: Workload, best: _Scheduled, simulator: Simulator
) -> dict:
  """Returns what depends on the chip that the schedule runs on."""
  run = simulator.run(best.program)
  rows = figures.collectives(simulator, run)
  waiting = bubble.fraction(
    best.program, workload.table, best.taken, simulator.chip, simulator.gpus_per_host
  )
  return {
    "collectives": rows,
    "exposure": {
      **figures.exposure(rows, run.compute_s),
      "beside_kernels_fraction": figures.beside_kernels_fraction(best.program, run),
    },
    "prediction": figures.prediction(settings, workload, simulator, run, rows, waiting),
  }
