"""What launch.show_load prints and draws: tokens of every layer's experts over a run's steps.

Knows the run's load.jsonl; must not know flags or how a run is trained.
"""

import pathlib

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moe_jax.balance import monitor
from moe_jax.observe import metrics, plot

_COLUMNS = 240  # of the picture; steps beyond are summed together
_HOTTEST = 3.0  # multiple of the even share that has the last colour
_INK, _MUTED = "#1f2430", "#6b7280"


def read(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """Returns (steps, counts_WLE) of a run.

  Raises:
    ValueError: the folder holds no loads.
  """
  path = folder / "load.jsonl"
  if not path.exists():
    raise ValueError(f"{folder} has no load.jsonl; give the --workdir of a run that has trained")
  rows = metrics.read_jsonl(path)
  if not rows:
    raise ValueError(f"{path} holds no step yet; train at least one")
  try:
    counts_WLE = np.array([row["expert_tokens"] for row in rows], np.int64)
  except (KeyError, TypeError, ValueError):
    counts_WLE = np.empty(0)
  if counts_WLE.ndim != 3:
    raise ValueError(
      f"{path} holds a step without expert_tokens, a number for each layer and expert; give the"
      " --workdir of a run of launch.train"
    )
  return np.array([row["step"] for row in rows]), counts_WLE


def to_text(counts_WLE: np.ndarray) -> str:
  """Returns a table, a row a layer: how uneven the experts were over all the steps given."""
  counts_LE = counts_WLE.sum(0)
  columns = (
    counts_LE.argmax(-1),
    monitor.max_over_mean(counts_LE),
    monitor.coefficient_of_variation(counts_LE),
    *monitor.percentiles(counts_LE).T,
  )
  lines = [f"over {len(counts_WLE)} steps, of the mean expert's tokens:"]
  lines.append(f"{'layer':>6}{'busiest':>9}{'max':>7}{'CV':>7}{'P50':>7}{'P90':>7}{'P99':>7}")
  for layer, (expert, *figures) in enumerate(zip(*columns, strict=True)):
    lines.append(f"{layer:>6}{expert:>9}" + "".join(f"{each:>7.2f}" for each in figures))
  return "\n".join(lines)


def picture(steps: np.ndarray, counts_WLE: np.ndarray, path: pathlib.Path, run_name: str) -> None:
  """Writes the picture.

  Args:
    steps: of the rows, [W].
    counts_WLE: tokens of each layer's experts.
    path: of the PNG; its folder is made.
    run_name: for the title.
  """
  size = -(-len(steps) // _COLUMNS)
  counts_WLE = monitor.over_windows(counts_WLE, size)
  num_windows, num_layers, num_experts = counts_WLE.shape
  extent = (steps[0] - 0.5, steps[0] + num_windows * size - 0.5, num_experts - 0.5, -0.5)
  heights = [1.2] + [0.25 + 0.07 * num_experts] * num_layers
  figure = Figure(figsize=(9, 1.2 + sum(heights)), dpi=130, layout="constrained")
  FigureCanvasAgg(figure)
  top, *below = figure.subplots(num_layers + 1, 1, sharex=True, height_ratios=heights)
  ratio_WL = monitor.max_over_mean(counts_WLE)
  for layer in range(num_layers):
    top.plot(
      steps[0] + size * (np.arange(num_windows) + 0.5) - 0.5, ratio_WL[:, layer],
      linewidth=1.2, label=f"layer {layer}",
    )  # fmt: skip
  top.axhline(1, color=_MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
  top.set_ylabel("busiest\nover mean", fontsize=8, color=_MUTED)
  top.legend(fontsize=7, frameon=False, ncols=min(num_layers, 8), loc="upper right")
  title = f"{plot.drawable(run_name)}: load of experts"
  top.set_title(title, loc="left", fontsize=12, color=_INK, parse_math=False)
  for layer, axes in enumerate(below):
    share_EW = monitor.load_share(counts_WLE[:, layer]).T * num_experts
    image = axes.imshow(
      share_EW, aspect="auto", cmap="magma", vmin=0, vmax=_HOTTEST, extent=extent,
      interpolation="nearest",
    )  # fmt: skip
    axes.set_ylabel(f"layer {layer}\nexpert", fontsize=8, color=_MUTED)
    axes.set_yticks(range(0, num_experts, -(-num_experts // 8)))
  for axes in (top, *below):
    axes.tick_params(labelsize=7, colors=_MUTED, length=0)
    axes.spines[:].set_visible(False)
  below[-1].set_xlabel("step", fontsize=8, color=_MUTED)
  bar = figure.colorbar(image, ax=below, shrink=0.6, extend="max")
  bar.set_label("multiple of the even share", fontsize=8, color=_MUTED)
  bar.ax.tick_params(labelsize=7, colors=_MUTED)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, format="png")
