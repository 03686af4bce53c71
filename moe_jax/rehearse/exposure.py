"""When everything in a compiled program runs on a chip, and how much communication hides.

One stream of computation, which runs kernels in schedule order, each as long as the chip's roofline
says, and idle before it while it is launched; and two links, inside the host and between hosts,
each busy with one collective at a time. A collective begins when the schedule reaches it and its
link is free; its time is hidden as far as the computation runs on meanwhile, launches included.
What a collective takes of the processors and of memory slows no kernel here. Knows programs and
chips; must not know the model.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from moe_jax.plan.calibration import LAUNCH_S
from moe_jax.plan.hardware import Chip
from moe_jax.plan.links import BETWEEN, INSIDE
from moe_jax.rehearse.program import Block, Branch, Collective, Compute, Done, Loop, Program
from moe_jax.rehearse.timing import collective_seconds, compute_seconds, link_of

# A loop of more turns is one event of a timeline.
_MOST_TURNS_SHOWN = 8


class Event(NamedTuple):
  """Something on the timeline.

  Attributes:
    row: "compute", "inside", "between", or "waiting" for exposed communication.
    phase: of the model.
    is_backward: as of the kernel or collective.
  """

  row: str
  name: str
  phase: str
  start_s: float
  end_s: float
  is_backward: bool


@dataclasses.dataclass
class Run:
  """What a run of a program, or of a part of it, took.

  Attributes:
    total_s: from the first kernel to the last.
    compute_s: of which kernels ran or were launched.
    times: how often each kernel and each collective ran.
    hidden_s: of each collective, over all its runs.
    waited_for: the unit after the Done at which each collective was waited for, by collective.
  """

  total_s: float = 0.0
  compute_s: float = 0.0
  times: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  hidden_s: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  waited_for: dict[str, str] = dataclasses.field(default_factory=dict)

  def add(self, other: "Run", times: int) -> None:
    """Adds `times` runs of `other`."""
    self.total_s += times * other.total_s
    self.compute_s += times * other.compute_s
    for unit, count in other.times.items():
      self.times[unit] += times * count
    for unit, seconds in other.hidden_s.items():
      self.hidden_s[unit] += times * seconds
    self.waited_for |= other.waited_for


class _Flight(NamedTuple):
  unit: Collective
  begin_s: float
  end_s: float


class _Clock:
  """Now, and what is on its way."""

  def __init__(self):
    self.now_s = 0.0
    self.link_free_s = {INSIDE: 0.0, BETWEEN: 0.0}
    self.flights: dict[str, _Flight] = {}
    self.waits: list[tuple[float, float]] = []

  @property
  def is_quiet(self) -> bool:
    """Whether nothing is on its way any more: then the past does not matter."""
    return all(flight.end_s <= self.now_s for flight in self.flights.values()) and all(
      free_s <= self.now_s for free_s in self.link_free_s.values()
    )


class Simulator:
  """Runs a program on a chip."""

  def __init__(
    self,
    chip: Chip,
    gpus_per_host: int,
    branch_of_turn: Mapping[str, tuple[int, ...]],
    launch_s: float = LAUNCH_S,
  ):
    """Keeps what it is given.

    Args:
      chip: what kernels and collectives run on.
      gpus_per_host: consecutive devices that share a host.
      branch_of_turn: for each conditional, the branch of each turn of the loop round it; of one
        that is not there the last branch always runs.
      launch_s: of each kernel.
    """
    self.launch_s = launch_s
    self.chip, self.gpus_per_host, self.branch_of_turn = chip, gpus_per_host, branch_of_turn
    self._seconds: dict[Any, float] = {}
    self._links: dict[Collective, str] = {}
    self._quiet_runs: dict[Any, Run] = {}

  def run(self, program: Program) -> Run:
    """Returns what the whole program takes."""
    return self._quiet(program.entry, 0)

  def turn(self, block: Block, turn: int = 0) -> Run:
    """Returns what turn `turn` of a loop's body takes, nothing being on its way."""
    return self._quiet(block, turn)

  def usual_turn(self, loop: Loop) -> int:
    """Returns a turn of the kind that is most frequent, by the branches that turns take."""
    kinds = self._turns(loop, 0)
    return max(kinds, key=kinds.get)[1]

  def timeline(self, block: Block, turn: int) -> list[Event]:
    """Returns what happens in one run of `block`, at turn `turn` of the loop round it.

    Loops inside it that turn often are one event of computation, what they wait for included.
    """
    events: list[Event] = []
    self._block(_Clock(), Run(), block, turn, events)
    return events

  def seconds(self, unit: Compute | Collective) -> float:
    """Returns the seconds of one kernel, its launch included, or of one collective by itself."""
    if unit not in self._seconds:
      if isinstance(unit, Compute):
        self._seconds[unit] = compute_seconds(unit, self.chip) + self.launch_s
      else:
        self._seconds[unit] = collective_seconds(unit, self.chip, self.gpus_per_host)
    return self._seconds[unit]

  def link(self, unit: Collective) -> str:
    """Returns the link that a collective is on."""
    if unit not in self._links:
      self._links[unit] = link_of(unit, self.gpus_per_host)
    return self._links[unit]

  def _quiet(self, block: Block, turn: int) -> Run:
    """Returns a run of `block` with nothing on its way at its begin."""
    key = (block, *(self._branch(u, turn) for u in block.units if isinstance(u, Branch)))
    if key not in self._quiet_runs:
      clock, run = _Clock(), Run()
      self._block(clock, run, block, turn, None)
      run.total_s = clock.now_s
      self._quiet_runs[key] = run
    return self._quiet_runs[key]

  def _branch(self, branch: Branch, turn: int) -> int:
    taken = self.branch_of_turn.get(branch.name)
    return len(branch.branches) - 1 if taken is None else taken[turn]

  def _block(self, clock: _Clock, run: Run, block: Block, turn: int, events) -> None:
    for place, unit in enumerate(block.units):
      if isinstance(unit, Compute):
        self._compute(clock, run, unit, events)
      elif isinstance(unit, Collective):
        self._begin(clock, run, unit)
        if not unit.is_async:
          self._wait(clock, run, unit.name, block, place, events)
      elif isinstance(unit, Done):
        self._wait(clock, run, unit.name, block, place, events)
      elif isinstance(unit, Branch):
        self._block(clock, run, unit.branches[self._branch(unit, turn)], turn, events)
      else:
        self._loop(clock, run, unit, events)

  def _compute(self, clock: _Clock, run: Run, unit: Compute, events) -> None:
    seconds = self.seconds(unit)
    if events is not None:
      end_s = clock.now_s + seconds
      events.append(Event("compute", unit.name, unit.phase, clock.now_s, end_s, unit.is_backward))
    clock.now_s += seconds
    run.compute_s += seconds
    run.times[unit] += 1

  def _begin(self, clock: _Clock, run: Run, unit: Collective) -> None:
    link = self.link(unit)
    begin_s = max(clock.now_s, clock.link_free_s[link])
    end_s = begin_s + self.seconds(unit)
    clock.link_free_s[link] = end_s
    clock.flights[unit.name] = _Flight(unit, begin_s, end_s)
    run.times[unit] += 1

  def _wait(self, clock: _Clock, run: Run, name: str, block: Block, place: int, events) -> None:
    unit, begin_s, end_s = clock.flights.pop(name)
    if end_s > clock.now_s:
      after = next((u for u in block.units[place + 1 :] if not isinstance(u, Done)), None)
      run.waited_for[name] = after.name if after else f"the end of {block.name}"
      clock.waits.append((clock.now_s, end_s))
      if events is not None:
        events.append(Event("waiting", name, unit.phase, clock.now_s, end_s, unit.is_backward))
      clock.now_s = end_s
    exposed_s = sum(max(0.0, min(end_s, b) - max(begin_s, a)) for a, b in clock.waits)
    run.hidden_s[unit] += end_s - begin_s - exposed_s
    if events is not None:
      events.append(Event(self.link(unit), name, unit.phase, begin_s, end_s, unit.is_backward))
    if not clock.flights:
      clock.waits.clear()

  def _loop(self, clock: _Clock, run: Run, loop: Loop, events) -> None:
    turn = 0
    while turn < loop.trips:
      if clock.is_quiet and (events is None or loop.trips > _MOST_TURNS_SHOWN):
        break
      self._block(clock, run, loop.body, turn, events)
      turn += 1
    for key, times in self._turns(loop, turn).items():
      part = self._quiet(loop.body, key[1])
      run.add(part, times)
      if events is not None:
        name = f"{loop.name}, {times} turns"
        end_s = clock.now_s + times * part.total_s
        events.append(Event("compute", name, _main_phase(part), clock.now_s, end_s, False))
      clock.now_s += times * part.total_s

  def _turns(self, loop: Loop, first: int) -> dict[Any, int]:
    """Returns how many of the turns from `first` on are alike, by what is taken and a first such
    turn.
    """
    branches = [unit for unit in loop.body.units if isinstance(unit, Branch)]
    if not branches:
      return {((), first): loop.trips - first} if loop.trips > first else {}
    example: dict[tuple[int, ...], int] = {}
    count: collections.Counter = collections.Counter()
    for turn in range(first, loop.trips):
      taken = tuple(self._branch(branch, turn) for branch in branches)
      example.setdefault(taken, turn)
      count[taken, example[taken]] += 1
    return count


def _main_phase(run: Run) -> str:
  phases = collections.Counter()
  for unit, times in run.times.items():
    phases[unit.phase] += times
  return phases.most_common(1)[0][0] if phases else "other"
