"""The timeline of a simulated step: Perfetto JSON of it all, SVG and HTML of what a screen holds.

One row for each of a GPU's streams. Knows events; must not know how they were found.
"""

from collections.abc import Iterable, Sequence

from moe_jax.observe import timeline
from moe_jax.observe.timeline import Bar
from moe_jax.plan.machine import STREAMS
from moe_jax.plan.simulate import Event

_ROWS = {stream: stream for stream in STREAMS}


def trace(events: Sequence[Event]) -> dict:
  """Returns the trace for Perfetto, see `observe.timeline.trace`."""
  return timeline.trace(_bars(events), _ROWS)


def steady(events: Sequence[Event]) -> list[Event]:
  """Returns the events of the tick in the middle of those with most operations, from its begin."""
  count: dict[int, int] = {}
  for event in events:
    count[event.tick] = count.get(event.tick, 0) + 1
  most = sorted(tick for tick, times in count.items() if times == max(count.values()))
  tick = most[len(most) // 2]
  found = [event for event in events if event.tick == tick]
  begin_s = min(event.start_s for event in found)
  return [e._replace(start_s=e.start_s - begin_s, end_s=e.end_s - begin_s) for e in found]


def svg(events: Sequence[Event], title: str) -> str:
  """Returns the picture of some events."""
  return timeline.svg(_bars(events), _ROWS, title)


def page(events: Sequence[Event], title: str) -> str:
  """Returns one HTML file with the picture of some events, which needs nothing else."""
  return timeline.page(_bars(events), _ROWS, title)


def _bars(events: Iterable[Event]) -> list[Bar]:
  return [
    Bar(
      event.stream, event.name, event.phase, event.start_s, event.end_s, event.unit == "backward",
      {"unit": event.unit, "part": event.part, "tick": event.tick, "layer": event.layer},
    )
    for event in events
  ]  # fmt: skip
