"""The picture of a run: its loss over steps as a PNG, drawn from the metrics file alone.

It must not know models or the loop.
"""

import os
import pathlib

import numpy as np
from matplotlib.figure import Figure

from moe_jax.observe import metrics

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
TRAIN, HELD_OUT, BIGRAM = "#3b6fd4", "#d9480f", "#6b7280"


def loss_plot(metrics_path, out_path, bigram_loss: float | None = None, unit="nats per byte"):
  """Writes a PNG of training loss and held-out loss over steps, titled with the run's folder name.

  Args:
    metrics_path: file of JSON lines with `step`, `loss` and, on some lines, `eval_loss`.
    out_path: PNG to write.
    bigram_loss: drawn as a level line where given, in `unit`.
    unit: what the losses are measured in.

  Raises:
    ValueError: the file holds no finite training loss.
  """
  rows = metrics.read_jsonl(metrics_path)
  train = _series(rows, "loss")
  held_out = _series(rows, "eval_loss")
  if not len(train):
    raise ValueError(f"{metrics_path} holds no finite loss to draw; train at least one step")
  figure = Figure(figsize=(8, 4.5), dpi=160, layout="constrained")
  figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)  # inches
  axes = figure.add_subplot()
  smooth = _smooth(train[:, 1])
  labels = [(train[-1, 0], smooth[-1], "training", TRAIN)]
  axes.plot(train[:, 0], train[:, 1], color=TRAIN, alpha=0.25, linewidth=0.8)
  axes.plot(train[:, 0], smooth, color=TRAIN, linewidth=2, solid_capstyle="round")
  if len(held_out):
    axes.plot(
      held_out[:, 0], held_out[:, 1], color=HELD_OUT, linewidth=1.2, marker="o", markersize=5,
      markeredgecolor="white", clip_on=False, zorder=3,
    )  # fmt: skip
    labels.append((held_out[-1, 0], held_out[-1, 1], "held out", HELD_OUT))
  if bigram_loss is not None:
    axes.axhline(bigram_loss, color=BIGRAM, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    labels.append((train[-1, 0], bigram_loss, "bigram model", BIGRAM))
  _frame(axes, train, held_out, bigram_loss)
  _label_ends(axes, labels)
  run = drawable(pathlib.Path(metrics_path).resolve().parent.name)
  axes.set_title(
    run, loc="left", fontsize=13, fontweight="bold", color=INK, pad=22, parse_math=False
  )
  axes.text(
    0, 1.03, f"loss, {unit}", transform=axes.transAxes, fontsize=9.5, color=MUTED, va="bottom"
  )
  axes.set_xlabel("step", fontsize=9.5, color=MUTED)
  figure.savefig(out_path, format="png")


def drawable(name: str) -> str:
  """Returns a folder's name with U+FFFD for what of it is not UTF-8."""
  return os.fsencode(name).decode(errors="replace")


def _series(rows: list[dict], name: str) -> np.ndarray:
  points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
  return np.array(points, float).reshape(-1, 2)


def _smooth(values: np.ndarray) -> np.ndarray:
  # A centred window does not lag behind a falling loss, as a moving average does. It shrinks at the
  # start, where the loss falls steeply, and is cut off at the end, where noise would show more.
  radius = len(values) // 50
  sums = np.concatenate([[0.0], np.cumsum(values)])
  centre = np.arange(len(values))
  first = np.maximum(centre - radius, 0)
  last = np.minimum(centre + np.minimum(radius, centre), len(values) - 1)
  return (sums[last + 1] - sums[first]) / (last + 1 - first)


def _frame(axes, train: np.ndarray, held_out: np.ndarray, bigram_loss: float | None):
  # The first steps of a run are far above the rest, and would press all that follows flat.
  settled = train[len(train) // 50 :, 1]
  shown = np.concatenate([settled, held_out[:, 1], [] if bigram_loss is None else [bigram_loss]])
  margin = 0.05 * max(np.ptp(shown), 0.1)
  axes.set_ylim(shown.min() - margin, shown.max() + margin)
  axes.set_xlim(train[0, 0], max(train[-1, 0], train[0, 0] + 1))
  axes.grid(axis="y", color=GRID, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[["top", "right", "left"]].set_visible(False)
  axes.spines["bottom"].set_color(MUTED)
  axes.tick_params(colors=MUTED, labelsize=9, length=0)


def _label_ends(axes, labels: list[tuple]):
  # Right of the frame, each beside its line's end, pushed apart where they would touch.
  low, high = axes.get_ylim()
  height = 0.055 * (high - low)
  at = -np.inf
  for _, y, text, color in sorted(labels, key=lambda label: label[1]):
    at = max(y, at + height)
    axes.annotate(
      f"{text} {y:.3f}", (1, at), xycoords=("axes fraction", "data"), xytext=(10, 0),
      textcoords="offset points", va="center", fontsize=9.5, color=color, annotation_clip=False,
    )  # fmt: skip
