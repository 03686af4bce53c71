"""Which branch a compiled step takes in each tick: the schedule's table, laid over the program.

Head and embedding run in some ticks only, and the text of a program cannot say in which. Training,
prefill and decode cut their tables into loops in one way. Knows the table and those loops; must not
know chips or time.
"""

import collections
from collections.abc import Mapping
from typing import NamedTuple

from moe_jax.config import Config
from moe_jax.moe import rounds, stolen
from moe_jax.pipeline import executor
from moe_jax.pipeline.segments import segments
from moe_jax.pipeline.table import Table
from moe_jax.plan.steps import even_rounds
from moe_jax.rehearse.program import Block, Branch, Done, Loop, Program, phase_of
from moe_jax.serve import sampling

# How often loops turn whose data decides that, for `program.read`. The load is even: nothing is
# left for further rounds of a dispatch, and nothing is stolen.
TURNS = {executor.SCOPE: None, rounds.SCOPE: 0, stolen.LOOP_SCOPE: 0}


def turns(step: str, settings: Config) -> Mapping[str, int | None]:
  """Returns `TURNS` of a deployment's step: in training a capacity factor below 1 leaves rows for
  further rounds; a server has a factor of its own, which leaves none.
  """
  return TURNS if step != "train" else {**TURNS, rounds.SCOPE: even_rounds(settings) - 1}


class Taken(NamedTuple):
  """What the table says of the program's branches.

  Attributes:
    branch_of_turn: for each conditional by name, the branch of each turn of the loop round it.
    unknown: how many conditionals the table could not be laid over, by reason.
    assumed: how many are decided by requests, and taken to do the most that can be asked.
  """

  branch_of_turn: Mapping[str, tuple[int, ...]]
  unknown: Mapping[str, int]
  assumed: Mapping[str, int]


def branches_taken(program: Program, table: Table) -> Taken:
  """Returns which branches run: those of loops over ticks from the table, the first one where
  nothing is stolen or rows are left for further rounds of a dispatch, the last one elsewhere.

  The executor makes one loop of each of `segments.segments`; XLA makes straight code of a loop of
  one tick, in which nothing is conditional.
  """
  every = list(_all_branches(program.entry))
  idle = {branch.name: (0,) * turns for branch, turns in every if _asks_for_stolen(branch)}
  of_rounds = [(branch, turns) for branch, turns in every if _is_of_rounds(branch)]
  further = {branch.name: (_taken_of_rounds(branch),) * turns for branch, turns in of_rounds}
  decided = {**idle, **further}
  found: dict[str, tuple[int, ...]] = dict(decided)
  unknown: collections.Counter[str] = collections.Counter()
  assumed: collections.Counter[str] = collections.Counter()
  loops = loops_over_ticks(program)
  pieces = [each.at for each in segments(table) if len(each.at["head"]) > 1]
  matched = [loop.trips for loop in loops] == [len(piece["head"]) for piece in pieces]
  for loop, piece in zip(loops, pieces if matched else [None] * len(loops), strict=True):
    for branch in _branches(loop.body):
      kind = kind_of(branch)
      if piece is not None and kind is not None:
        found[branch.name] = tuple(piece[kind].astype(int).tolist())
      elif branch.name not in decided:
        unknown[f"conditional {branch.name}, taken in every turn"] += 1
  for branch in _branches(program.entry, outside_loops=True):
    if not _is_sampling(branch) and branch.name not in decided:
      unknown[f"conditional {branch.name}, taken in every turn"] += 1
  samplings = sum(_is_sampling(branch) for branch, _ in every)
  for number, what in (
    (len(idle), "stealing: nothing is stolen"),
    (len(further), "further rounds of a dispatch: as often as their loops turn"),
    (samplings, "sampling: every request draws within top-k and top-p"),
  ):
    if number:
      assumed[f"conditional of {what}"] = number
  return Taken(found, dict(unknown), dict(assumed))


