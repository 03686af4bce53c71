"""launch.show_load: a table and a picture of a real run's folder."""

import io
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from launch import load_picture, phase_text
from moe_jax.observe import profile
from moe_jax.train import loop
from tests import runs


def launch(*arguments):
  return subprocess.run(
    [sys.executable, "-W", "error", "-m", "launch.show_load", *arguments],
    cwd=runs.ROOT, capture_output=True, text=True, timeout=120, env=os.environ,
  )  # fmt: skip


def write(folder, counts_WLE):
  lines = [{"step": 3 + w, "expert_tokens": each.tolist()} for w, each in enumerate(counts_WLE)]
  (folder / "load.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_leaves_its_load_and_it_is_drawn(tmp_path):
  settings = runs.settings(
    train={"steps": 3, "checkpoint_every": 3, "eval_every": 3},
    mesh={"expert": 1, "tensor": 1, "stage": 1},
  )
  with jax.numpy_dtype_promotion("standard"):
    loop.train(
      settings, tmp_path, stream=io.StringIO(), devices=jax.devices()[:1], profile_steps=(1, 3)
    )
  steps, counts_WLE = load_picture.read(tmp_path)
  model, train = settings.model, settings.train
  assert steps.tolist() == [0, 1, 2]
  assert counts_WLE.shape == (3, model.layers, model.experts)
  assert (counts_WLE.sum(-1) == train.batch * train.sequence * model.experts_per_token).all()
  # What metrics.jsonl says of the same steps.
  rows = runs.rows(tmp_path)
  ratio_WL = counts_WLE.max(-1) / counts_WLE.mean(-1)
  np.testing.assert_allclose([row["load_max_over_mean"] for row in rows], ratio_WL, rtol=1e-6)
  variation_WL = counts_WLE.std(-1) / counts_WLE.mean(-1)
  np.testing.assert_allclose([row["load_variation"] for row in rows], variation_WL, rtol=1e-6)
  assert all(len(row["load_p99"]) == model.layers for row in rows)
  room_WL = np.ceil(settings.moe.capacity_factor * counts_WLE.mean(-1))
  queue_WL = np.maximum(counts_WLE.max(-1) - room_WL, 0)
  np.testing.assert_array_equal([row["load_queue"] for row in rows], queue_WL)

  done = launch(f"--workdir={tmp_path}")
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "load.png").read_bytes()[:4] == b"\x89PNG"
  assert load_picture.to_text(counts_WLE) in done.stdout

  done = launch(f"--workdir={tmp_path}", "--phase=experts")
  assert done.returncode == 0, done.stderr
  first, names, row, last = done.stdout.splitlines()
  assert first.startswith("experts by device") and names.split()[2:] == ["P50", "P90", "P99", "max"]
  assert row.startswith("stage 0, expert 0, tensor 0") and last.endswith("1.000")
  number, total, *percentiles = map(float, row.split()[6:12])
  passes = 2 * train.steps * settings.pipeline.micro_batches * model.layers  # both directions
  assert number > passes / train.steps and total > 0  # of two steps, a pass in one piece or more
  assert percentiles == sorted(percentiles)

  # Of the mesh that was profiled, whatever the run went on with; its number where that is unknown.
  config = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(config | {"mesh": {"expert": 0}}))
  assert phase_text.to_text(tmp_path, "experts").splitlines()[2] == row
  (tmp_path / "profile" / profile.ABOUT).unlink()
  unknown = phase_text.to_text(tmp_path, "experts").splitlines()[2]
  assert unknown.startswith("device 0 ") and unknown.split()[2:] == row.split()[6:]


def test_the_table_by_hand():
  counts_WLE = np.array([[[3, 1, 0, 0]], [[1, 1, 2, 0]]])
  text = load_picture.to_text(counts_WLE)
  assert text.splitlines()[0].startswith("over 2 steps")
  assert text.splitlines()[-1].split()[:4] == ["0", "0", "2.00", "0.71"]


@pytest.mark.parametrize("num_steps", [1, 1000])
def test_short_and_long_runs_are_drawn(tmp_path, num_steps):
  counts_WLE = np.random.default_rng(0).integers(0, 99, (num_steps, 2, 16))
  write(tmp_path, counts_WLE)
  steps, found = load_picture.read(tmp_path)
  np.testing.assert_array_equal(found, counts_WLE)
  load_picture.picture(steps, found, tmp_path / "a" / "b.png", "a run")
  assert (tmp_path / "a" / "b.png").stat().st_size > 5_000


@pytest.mark.parametrize("row", [{}, {"expert_tokens": [1, 2]}, {"expert_tokens": "many"}])
def test_a_step_without_its_load_is_named(tmp_path, row):
  write(tmp_path, np.ones((2, 2, 4), np.int64))
  with open(tmp_path / "load.jsonl", "a") as file:
    file.write(json.dumps({"step": 5, **row}) + "\n")
  with pytest.raises(ValueError, match=r"load.jsonl holds a step without expert_tokens"):
    load_picture.read(tmp_path)


def test_a_folder_without_a_run_takes_one_line(tmp_path):
  for said in ("has no load.jsonl", "holds no step yet"):
    done = launch(f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and said in done.stderr
    (tmp_path / "load.jsonl").write_text("")
  assert launch().returncode == 2
  for flags, said in (
    (["--workdir="], "--workdir=: it is empty; name a folder"),
    (
      [f"--workdir={tmp_path}", "--out=a.jpg"],
      "--out=a.jpg: it is no name of a PNG; choose one that ends in .png",
    ),
  ):
    done = launch(*flags)
    assert (done.returncode, done.stderr) == (2, f"error: {said}\n")
  assert str(pathlib.Path("~").expanduser()) in launch("--workdir=~/no such run").stderr
  (tmp_path / "config.json").write_text(
    json.dumps({"mesh": {"expert": 1, "tensor": 1, "stage": 1}})
  )
  for phase, said in (("experts", "holds no trace"), ("expert", "is not one of embed")):
    done = launch(f"--workdir={tmp_path}", f"--phase={phase}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and said in done.stderr
