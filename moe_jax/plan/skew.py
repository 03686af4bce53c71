"""A step under uneven load: devices with more rows make the others of their collectives wait.

Knows operations, machines and loads; must not know how a load was found.
"""

import numpy as np

from moe_jax.config import Config
from moe_jax.plan import memory, phases, program, units
from moe_jax.plan.load import Load
from moe_jax.plan.machine import Machine, resources, run_block, seconds
from moe_jax.plan.program import ARRIVE, BOTH, RETURN
from moe_jax.plan.steps import AGAIN, ROWS, Step, even_rounds

_AXIS_OF = {"stage": 0, "expert": 1}
_OF_LAYERS = ("forward", "backward")


def end_seconds(settings: Config, machine: Machine, load: Load, tied: bool = True) -> np.ndarray:
  """Returns end_ZX, the seconds of a step on each stage and rank of `expert` under uneven load, in
  all copies alike.

  Args:
    settings: the deployment.
    machine: that it runs on.
    load: which share of a layer's rows each rank of `expert` gets, and how many rounds they take.
    tied: as in program.train.
  """
  table, mesh = memory.table(settings.pipeline, settings.mesh.stage), settings.mesh
  num_layers = units.layers_per_unit(settings)
  further = _further(settings)
  now = np.zeros((mesh.stage, mesh.expert))
  stages = np.arange(mesh.stage)
  for tick, blocks in program.train(settings, tied):
    for block in blocks:
      order = np.argsort(run_block(block, settings, machine).starts, kind="stable")
      occupies = resources(block, settings, machine)
      free: dict[str, np.ndarray] = {}
      ends: dict[int, np.ndarray] = {}
      for place in order.tolist():
        op = block[place]
        took = np.full(now.shape, seconds(op.step, settings, machine))
        if op.step.follows and op.unit in _OF_LAYERS:
          chunks = getattr(table, f"{op.unit}_chunk_QZ")[tick]
          layer_Z = (np.maximum(chunks, 0) * mesh.stage + stages) * num_layers + op.layer
          times, first = _times(settings, op.step, load, layer_Z)
          took = took * (first if op.step.part == AGAIN and further else times)
          if again := further.get(op.step.name):
            more = even_rounds(settings) * (times - first)
            took = took + seconds(again, settings, machine) * more
        start = np.maximum(now, free.get(occupies[place], now))
        for waited in op.after:
          start = np.maximum(start, ends[waited])
        if op.step.is_communication:
          start = _meet(start, op, settings.moe.expert_ranks_per_host)
        ends[place] = start + took
        free[occupies[place]] = ends[place]
      for end in ends.values():
        now = np.maximum(now, end)
  return now


def _further(settings: Config) -> dict[str, Step]:
  """Returns by each backward step the forward one that it runs again in every further round, which
  is computed again whatever is saved. Where nothing is, the steps run again are those of all
  rounds; where a part is, of as many as an even load takes.
  """
  if phases.RUN_AGAIN[settings.pipeline.save] is None:
    return {}
  forward = phases.again_unsaved(settings, units.unit(settings, "forward"))
  return {f"{s.name}, back": s for s in forward if s.follows}


def _times(settings: Config, step: Step, load: Load, layer_Z: np.ndarray):
  """Returns over an even load what a step takes on the layers of each stage, [stages, ranks]: in
  all rounds, and in the first.
  """
  if step.follows == ROWS:
    return load.computed_LX[layer_Z], load.first_LX[layer_Z]
  return load.rounds_L[layer_Z][:, None] / even_rounds(settings), 1.0


def _meet(start_ZX: np.ndarray, op: program.Op, ranks_per_host: int) -> np.ndarray:
  """Returns when a collective begins: when the last of its group is ready."""
  if op.unit in (ARRIVE, RETURN, BOTH):
    by = -1 if op.unit == RETURN else 1
    return np.maximum(start_ZX, np.roll(start_ZX, by, axis=0))
  if op.step.among:
    start_ZHG = start_ZX.reshape(len(start_ZX), -1, ranks_per_host)
    latest = start_ZHG.max({"hosts": 1, "ranks": 2}[op.step.among], keepdims=True)
    return np.broadcast_to(latest, start_ZHG.shape).reshape(start_ZX.shape)
  axes = tuple(_AXIS_OF[axis] for axis in op.step.axes if axis in _AXIS_OF)
  return np.broadcast_to(start_ZX.max(axes, keepdims=True), start_ZX.shape) if axes else start_ZX
