"""What one step, and one block of operations, takes on the resources of a cluster.

Five resources a GPU: computation, and a link for each axis of the mesh; axes that lie on the same
wires take turns there. Of what may start, a device starts what can start first. Knows
operations and chips; must not know ticks.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from moe_jax.config import Config
from moe_jax.plan import links
from moe_jax.plan.calibration import NONE, Calibration
from moe_jax.plan.hardware import Cluster
from moe_jax.plan.program import Block
from moe_jax.plan.steps import COMPUTE, Step

# A GPU's streams, in the order in which they are shown.
STREAMS = ("compute", "expert link", "tensor link", "stage link", "data link")


class Machine(NamedTuple):
  """What a step runs on.

  Attributes:
    cluster: the GPUs.
    calibration: what they reach of it.
  """

  cluster: Cluster
  calibration: Calibration = NONE


class BlockRun(NamedTuple):
  """A block by itself; seconds are from its begin.

  Attributes:
    end_s: when its last operation ends.
    starts, ends: of each operation.
  """

  end_s: float
  starts: tuple[float, ...]
  ends: tuple[float, ...]


def stream(step: Step) -> str:
  """Returns the stream that a step runs on; of several axes `expert` names it, or else `stage`, or
  else `data`.
  """
  if not step.is_communication:
    return "compute"
  return f"{next(axis for axis in ('expert', 'stage', 'data', 'tensor') if axis in step.axes)} link"


def seconds(step: Step, settings: Config, machine: Machine) -> float:
  """Returns the seconds of one step by itself, on a rank with an even share of the load."""
  chip, calibration = machine.cluster.chip, machine.calibration
  if step.kind == COMPUTE:
    rate = calibration.flops_per_s(chip, settings.model.dtype, step.is_float32)
    roofline = max(
      step.flops / rate, step.num_bytes / (chip.memory_bytes_per_s * chip.memory_fraction)
    )
    launches = step.kernels * calibration.launch_s
    return (roofline + launches) * calibration.compute_factor(step.phase)
  to = wires(step, settings, machine)
  alone_s = links.seconds(step.kind, step.operand_bytes, to, chip, machine.cluster.symmetric_memory)
  return calibration.link_factor(to.link) * alone_s


def wires(step: Step, settings: Config, machine: Machine) -> links.Group:
  """Returns the group of a collective; of a permutation, a pair of neighbours."""
  ranks = settings.moe.expert_ranks_per_host if step.among else 1
  to = links.group(
    settings.mesh, step.axes, machine.cluster.gpus_per_host, step.among, ranks
  )  # fmt: skip
  if step.kind == "collective-permute" and to.size > 1:
    return links.Group(2, min(2, to.num_hosts), 1 if to.num_hosts > 1 else 2)
  return to


@functools.lru_cache(maxsize=2048)
def run_block(block: Block, settings: Config, machine: Machine) -> BlockRun:
  """Returns a block on a device of which all others are like."""
  return run_once(block, settings, machine)


def run_once(block: Block, settings: Config, machine: Machine) -> BlockRun:
  durations = [seconds(op.step, settings, machine) for op in block]
  return _schedule(block, durations, resources(block, settings, machine))


def resources(block: Block, settings: Config, machine: Machine) -> list[str]:
  """Returns what each operation occupies: computation, or the wires of its collective."""
  return [
    wires(op.step, settings, machine).link if op.step.is_communication else COMPUTE for op in block
  ]


def _schedule(block: Block, durations: Sequence[float], resources: Sequence[str]) -> BlockRun:
  """Returns the block when what can start first always does, of two what stands first."""
  free = dict.fromkeys(resources, 0.0)
  starts, ends = [0.0] * len(block), [0.0] * len(block)
  missing = [len(op.after) for op in block]
  waited_for_by: list[list[int]] = [[] for _ in block]
  for place, op in enumerate(block):
    for waited in op.after:
      waited_for_by[waited].append(place)
  ready = {place: 0.0 for place, number in enumerate(missing) if not number}
  while ready:
    start_s, place = min((max(free[resources[p]], at_s), p) for p, at_s in ready.items())
    del ready[place]
    starts[place], ends[place] = start_s, start_s + durations[place]
    free[resources[place]] = ends[place]
    for later in waited_for_by[place]:
      missing[later] -= 1
      if not missing[later]:
        ready[later] = max(ends[waited] for waited in block[later].after)
  return BlockRun(max(ends, default=0.0), tuple(starts), tuple(ends))
