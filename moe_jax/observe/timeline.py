"""A timeline: rows of bars over time, as one SVG, one HTML file, or a trace for Perfetto.

Colours are phases; what belongs to a backward pass is hatched. Knows bars; must not know what they
stand for or how they were found. Needs no jax.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# Phases of the model, and of a step's own work; what is none of them is of several.
_COLOURS = {
  "attention": "#4e79a7", "dispatch": "#f28e2b", "experts": "#59a14f", "combine": "#b6992d",
  "head": "#b07aa1", "embed": "#9c755f", "optimizer": "#76b7b2", "other": "#bab0ac",
  "exposed": "#e15759",
}  # fmt: skip
_SEVERAL = "several phases"
_WIDTH, _LEFT, _ROW, _TOP = 1400, 170, 40, 82  # pixels
_MOST_MARKS = 12
_NAMESPACE = ' xmlns="http://www.w3.org/2000/svg"'  # which HTML needs not


class Bar(NamedTuple):
  """Something that takes time.

  Attributes:
    row: key of the row that it is on.
    name: what it is.
    phase: of the model; "exposed" for communication that is waited for.
    start_s, end_s: when.
    is_backward: whether it belongs to a backward pass.
    more: what a trace says of it besides.
  """

  row: str
  name: str
  phase: str
  start_s: float
  end_s: float
  is_backward: bool = False
  more: Mapping[str, Any] = {}

  @property
  def us(self) -> float:
    """How long it takes, in microseconds."""
    return (self.end_s - self.start_s) * 1e6


def trace(bars: Iterable[Bar], rows: Mapping[str, str]) -> dict:
  """Returns what chrome://tracing and ui.perfetto.dev open, once it is written as JSON.

  Args:
    bars: in any order.
    rows: the title of each row, from the top down.

  Source: Trace Event Format, complete events ("X") and metadata ("M"); times in microseconds.
  """
  order = list(rows)
  names = [
    {"ph": "M", "pid": 0, "tid": tid, "name": "thread_name", "args": {"name": title}}
    for tid, title in enumerate(rows.values())
  ]
  drawn = [
    {
      "ph": "X", "pid": 0, "tid": order.index(bar.row), "name": bar.name, "cat": bar.phase,
      "ts": bar.start_s * 1e6, "dur": bar.us,
      "args": {"phase": bar.phase, "is_backward": bar.is_backward, **bar.more},
    }
    for bar in bars
  ]  # fmt: skip
  return {"traceEvents": names + drawn}


def page(bars: Sequence[Bar], rows: Mapping[str, str], title: str, subtitle: str = "") -> str:
  """Returns one HTML file with the picture, which needs nothing else; takes what `svg` takes."""
  picture = svg(bars, rows, title, subtitle).replace(_NAMESPACE, "", 1)
  return (
    f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
    "<style>body { margin: 1em } svg { width: 100%; min-width: 1200px; height: auto }"
    " rect:hover { stroke: #000 }</style>\n"
    f"{picture}</html>\n"
  )


def svg(bars: Sequence[Bar], rows: Mapping[str, str], title: str, subtitle: str = "") -> str:
  """Returns the picture; names and times show under the pointer.

  Args:
    bars: one or more.
    rows: the title of each row, from the top down.
    title: stands above the picture.
    subtitle: stands below it, smaller.
  """
  end_s = max(bar.end_s for bar in bars)
  scale = _WIDTH / end_s
  tops = {row: _TOP + _ROW * place for place, row in enumerate(rows)}
  bottom = _TOP + _ROW * len(rows)
  used = {(_kind(bar.phase), bar.is_backward) for bar in bars}
  width, height = _LEFT + _WIDTH + 30, bottom + 6
  parts = [
    f'<svg{_NAMESPACE} viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    ' font-family="sans-serif" font-size="13">',
    f"<defs>{''.join(_hatched(kind) for kind in sorted({k for k, back in used if back}))}</defs>",
    f'<text x="0" y="16" font-size="16" font-weight="bold">{html.escape(title)}</text>',
    f'<text x="0" y="36" fill="#555">{html.escape(subtitle)}</text>',
    *_legend(used),
    *_marks(end_s, bottom),
    *(f'<text x="0" y="{tops[row] + 19}">{html.escape(name)}</text>' for row, name in rows.items()),
  ]
  for bar in bars:
    words = f"{bar.name}, {bar.phase}{', backward' * bar.is_backward}: {bar.us:.1f} us"
    kind = _kind(bar.phase)
    fill = f"url(#{_id(kind)})" if bar.is_backward else _colour(kind)
    parts.append(
      f'<rect x="{_LEFT + bar.start_s * scale:.2f}" y="{tops[bar.row]}"'
      f' width="{max(0.4, (bar.end_s - bar.start_s) * scale):.2f}" height="{_ROW - 12}"'
      f' fill="{fill}"><title>{html.escape(words)}</title></rect>'
    )
  return "\n".join([*parts, "</svg>", ""])


def _kind(phase: str) -> str:
  return phase if phase in _COLOURS else _SEVERAL


def _colour(kind: str) -> str:
  return _COLOURS.get(kind, "#edc948")


def _id(kind: str) -> str:
  return f"backward-{kind.replace(' ', '-')}"


def _hatched(kind: str) -> str:
  """Returns the pattern of a phase's backward pass."""
  return (
    f'<pattern id="{_id(kind)}" width="6" height="6" patternUnits="userSpaceOnUse">'
    f'<path d="M0 0H6V6H0Z" fill="{_colour(kind)}"/>'
    '<path d="M-1 5L1 7M-1 -1L7 7M5 -1L7 1" stroke="#fff" stroke-width="1.2"/></pattern>'
  )


def _legend(used: set[tuple[str, bool]]) -> list[str]:
  """Returns a square and a name for each phase that is drawn, and what hatching means."""
  kinds = [kind for kind in (*_COLOURS, _SEVERAL) if (kind, False) in used or (kind, True) in used]
  squares = [(_colour(kind), kind) for kind in kinds]
  hatched = [kind for kind, is_backward in sorted(used) if is_backward]
  if hatched:
    squares.append((f"url(#{_id(hatched[0])})", "hatched: backward"))
  parts, x = [], float(_LEFT)
  for fill, words in squares:
    parts.append(f'<path d="M{x:.0f} 44h13v13h-13z" fill="{fill}"/>')
    parts.append(f'<text x="{x + 18:.0f}" y="55">{words}</text>')
    x += 40 + 7 * len(words)
  return parts


def _marks(end_s: float, bottom: int) -> list[str]:
  """Returns lines at round times."""
  every = _round_up(end_s * 1e6 / _MOST_MARKS)
  parts = []
  for number in range(math.floor(end_s * 1e6 / every * (1 + 1e-9)) + 1):
    time_us = number * every
    x = _LEFT + _WIDTH * time_us / (end_s * 1e6)
    parts.append(
      f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 8}" y2="{bottom - 4}" stroke="#ddd"/>'
      f'<text x="{x:.1f}" y="{_TOP - 11}" fill="#777" font-size="11" text-anchor="middle">'
      f"{time_us:g} us</text>"
    )
  return parts


def _round_up(least: float) -> float:
  """Returns the first of 1, 2, 5, 10, 20, ... and their tenths, hundredths, ... that is no less."""
  power = 10.0 ** math.floor(math.log10(least))
  return next(power * step for step in (1, 2, 5, 10) if power * step >= least * (1 - 1e-9))
