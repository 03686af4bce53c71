"""The timeline of one steady tick: one HTML file that needs nothing else, and a trace for Perfetto.

Computation, what it waits for, and each link on a row of its own; colours are phases. Every stage
runs this same tick, each on another micro-batch. Knows events; must not know how they were found.
"""

import html
from collections.abc import Iterable, Sequence

from moe_jax.rehearse.exposure import Event, Simulator
from moe_jax.rehearse.program import Loop, Program

ROWS = {
  "compute": "computation",
  "waiting": "exposed communication",
  "inside": "link inside the host",
  "between": "link between hosts",
}
_COLOURS = {
  "attention": "#4e79a7", "dispatch": "#f28e2b", "experts": "#59a14f", "combine": "#b6992d",
  "head": "#b07aa1", "embed": "#9c755f", "optimizer": "#76b7b2", "other": "#bab0ac",
}  # fmt: skip
_COMBINED, _EXPOSED = "#edc948", "#e15759"
_WIDTH, _LEFT, _ROW, _TOP = 2400, 170, 44, 46  # pixels


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
  """Returns what chrome://tracing and ui.perfetto.dev open, once it is written as JSON.

  Source: Trace Event Format, complete events ("X") and metadata ("M"); times in microseconds.
  """
  names = [
    {"ph": "M", "pid": 0, "tid": tid, "name": "thread_name", "args": {"name": title}}
    for tid, title in enumerate(ROWS.values())
  ]
  order = list(ROWS)
  return {
    "traceEvents": names
    + [
      {
        "ph": "X", "pid": 0, "tid": order.index(event.row), "name": event.name, "cat": event.phase,
        "ts": event.start_s * 1e6, "dur": (event.end_s - event.start_s) * 1e6,
        "args": {"phase": event.phase},
      }
      for event in events
    ]
  }  # fmt: skip


def page(events: Sequence[Event], title: str) -> str:
  """Returns the HTML of the timeline; names and times show under the pointer."""
  end_s = max(event.end_s for event in events)
  height = _TOP + _ROW * len(ROWS) + 40
  parts = [_axis(end_s, height), *(_label(row) for row in ROWS), *(_box(e, end_s) for e in events)]
  legend = "".join(
    f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>'
    for name, colour in {**_COLOURS, "two phases": _COMBINED, "exposed": _EXPOSED}.items()
  )
  return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font: 14px sans-serif; margin: 1.5em; }}
div.scroll {{ overflow-x: auto; }}
span {{ margin-right: 1.2em; white-space: nowrap; }}
i {{ display: inline-block; width: 1em; height: 1em; margin-right: .4em; vertical-align: -2px; }}
rect:hover {{ stroke: #000; }}
</style>
<h1 style="font-size:18px">{html.escape(title)}</h1>
<p>{legend}</p>
<div class="scroll"><svg width="{_LEFT + _WIDTH + 20}" height="{height}">
{"".join(parts)}
</svg></div>
</html>
"""


def _box(event: Event, end_s: float) -> str:
  scale = _WIDTH / end_s
  top = _TOP + _ROW * list(ROWS).index(event.row)
  width = max(0.5, (event.end_s - event.start_s) * scale)
  colour = _EXPOSED if event.row == "waiting" else _COLOURS.get(event.phase, _COMBINED)
  words = f"{event.name}, {event.phase}: {(event.end_s - event.start_s) * 1e6:.1f} us"
  return (
    f'<rect x="{_LEFT + event.start_s * scale:.1f}" y="{top}" width="{width:.1f}"'
    f' height="{_ROW - 12}" fill="{colour}"><title>{html.escape(words)}</title></rect>\n'
  )


def _label(row: str) -> str:
  top = _TOP + _ROW * list(ROWS).index(row) + _ROW / 2
  return f'<text x="0" y="{top:.0f}">{ROWS[row]}</text>\n'


def _axis(end_s: float, height: int) -> str:
  marks = []
  for tenth in range(11):
    x, time_us = _LEFT + _WIDTH * tenth / 10, end_s * 1e5 * tenth
    marks.append(
      f'<line x1="{x:.0f}" x2="{x:.0f}" y1="{_TOP - 12}" y2="{height - 34}" stroke="#ddd"/>'
      f'<text x="{x:.0f}" y="{_TOP - 18}" text-anchor="middle">{time_us:.0f} us</text>\n'
    )
  return "".join(marks)
