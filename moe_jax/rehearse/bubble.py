"""What one unit of each kind costs in the compiled program, and the bubble that follows.

The warm-up loop holds forward units alone, the last loop backward units alone, and a conditional's
two outcomes differ by what it guards. Knows the schedule table and the program's loops; must not
know the model.
"""

from collections.abc import Mapping

from moe_jax.pipeline.table import KINDS, Table
from moe_jax.plan.hardware import Chip
from moe_jax.rehearse.exposure import Simulator
from moe_jax.rehearse.program import Branch, Loop, Program
from moe_jax.rehearse.ticks import Taken, kind_of, loops_over_ticks, segments


def fraction(
  program: Program, table: Table, taken: Taken, chip: Chip, gpus_per_host: int
) -> float | None:
  """Returns the share of a step in which a stage waits for others, or None where the program's
  loops do not show what a unit costs.
  """
  if table.num_stages == 1:
    return 0.0
  costs = unit_seconds(program, table, taken, chip, gpus_per_host)
  return None if costs is None else table.bubble_fraction(costs)


def unit_seconds(
  program: Program, table: Table, taken: Taken, chip: Chip, gpus_per_host: int
) -> Mapping[str, float] | None:
  """Returns the seconds of one unit of every kind, or None where a loop for one is missing."""
  loops = loops_over_ticks(program)
  pieces = [piece for piece in segments(table) if len(piece["head"]) > 1]
  if taken.unknown or len(loops) != len(pieces):
    return None
  costs = dict.fromkeys(KINDS, 0.0)
  for loop, piece in zip(loops, pieces, strict=True):
    bare_s = _turn_seconds(loop, {}, chip, gpus_per_host)
    for branch in (unit for unit in loop.body.units if isinstance(unit, Branch)):
      with_s = _turn_seconds(loop, {branch.name: 1}, chip, gpus_per_host)
      costs[kind_of(branch)] = max(costs[kind_of(branch)], with_s - bare_s)
    if piece["forward"].all() and not piece["backward"].any():
      costs["forward"] = bare_s
    if piece["backward"].all() and not piece["forward"].any():
      costs["backward"] = bare_s
  return costs if costs["forward"] and (costs["backward"] or table.is_forward_only) else None


def _turn_seconds(loop: Loop, on: Mapping[str, int], chip: Chip, gpus_per_host: int) -> float:
  """Returns the seconds of one turn with the conditionals `on` taken and all others not."""
  branches = [unit for unit in loop.body.units if isinstance(unit, Branch)]
  simulator = Simulator(chip, gpus_per_host, {b.name: (on.get(b.name, 0),) for b in branches})
  return simulator.turn(loop.body).total_s
