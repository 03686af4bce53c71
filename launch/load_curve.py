"""Draws what launch.bench_serve found: waiting times and throughput over the offered load.

Must not know how it was measured.
"""

import math
import pathlib

from matplotlib.figure import Figure

_PANELS = (
  ("time_to_first_token_s", "time to first token, ms"),
  ("time_per_token_s", "time per token, ms"),
)


def check(path: pathlib.Path) -> None:
  """Refuses a file that `draw` could not write.

  Raises:
    ValueError: its ending is of no kind of picture.
  """
  kinds = Figure().canvas.get_supported_filetypes()
  if path.suffix[1:].lower() not in kinds:
    raise ValueError(f"picture {str(path)!r} ends in none of .{', .'.join(kinds)}; choose one")


def draw(found: dict, path: pathlib.Path) -> None:
  """Writes the picture; the file's ending says its kind.

  Args:
    found: of `load_figures.measure`, at one load or more.
    path: where; `check` takes it.
  """
  rows = sorted(found["loads"], key=lambda row: row["offered_per_s"])
  offered = [row["offered_per_s"] for row in rows]
  figure = Figure(figsize=(12, 3.6), layout="constrained")
  panels = figure.subplots(1, 3)
  for panel, (name, label) in zip(panels[:2], _PANELS, strict=True):
    for share in rows[0][name]:
      times = [math.nan if row[name][share] is None else row[name][share] * 1e3 for row in rows]
      panel.plot(offered, times, marker="o", label=share)
    panel.set_ylabel(label)
    panel.set_yscale("log")
    panel.legend()
  for name, label in (("tokens_per_ms", "prompt and new"), ("new_tokens_per_ms", "new")):
    panels[2].plot(offered, [row[name] for row in rows], marker="o", label=label)
  panels[2].set_ylabel("tokens/ms")
  panels[2].set_ylim(bottom=0)
  panels[2].legend()
  for panel in panels:
    panel.axvline(found["capacity"]["requests_per_s"], color="gray", linestyle=":")
    panel.set_xlabel("offered, requests/s (dotted: capacity)")
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)