def executions(block: Block, branch_of_turn: Mapping[str, tuple[int, ...]]) -> collections.Counter:
  """Returns how often each kernel and each collective of a block runs, its loops' turns multiplied.

  Args:
    block: the program's entry, or a part of it.
    branch_of_turn: of `Taken`; of a conditional that is not there the last branch always runs.
  """
  found: collections.Counter = collections.Counter()
  for unit in block.units:
    if isinstance(unit, Loop):
      for turn, turns in _kinds_of_turn(unit, branch_of_turn):
        taken = {name: (branches[turn],) for name, branches in _in(unit, branch_of_turn).items()}
        for inner, count in executions(unit.body, {**branch_of_turn, **taken}).items():
          found[inner] += turns * count
    elif isinstance(unit, Branch):
      found += executions(unit.branches[branch_of_turn.get(unit.name, (-1,))[0]], branch_of_turn)
    elif not isinstance(unit, Done):
      found[unit] += 1
  return found


def _in(loop: Loop, branch_of_turn: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
  """Returns the part of `branch_of_turn` that is of a loop's own conditionals."""
  own = [unit.name for unit in loop.body.units if isinstance(unit, Branch)]
  return {name: branch_of_turn[name] for name in own if name in branch_of_turn}


def _kinds_of_turn(loop: Loop, branch_of_turn: Mapping) -> list[tuple[int, int]]:
  """Returns (a first turn, how many are like it) for each way that a loop's conditionals go."""
  own = _in(loop, branch_of_turn)
  ways: dict[tuple[int, ...], list[int]] = {}
  for turn in range(loop.trips if own else min(loop.trips, 1)):
    ways.setdefault(tuple(branches[turn] for branches in own.values()), []).append(turn)
  return [(turns[0], len(turns) if own else loop.trips) for turns in ways.values()]


def loops_over_ticks(program: Program) -> list[Loop]:
  """Returns the loops of the program itself, but for those that are taken not to turn, and for what
  stood inside a loop of one tick, of which XLA has made straight code.
  """
  is_outermost = lambda loop: (
    loop.op_name.split("/")[-1] in ("while", "") and "while/" not in loop.op_name
  )
  loops = [unit for unit in program.entry.units if isinstance(unit, Loop)]
  return [loop for loop in loops if loop.trips and is_outermost(loop)]


def _branches(block: Block, outside_loops: bool = False):
  for unit in block.units:
    if isinstance(unit, Branch):
      yield unit
    elif isinstance(unit, Loop) and not outside_loops:
      yield from _branches(unit.body)


def _all_branches(block: Block, turns: int = 1):
  """Yields every conditional, those inside others too, and how often the loop round it turns."""
  for unit in block.units:
    if isinstance(unit, Branch):
      yield unit, turns
      for inner in unit.branches:
        yield from _all_branches(inner, turns)
    elif isinstance(unit, Loop):
      yield from _all_branches(unit.body, unit.trips)


def _asks_for_stolen(branch: Branch) -> bool:
  """Returns whether its first branch is what runs where nothing is stolen."""
  return stolen.BRANCH_SCOPE in branch.op_name.split("/")[-2:]


def _is_of_rounds(branch: Branch) -> bool:
  """Returns whether its first branch is the loop over a dispatch's further rounds."""
  return any(rounds.SCOPE in part for part in branch.op_name.split("/")[-2:])


def _taken_of_rounds(branch: Branch) -> int:
  """Returns which of its branches runs: that of the loop, if it turns, else the last."""
  turns = sum(unit.trips for unit in branch.branches[0].units if isinstance(unit, Loop))
  return 0 if turns else len(branch.branches) - 1


def _is_sampling(branch: Branch) -> bool:
  """Returns whether the requests' wishes decide it, and not the table."""
  return sampling.SCOPE in branch.op_name.split("/")


def kind_of(branch: Branch) -> str | None:
  """Returns which unit a conditional of a tick guards, by the scopes inside it."""
  inside = [name for block in branch.branches for name in block.op_names]
  phases = {phase_of(name) for name in inside}
  if "head" in phases:
    return "head"
  if "embed" not in phases:
    return None
  is_gradient = any("transpose(" in name for name in inside if phase_of(name) == "embed")
  return "embed_gradient" if is_gradient else "embed"
