"""The picture's own pixels: what is drawn where, and that nothing but the file is needed."""

import json
import os
import pathlib

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest

from moe_jax.observe import plot


def _metrics(folder, rows):
  path = folder / "metrics.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def _pixels(path, color):
  image_YXC = matplotlib.image.imread(path)[..., :3]
  return np.argwhere(np.abs(image_YXC - matplotlib.colors.to_rgb(color)).max(axis=-1) < 0.02)


def _rows(num_steps):
  return [
    {"step": step, "loss": 5.5 * 0.99**step} | ({"eval_loss": 3.0} if step % 50 == 49 else {})
    for step in range(num_steps)
  ]


@pytest.mark.parametrize("name", ["cost$5_^$6", b"r\xff"])
def test_a_run_of_any_name_is_drawn(tmp_path, name):
  folder = pathlib.Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), os.fsencode(name))))
  folder.mkdir()
  plot.loss_plot(_metrics(folder, _rows(60)), tmp_path / "loss.png")
  assert (tmp_path / "loss.png").stat().st_size > 0


def test_all_three_series_are_drawn_each_at_its_height(tmp_path):
  plot.loss_plot(_metrics(tmp_path, _rows(200)), tmp_path / "loss.png", bigram_loss=2.0)
  train, held_out, bigram = (
    _pixels(tmp_path / "loss.png", color) for color in (plot.TRAIN, plot.HELD_OUT, plot.BIGRAM)
  )
  assert len(train) > 500 and len(held_out) > 300 and len(bigram) > 300
  line_y = np.bincount(held_out[:, 0]).argmax()  # the longest row of that colour
  assert train[:, 0].min() < line_y < train[:, 0].max()
  below = bigram[bigram[:, 0] > line_y + 20]
  assert np.bincount(below[:, 0]).max() > 300


def test_without_held_out_loss_and_bigram_only_training_is_drawn(tmp_path):
  rows = [{"step": step, "loss": loss} for step, loss in enumerate([3.0, None, 2.0])]
  plot.loss_plot(_metrics(tmp_path, rows), tmp_path / "loss.png")
  assert len(_pixels(tmp_path / "loss.png", plot.TRAIN)) > 500
  assert not len(_pixels(tmp_path / "loss.png", plot.HELD_OUT))


def test_one_step_is_enough(tmp_path):
  path = _metrics(tmp_path, [{"step": 0, "loss": 3.0, "eval_loss": 2.9}])
  plot.loss_plot(path, tmp_path / "loss.png", 2.5, unit="nats per token")
  assert len(_pixels(tmp_path / "loss.png", plot.HELD_OUT)) > 30


def test_nothing_to_draw_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="holds no finite loss"):
    plot.loss_plot(_metrics(tmp_path, [{"step": 0, "loss": None}]), tmp_path / "loss.png")
  assert not (tmp_path / "loss.png").exists()
