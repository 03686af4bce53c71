"""The timeline of one steady tick: computation, what it waits for, and each link on a row.

Every stage runs this same tick, each on other micro-batches: a forward unit and, hatched, a
backward unit side by side; the steps that this one runs again are not hatched. Knows events; must
not know how they were found.
"""

from collections.abc import Iterable
from typing import NamedTuple

from moe_jax.observe import timeline
from moe_jax.observe.timeline import Bar
from moe_jax.rehearse.exposure import Event, Run, Simulator
from moe_jax.rehearse.program import Loop, Program

_ROWS = {
  "compute": "computation",
  "waiting": "exposed communication",
  "inside": "link inside the host",
  "between": "link between hosts",
}


class Tick(NamedTuple):
  """A tick that is drawn.

  Attributes:
    events: one or more.
    run: what it takes, inside the loops too that are one event.
  """

  events: list[Event]
  run: Run


def steady_tick(program: Program, simulator: Simulator) -> Tick:
  """Returns a turn of the loop that turns most often: the turn most like the others.

  Of a program without a loop that turns, which has few ticks, all of it.
  """
  loops = [unit for unit in program.entry.units if isinstance(unit, Loop) and unit.trips]
  block, turn = program.entry, 0
  if loops:
    loop = max(loops, key=lambda each: each.trips)
    block, turn = loop.body, simulator.usual_turn(loop)
  return Tick(simulator.timeline(block, turn), simulator.turn(block, turn))


def trace(tick: Tick) -> dict:
  """Returns the trace for Perfetto, see `observe.timeline.trace`."""
  return timeline.trace(_bars(tick.events), _ROWS)


def page(tick: Tick, pod: str, binding: str) -> str:
  """Returns one HTML file with the picture, which needs nothing else.

  Args:
    tick: of a program on the pod.
    pod: its name.
    binding: the report's first line, of a whole step.
  """
  total_s, compute_s = tick.run.total_s, tick.run.compute_s
  title = (
    f"A steady tick on {pod}: {total_s * 1e6:.0f} us, {compute_s * 1e6:.0f} of computation,"
    f" {(total_s - compute_s) * 1e6:.0f} of exposed communication"
  )
  return timeline.page(_bars(tick.events), _ROWS, title, binding)


def _bars(events: Iterable[Event]) -> list[Bar]:
  return [
    Bar(
      event.row, event.name, "exposed" if event.row == "waiting" else event.phase,
      event.start_s, event.end_s, event.is_backward and event.row != "waiting",
    )
    for event in events
  ]  # fmt: skip
