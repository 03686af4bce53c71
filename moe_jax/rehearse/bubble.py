"""What one unit of each kind costs in the compiled program, and the bubble that follows.

The warm-up loop holds forward units alone, the last loop backward units alone, and a conditional's
two outcomes differ by what it guards. Knows the schedule table and the program's loops; must not
know the model.
"""

from collections.abc import Mapping

from moe_jax.pipeline.segments import segments
from moe_jax.pipeline.table import KINDS, Table
from moe_jax.plan.hardware import Chip
from moe_jax.rehearse.exposure import Simulator
from moe_jax.rehearse.program import Branch, Program
from moe_jax.rehearse.ticks import Taken, kind_of, loops_over_ticks


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
  pieces = [each.at for each in segments(table) if len(each.at["head"]) > 1]
  if taken.unknown or len(loops) != len(pieces):
    return None
  costs = dict.fromkeys(KINDS, 0.0)
  for loop, piece in zip(loops, pieces, strict=True):
    by_table = [unit for unit in loop.body.units if isinstance(unit, Branch) and kind_of(unit)]
    none = {**taken.branch_of_turn, **{branch.name: (0,) for branch in by_table}}

    def turn_seconds(branch_of_turn, loop=loop):
      return Simulator(chip, gpus_per_host, branch_of_turn).turn(loop.body).total_s

    bare_s = turn_seconds(none)
    for branch in by_table:
      with_s = turn_seconds({**none, branch.name: (1,)})
      costs[kind_of(branch)] = max(costs[kind_of(branch)], with_s - bare_s)
    # Without what comes and leaves beside some, where there are others.
    least = lambda kind, bare_s=bare_s: min(bare_s, costs[kind] or bare_s)
    if piece["forward"].all() and not piece["backward"].any():
      costs["forward"] = least("forward")
    if piece["backward"].all() and not piece["forward"].any():
      costs["backward"] = least("backward")
  return costs if costs["forward"] and (costs["backward"] or table.is_forward_only) else None
