"""launch.bench_serve: figures that agree with each other, from the real engine."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from launch import load_curve, load_figures, offered_load
from moe_jax.serve import requests as requests_lib
from moe_jax.serve.requests import Event, Request, Timing
from tests import runs

SMALL = [
  "--config=configs/tiny.py", "--config.model.layers=2", "--config.serve.max_tokens=64",
  "--config.serve.slots=2", "--config.serve.prefill_chunk=16",
]  # fmt: skip
MESH = ["--config.mesh.expert=1", "--config.mesh.tensor=1", "--config.mesh.stage=1"]
MIX = ["--prompt_tokens=2,40", "--new_tokens=1,12", "--requests=30", "--queue=6"]
MIX_ = load_figures.Mix((2, 40), (1, 12), 400, 0)


def launch(*arguments):
  return subprocess.run(
    [sys.executable, "-W", "error", "-m", "launch.bench_serve", *arguments],
    cwd=runs.ROOT, capture_output=True, text=True, timeout=300,
    env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
  )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bench") / "new folder"
  files = [f"--json={folder / 'serve.json'}", f"--plot={folder / 'serve.png'}"]
  done = launch(*SMALL, *MESH, *MIX, "--loads=0.3,20", *files)
  assert (done.returncode, done.stderr) == (0, "")
  return json.loads((folder / "serve.json").read_text()), done.stdout, folder / "serve.png"


def test_the_figures_agree_with_each_other(finished):
  found = finished[0]
  given = offered_load.requests(load_figures.Mix((2, 40), (1, 12), 30, 0), 256)
  capacity, (light, heavy) = found["capacity"], found["loads"]
  assert capacity["requests_per_s"] == pytest.approx(30 / capacity["seconds"])
  for row in (capacity, light, heavy):
    assert row["completed"] + row["refused"] == 30
    tokens = row["prompt_tokens"] + row["new_tokens"]
    assert row["tokens_per_ms"] == pytest.approx(tokens / row["seconds"] / 1e3)
    for name in ("time_to_first_token_s", "time_per_token_s"):
      assert 0 < row[name]["p50"] <= row[name]["p90"] <= row[name]["p99"] < row["seconds"]
  assert capacity["refused"] == 0 and capacity["completed"] == 30
  assert capacity["prompt_tokens"] == sum(len(one.prompt) for one in given)
  assert capacity["new_tokens"] == sum(one.new_tokens for one in given)
  assert light["offered_per_s"] == pytest.approx(0.3 * capacity["requests_per_s"])


def test_overload_refuses_and_makes_wait(finished):
  light, heavy = finished[0]["loads"]
  assert heavy["refused"] > light["refused"]
  assert heavy["time_to_first_token_s"]["p90"] > light["time_to_first_token_s"]["p50"]


def test_table_and_picture_are_of_the_same_figures(finished):
  found, shown, picture = finished
  assert shown == load_figures.to_text(found) + "\n"
  assert "at once" in shown and "2000%" in shown
  assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_picture_draws_every_load(finished, tmp_path):
  load_curve.draw(finished[0], tmp_path / "curve.svg")
  assert (tmp_path / "curve.svg").stat().st_size > 1000


def test_what_no_request_tells_is_null(tmp_path):
  class OneToken:
    """An engine whose requests end with their first token."""

    waiting = 0
    load = staticmethod(lambda: SimpleNamespace(prompt_tokens=0, new_tokens=0, padding_tokens=0))

    def submit(self, request, arrived_s):
      self.waiting += 1

    def is_idle(self):
      return not self.waiting

    def step(self):
      self.waiting -= 1
      return [Event(0, (1,), requests_lib.LENGTH, Timing(0.0, 1.0, 1.0, 1))]

  row = offered_load.play(OneToken(), [Request([1], 1)] * 2, [0.0] * 2)
  found = {
    "capacity": {"requests_per_s": 1.0, **row},
    "loads": [{"load": 0.5, "offered_per_s": 0.5, **row}],
  }
  assert json.loads(json.dumps(found, allow_nan=False)) == found
  assert row["time_to_first_token_s"] == {"p50": 1.0, "p90": 1.0, "p99": 1.0}
  assert row["time_per_token_s"] == {"p50": None, "p90": None, "p99": None}
  _, at_once, half, _ = load_figures.to_text(found).splitlines()
  assert at_once.split()[-4:-1] == half.split()[-4:-1] == ["-"] * 3
  load_curve.draw(found, tmp_path / "curve.svg")


def test_arrivals_are_a_poisson_process():
  times = np.array(offered_load.arrivals(4000, 50.0, seed=1))
  gaps = np.diff(times, prepend=0.0)
  assert (gaps > 0).all()
  assert gaps.mean() == pytest.approx(1 / 50, rel=0.1)
  assert gaps.std() == pytest.approx(1 / 50, rel=0.1)  # of an exponential, its mean
  assert offered_load.arrivals(5, 50.0, seed=1) == times[:5].tolist()


def test_lengths_are_mixed_on_a_logarithmic_scale():
  given = offered_load.requests(MIX_, 256)
  lengths = np.array([len(one.prompt) for one in given])
  assert (lengths.min(), lengths.max()) == (2, 40)
  assert np.median(lengths) == pytest.approx(np.sqrt(2 * 41), rel=0.25)
  assert {one.new_tokens for one in given} == set(range(1, 13))
  assert all(0 <= token < 256 for one in given for token in one.prompt)


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--loads=0.5,x"], "--loads: x is not a positive number"),
    (["--loads=nan"], "--loads: nan is not a positive number"),
    (["--prompt_tokens=9,3"], "--prompt_tokens=9,3 is not fewest,most"),
    (["--new_tokens=4"], "--new_tokens=4 is not fewest,most"),
    (["--prompt_tokens=1,60"], "come to 124; choose at most serve.max_tokens=64"),
    (["--queue=0"], "--queue=0"),
    ([*MIX, "--plot=x.foo"], "picture 'x.foo' ends in none of .eps, "),
    ([*MIX, "--plot=x"], "picture 'x' ends in none of"),
    ([*MIX, "--plot=x.png", "--loads="], "--loads= is empty, and --plot draws over loads"),
    ([*MIX, "--json=configs"], "--json=configs: it is a folder; name a file"),
    (
      [*MIX, "--json=/proc/x.json"],
      "--json=/proc/x.json: No such file or directory in /proc; choose another place",
    ),
    (["--load=1"], "did you mean --loads?"),
  ],
)
def test_bad_input_takes_one_line(arguments, said):
  done = launch(*SMALL, *arguments)
  assert done.returncode == 2
  assert done.stderr.count("\n") == 1 and said in done.stderr
