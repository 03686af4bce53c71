"""The timeline of one steady tick: computation, what it waits for, and each link on a row.

Every stage runs this same tick, each on other micro-batches: a forward unit and, hatched, a
backward unit side by side. Knows events; must not know how they were found.
"""

from collections.abc import Iterable, Sequence

from moe_jax.observe import timeline
from moe_jax.observe.timeline import Bar
from moe_jax.rehearse.exposure import Event, Simulator
from moe_jax.rehearse.program import Loop, Program

_ROWS = {
  "compute": "computation",
  "waiting": "exposed communication",
  "inside": "link inside the host",
  "between": "link between hosts",
}


def steady_tick(program: Program, simulator: Simulator) -> list[Event]:
  """Returns the events of a turn of the loop that turns most often: the turn most like the others.

  Of a program without a loop, which has few ticks, all events.
  """
  loops = [unit for unit in program.entry.units if isinstance(unit, Loop)]
  if not loops:
    return simulator.timeline(program.entry, 0)
  loop = max(loops, key=lambda each: each.trips)
  return simulator.timeline(loop.body, simulator.usual_turn(loop))


def trace(events: Iterable[Event]) -> dict:
  """Returns the trace for Perfetto, see `observe.timeline.trace`."""
  return timeline.trace(_bars(events), _ROWS)


def page(events: Sequence[Event], pod: str, binding: str) -> str:
  """Returns one HTML file with the picture, which needs nothing else.

  Args:
    events: of the tick, one or more.
    pod: its name.
    binding: the report's first line, of a whole step.
  """
  total_us = max(event.end_s for event in events) * 1e6
  spent_us = lambda row: sum(event.end_s - event.start_s for event in events if event.row == row)
  title = (
    f"A steady tick on {pod}: {total_us:.0f} us, {spent_us('compute') * 1e6:.0f} of computation,"
    f" {spent_us('waiting') * 1e6:.0f} of exposed communication"
  )
  return timeline.page(_bars(events), _ROWS, title, binding)


def _bars(events: Iterable[Event]) -> list[Bar]:
  return [
    Bar(
      event.row, event.name, "exposed" if event.row == "waiting" else event.phase,
      event.start_s, event.end_s, event.is_backward and event.row != "waiting",
    )
    for event in events
  ]  # fmt: skip
