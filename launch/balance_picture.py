"""What launch.bench_balance found as a picture: workloads by policies, unevenness and step time.

Knows the rows of its JSON; must not know how they came about.
"""

import pathlib

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_INK, _CAPPED = "#1f2430", 3.0
_PANELS = (
  ("max_over_mean", "busiest rank over the mean"),
  ("step_over_ideal", "step time over the force-balanced ideal"),
)


def picture(rows: list[dict], path: pathlib.Path) -> None:
  """Writes a PNG with a table of colours for each figure; 1 is even, and cells say their number.

  Args:
    rows: of the harness.
    path: of the picture.
  """
  by_cell = {(row["workload"], row["policy"]): row for row in rows}
  names = list(dict.fromkeys(row["workload"] for row in rows))
  policies = list(dict.fromkeys(row["policy"] for row in rows))
  figure = Figure(figsize=(1.9 + 0.85 * len(policies) * 2, 1.8 + 0.34 * len(names)), dpi=130)
  FigureCanvasAgg(figure)
  for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), _PANELS, strict=True):
    values = np.array(
      [[by_cell.get((w, p), {}).get(key, np.nan) for p in policies] for w in names], float
    )
    axes.imshow(np.minimum(values, _CAPPED), cmap="RdYlGn_r", vmin=1, vmax=_CAPPED, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
      text = "" if np.isnan(value) else f"{value:.2f}"
      axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color=_INK)
    axes.set_xticks(range(len(policies)), policies, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
  figure.tight_layout()
  figure.savefig(path, format="png")
