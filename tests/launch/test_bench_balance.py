"""launch.bench_balance: rows that other tools read, its verdicts, and a recording of a real run."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from launch import balance, recording
from moe_jax import config
from moe_jax.balance.policies import POLICIES
from tests import runs

KEYS = {
  "workload", "policy", "max_over_mean", "dropped_fraction", "moved_bytes", "decision_us",
  "step_over_ideal",
}  # fmt: skip
SMALL = ["--workloads=even,zipf 1.5", "--layers=2", "--tokens=2048", "--micro_batches=32"]


def launch(*arguments):
  return subprocess.run(
    [sys.executable, "-W", "error", "-m", "launch.bench_balance", *arguments],
    cwd=runs.ROOT, capture_output=True, text=True, timeout=300,
    env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
  )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bench")
  file, picture = folder / "new folder" / "balance.json", folder / "balance.png"
  done = launch(*SMALL, f"--json={file}", f"--out={picture}")
  assert done.returncode == 0, done.stderr
  return json.loads(file.read_text()), done.stdout, picture


def test_every_workload_has_a_row_of_every_policy(finished):
  rows, shown, picture = finished
  assert all(set(row) >= KEYS for row in rows)
  found = {(row["workload"], row["policy"]) for row in rows}
  assert len(found) == len(rows)
  every = {*POLICIES, "bandit"}
  for name in ("even", "zipf 1.5"):
    assert {policy for workload, policy in found if workload == name} == every
  changing = {name for name, make in POLICIES.items() if make.needs_scores}
  assert {policy for workload, policy in found if workload == "recorded"} == every - changing
  for policy in every:
    assert policy in shown
  assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 20_000


def test_the_figures_make_sense(finished):
  rows = {(row["workload"], row["policy"]): row for row in finished[0]}
  for row in rows.values():
    assert row["max_over_mean"] >= 1 - 1e-9
    assert row["step_over_ideal"] >= row["max_over_mean"] * (1 - row["dropped_fraction"]) * 0.99
    assert (row["dropped_fraction"] > 0) == (
      row["policy"] == "capacity" and row["workload"] != "even"
    )
  for workload in ("zipf 1.5", "recorded"):
    assert rows[workload, "none"]["max_over_mean"] > 1.5
    assert rows[workload, "placement+stealing"]["max_over_mean"] <= 1.02
    assert rows[workload, "placement+stealing"]["moved_bytes"] > 0
    assert rows[workload, "stealing"]["decision_us"] > 0


def test_the_bandit_is_near_the_best_fixed_policy_and_not_worse_than_none(finished):
  for workload in ("even", "zipf 1.5", "recorded"):
    rows = {row["policy"]: row for row in finished[0] if row["workload"] == workload}
    fixed = {
      policy: row["step_over_ideal"]
      for policy, row in rows.items()
      if policy in POLICIES and not row["dropped_fraction"]
    }
    found = rows["bandit"]["step_over_ideal"]
    assert found <= 1.02 * min(fixed.values())
    assert found <= 1.005 * fixed["none"]


def test_the_flags_it_names_are_those_of_a_deployment(finished):
  rows, shown, _ = finished
  named = {row["policy"]: row["train_with"] for row in rows if row["train_with"]}
  expected = {"none", "stealing", "stealing if it pays", "bias", "quantile"}
  assert expected <= set(named) < set(POLICIES)
  for words in named.values():
    assert words in shown
    mapping = {}
    for word in words.split():
      name, _, value = word.removeprefix("--config.").partition("=")
      section, _, field = name.partition(".")
      mapping.setdefault(section, {})[field] = config.field_types()[name](value or "True")
    assert config.as_dict(config.from_mapping(mapping))["moe"].items() >= mapping["moe"].items()
  assert "shadow_tokens" in named["stealing if it pays"]


def test_it_says_how_well_recorded_windows_are_foreseen(finished):
  assert "recorded: next window foreseen: last 9" in finished[1]


@pytest.mark.parametrize(("window", "num_windows"), [(64, 3), (500, 0)])
def test_it_says_where_windows_are_too_few_to_foresee_one(window, num_windows):
  recorded = recording.load(str(runs.ROOT / "configs" / "laptop_routing.npz"))
  said = f"recorded: no window is foreseen: {num_windows} of --window={window} in 240 micro-batches"
  assert balance.forecast_text("recorded", recorded, window).startswith(said)


@pytest.mark.parametrize(
  ("steps", "said"),
  [
    ({"none": 1.05, "placement": 1.05, "stealing": 2.0}, "doing nothing is best"),
    ({"none": 1.05, "placement": 1.049, "bias": 1.0}, "doing nothing is best; bias"),
    ({"none": 1.6, "placement": 1.1, "stealing": 1.2}, "best is placement: 1.100"),
  ],
)
def test_the_verdict(steps, said):
  row = {"dropped_fraction": 0.0}
  rows = [{"policy": name, "step_over_ideal": each, **row} for name, each in steps.items()]
  rows.append({"policy": "capacity", "step_over_ideal": 0.5, "dropped_fraction": 0.2})
  assert balance.verdict(rows).startswith(said)


def test_a_recording_is_what_a_real_run_routed(tmp_path):
  file = tmp_path / "new" / "routing.npz"
  done = launch(
    f"--record={file}", f"--config={runs.TINY}", "--config.train.steps=3",
    f"--config.data.paths={runs.TEXT}",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "3 micro-batches" in done.stdout
  found = recording.load(str(file))
  settings = config.from_mapping(found.settings)
  assert settings.mesh.num_devices == settings.pipeline.micro_batches == 1
  model, train = settings.model, settings.train
  assert found.counts_ULE.shape == (3, model.layers, model.experts)
  tokens = train.batch * train.sequence
  assert (found.tokens_UV.sum(1) == tokens).all()
  assert (found.counts_ULE.sum(2) == tokens * model.experts_per_token).all()
  # An untrained router is uneven, and what it learns changes the routing.
  assert len(np.unique(found.counts_ULE[:, 0], axis=0)) == 3


@pytest.mark.parametrize("num_bytes", [0, 100, 2_000])
def test_a_recording_that_is_cut_off_is_none(tmp_path, num_bytes):
  whole = (runs.ROOT / "configs" / "laptop_routing.npz").read_bytes()
  (tmp_path / "cut.npz").write_bytes(whole[:num_bytes])
  with pytest.raises(ValueError, match=r"cut.npz is not a recording \(.*\); make one with"):
    recording.load(str(tmp_path / "cut.npz"))


def test_what_one_device_cannot_keep_is_reset_or_refused():
  moe = {"expert_ranks_per_host": 2, "hosts_per_token": 1}
  of = lambda **different: runs.settings(
    mesh={"expert": 4}, train={"batch": 16}, pipeline={"prefetch_layers": 1}, **different
  )
  alone = recording.one_micro_batch(of(moe={"expert_ranks_per_host": 2}))
  assert alone.moe.expert_ranks_per_host == 1 and alone.pipeline.prefetch_layers == 0
  with pytest.raises(ValueError, match=r"moe.hosts_per_token=1 .* recorded on one device"):
    recording.one_micro_batch(of(moe=moe))


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--workloads=zpf"], "workload='zpf' is not one of even"),
    (["--recordings=README.md", *SMALL], "README.md is not a recording"),
    (["--recordings=nothing.npz", "--workloads=even", *SMALL[1:]], "nothing.npz: No such file"),
    (["--config.mesh.expert=3"], "not divisible by mesh.expert=3"),
    (["--chip=h300"], "--chip=h300 is not one of a100"),
    (["--seed=-1"], "--seed=-1"),
    (["--out=x.jpg"], "--out=x.jpg: it is no name of a PNG; choose one that ends in .png"),
    (["--slots=-5"], "--slots=-5"),
    (["--slots=8", *SMALL], "--slots=8 does not hold 16 experts on mesh.expert=8 ranks"),
    (["--slots=20", *SMALL], "choose a multiple of 8 from 16 up, or 0"),
  ],
)
def test_bad_input_takes_one_line(arguments, said):
  done = launch(*arguments)
  assert done.returncode == 2
  assert done.stderr.count("\n") == 1 and said in done.stderr
