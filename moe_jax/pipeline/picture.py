"""How a schedule looks: a row per stage over time, in which what is hatched is the bubble.

Time is lockstep time: a tick is as long as the kinds of unit that any stage runs in it, one after
the other, so a stage without such a unit is seen to wait. Knows tables and costs; must not know
what runs them. Needs matplotlib, so that nothing but a picture imports it.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

from matplotlib import colors
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch

from moe_jax.pipeline.table import CLASSIC_COSTS, Table, check_costs

# In the order in which a tick runs them.
_COLORS = {
  "head": "#7b4fa3",
  "backward": "#1b7f5c",
  "embed_gradient": "#b8436b",
  "embed": "#d99a1c",
  "forward": "#2b62ad",
}
_LABELS = {"embed_gradient": "embedding gradient", "embed": "embedding"}
_INK, _FAINT, _BLANK, _HATCH = "#222222", "#9aa1a9", "#f1f2f4", "#d0748a"
_IDLE = {"facecolor": _BLANK, "edgecolor": _HATCH, "hatch": "/////", "linewidth": 0.0}
_WIDTH_INCHES, _LEFT_INCHES, _RIGHT_INCHES = 15.0, 0.75, 0.2
_TOP_INCHES, _BOTTOM_INCHES, _ROW_INCHES, _GAP_INCHES = 1.05, 0.6, 0.36, 0.5
_NARROWEST_INCHES = 0.14  # of a cell whose number is to be read
_MAX_LINES = 12
_DPI = 150


class _Span(NamedTuple):
  """One kind of unit in one tick: `cells` are (stage, micro-batch, chunk)."""

  tick: int
  kind: str
  start: float
  end: float
  cells: list[tuple[int, int, int]]


def picture(table: Table, path: str, costs: Mapping[str, float] = CLASSIC_COSTS) -> None:
  """Writes a picture of `table` to `path`; a long schedule is broken into lines, as text is.

  Args:
    table: a legal table.
    path: of the picture; its suffix, .png or .svg, chooses the format.
    costs: seconds (or any one unit of time) of a unit of every kind in KINDS.

  Raises:
    ValueError: costs that `Table.bubble_fraction` refuses, or another suffix.
    OSError: the file cannot be written.
  """
  check_costs(costs)
  if pathlib.Path(path).suffix not in (".png", ".svg"):
    raise ValueError(f"picture {str(path)!r} ends in neither .png nor .svg; choose one of them")
  bubble = table.bubble_fraction(costs)
  lines = _lines(_spans(table, costs))
  longest = max(line[-1].end - line[0].start for line in lines)
  rows_inches = table.num_stages * _ROW_INCHES
  height = _TOP_INCHES + len(lines) * (rows_inches + _GAP_INCHES) - _GAP_INCHES + _BOTTOM_INCHES
  figure = Figure(figsize=(_WIDTH_INCHES, height), facecolor="white")
  FigureCanvasAgg(figure)
  for n, line in enumerate(lines):
    top = height - _TOP_INCHES - n * (rows_inches + _GAP_INCHES)
    left, width = _LEFT_INCHES / _WIDTH_INCHES, _line_inches() / _WIDTH_INCHES
    axes = figure.add_axes((left, (top - rows_inches) / height, width, rows_inches / height))
    _draw(axes, table, line, longest)
  axes.set_xlabel("lockstep time, in the unit of the costs", fontsize=9, color=_INK)
  _caption(figure, table, bubble, height)
  figure.legend(
    *_legend(table, costs),
    loc="upper left",
    bbox_to_anchor=(_LEFT_INCHES / _WIDTH_INCHES, 1 - 0.5 / height),
    ncols=len(_COLORS) + 1,
    frameon=False,
    fontsize=9.5,
    handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
    handlelength=3.2,
    columnspacing=2.0,
    borderaxespad=0,
    borderpad=0,
  )
  figure.savefig(path, dpi=_DPI)


def _spans(table, costs):
  spans, now = [], 0.0
  for tick in range(table.num_ticks):
    for kind in _COLORS:
      cells = _cells(table, tick, kind)
      if cells and costs[kind]:
        spans.append(_Span(tick, kind, now, now + float(costs[kind]), cells))
        now = spans[-1].end
  return spans


def _cells(table, tick, kind):
  if kind in ("forward", "backward"):
    micro_Z, chunk_Z = (getattr(table, f"{kind}_{what}_QZ")[tick] for what in ("micro", "chunk"))
    cells = enumerate(zip(micro_Z, chunk_Z, strict=True))
    return [(stage, int(micro), int(chunk)) for stage, (micro, chunk) in cells if micro >= 0]
  micro = int(getattr(table, f"{kind}_micro_Q")[tick])
  return [(stage, micro, 0) for stage in range(table.num_stages)] if micro >= 0 else []


def _lines(spans):
  total = spans[-1].end
  units = [span.end - span.start for span in spans if span.kind in ("forward", "backward")]
  narrowest = min(units, default=total)
  num_lines = min(math.ceil(total * _NARROWEST_INCHES / narrowest / _line_inches()), _MAX_LINES)
  lines, tick = [[]], -1
  for span in spans:
    if span.tick != tick and lines[-1] and span.start >= total * len(lines) / num_lines - 1e-9:
      lines.append([])
    lines[-1].append(span)
    tick = span.tick
  return lines


def _line_inches():
  return _WIDTH_INCHES - _LEFT_INCHES - _RIGHT_INCHES


def _draw(axes, table, line, longest):
  start, end = line[0].start, line[-1].end
  inches = _line_inches() / longest
  axes.set_xlim(start, start + longest)
  axes.set_ylim(table.num_stages - 0.5, -0.5)
  axes.barh(range(table.num_stages), end - start, 0.88, start, zorder=0, **_IDLE)
  for span in line:
    width = span.end - span.start
    for stage, micro, chunk in span.cells:
      color = _shade(span.kind, chunk, table.num_chunks)
      axes.barh(stage, width, 0.88, span.start, color=color, edgecolor="white", linewidth=0.6)
      if width * inches >= 0.062 * len(str(micro)):
        axes.text(
          *(span.start + width / 2, stage, micro),
          ha="center", va="center_baseline", fontsize=7.5 if width * inches > 0.18 else 5.8,
          color="white" if _luminance(color) < 0.5 else _INK,
        )  # fmt: skip
  ticks = {span.tick: span.start for span in reversed(line)}
  every = max(1, math.ceil(0.3 * len(ticks) / (longest * inches)))
  for tick, tick_start in ticks.items():
    axes.axvline(tick_start, color=_FAINT, linewidth=0.4, zorder=0.5)
    if tick % every == 0:
      axes.text(
        tick_start, -0.6, tick, fontsize=6.5, color=_FAINT, ha="left", va="bottom", clip_on=False
      )
  axes.text(start, -0.6, "tick  ", fontsize=6.5, color=_FAINT, ha="right", va="bottom")
  axes.set_yticks(range(table.num_stages), [f"stage {z}" for z in range(table.num_stages)])
  axes.tick_params(length=0, labelsize=9, labelcolor=_INK, pad=4)
  axes.tick_params(axis="x", labelsize=8)
  for spine in axes.spines.values():
    spine.set_visible(False)


def _caption(figure, table, bubble, height):
  chunks = f", {table.num_chunks} chunks a stage" if table.num_chunks > 1 else ""
  figure.text(
    *(_LEFT_INCHES / _WIDTH_INCHES, 1 - 0.2 / height),
    f"{table.name}: {table.num_stages} stages, {table.num_micro_batches} micro-batches{chunks}",
    fontsize=13, fontweight="bold", color=_INK, va="center",
  )  # fmt: skip
  figure.text(
    *(1 - _RIGHT_INCHES / _WIDTH_INCHES, 1 - 0.2 / height),
    f"bubble {bubble:.2%}   ·   {table.num_ticks} ticks   ·   {table.peak_in_flight} in flight",
    fontsize=12, color=_INK, va="center", ha="right",
  )  # fmt: skip


def _legend(table, costs):
  handles, labels = [], []
  for kind in ("embed", "forward", "head", "backward", "embed_gradient"):
    if costs[kind] and table.ticks_by_kind[kind]:
      chunks = table.num_chunks if kind in ("forward", "backward") else 1
      handles.append(tuple(Patch(color=_shade(kind, y, chunks)) for y in range(chunks)))
      labels.append(_LABELS.get(kind, kind) + (f", chunks 0 to {chunks - 1}" if chunks > 1 else ""))
  handles.append(Patch(**_IDLE))
  return handles, [*labels, "idle: the bubble"]


def _shade(kind, chunk, num_chunks):
  """Returns the colour of a kind, lighter from chunk to chunk."""
  light = 0.62 * chunk / (num_chunks - 1) if num_chunks > 1 and chunk else 0.0
  return tuple(channel + (1 - channel) * light for channel in colors.to_rgb(_COLORS[kind]))


def _luminance(color):
  red, green, blue = color
  return 0.299 * red + 0.587 * green + 0.114 * blue
