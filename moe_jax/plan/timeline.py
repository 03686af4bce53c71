"""The timeline of a simulated step: Perfetto JSON of it all, SVG and HTML of what a screen holds.

One row for each of a GPU's streams; colours are phases. Knows events; must not know how they were
found.
"""

import html
from collections.abc import Sequence

from moe_jax.plan.machine import STREAMS
from moe_jax.plan.simulate import Event

COLOURS = {
  "attention": "#4e79a7", "dispatch": "#f28e2b", "experts": "#59a14f", "combine": "#b6992d",
  "head": "#b07aa1", "embed": "#9c755f", "optimizer": "#76b7b2", "other": "#bab0ac",
}  # fmt: skip
_WIDTH, _LEFT, _ROW, _TOP = 2400, 110, 40, 50  # pixels


def trace(events: Sequence[Event]) -> dict:
  """Returns what chrome://tracing and ui.perfetto.dev open, once it is written as JSON.

  Source: Trace Event Format, complete events ("X") and metadata ("M"); times in microseconds.
  """
  names = [
    {"ph": "M", "pid": 0, "tid": tid, "name": "thread_name", "args": {"name": name}}
    for tid, name in enumerate(STREAMS)
  ]
  return {
    "traceEvents": names
    + [
      {
        "ph": "X", "pid": 0, "tid": STREAMS.index(event.stream), "name": event.name,
        "cat": event.phase, "ts": event.start_s * 1e6, "dur": (event.end_s - event.start_s) * 1e6,
        "args": {
          "phase": event.phase, "unit": event.unit, "part": event.part, "tick": event.tick,
          "layer": event.layer,
        },
      }
      for event in events
    ]
  }  # fmt: skip


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
  """Returns the picture of some events; names and times show under the pointer."""
  end_s = max(event.end_s for event in events)
  height = _TOP + _ROW * len(STREAMS) + 20
  scale = _WIDTH / end_s
  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 20}" height="{height}"'
    ' font-family="sans-serif" font-size="12">',
    f'<text x="0" y="14" font-size="14">{html.escape(title)}</text>',
  ]
  for tenth in range(11):
    x = _LEFT + _WIDTH * tenth / 10
    parts.append(
      f'<line x1="{x:.0f}" x2="{x:.0f}" y1="{_TOP - 8}" y2="{height - 16}" stroke="#ddd"/>'
      f'<text x="{x:.0f}" y="{_TOP - 14}" text-anchor="middle">{end_s * 1e5 * tenth:.0f} us</text>'
    )
  for row, name in enumerate(STREAMS):
    parts.append(f'<text x="0" y="{_TOP + _ROW * row + 20}">{name}</text>')
  for event in events:
    top = _TOP + _ROW * STREAMS.index(event.stream)
    words = (
      f"{event.name}, {event.phase}, {event.unit}: {(event.end_s - event.start_s) * 1e6:.1f} us"
    )
    parts.append(
      f'<rect x="{_LEFT + event.start_s * scale:.1f}" y="{top}"'
      f' width="{max(0.5, (event.end_s - event.start_s) * scale):.1f}" height="{_ROW - 12}"'
      f' fill="{COLOURS.get(event.phase, COLOURS["other"])}"><title>{html.escape(words)}</title>'
      "</rect>"
    )
  return "\n".join([*parts, "</svg>", ""])


def page(events: Sequence[Event], title: str) -> str:
  """Returns one HTML file with the picture of some events, which needs nothing else."""
  legend = "".join(
    f'<span style="margin-right:1.2em"><i style="display:inline-block;width:1em;height:1em;'
    f'background:{colour}"></i> {html.escape(name)}</span>'
    for name, colour in COLOURS.items()
  )
  return (
    f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
    f'<body style="font:14px sans-serif;margin:1.5em"><p>{legend}</p>\n'
    f'<div style="overflow-x:auto">{svg(events, title)}</div></body></html>\n'
  )
