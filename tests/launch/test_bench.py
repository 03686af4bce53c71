"""launch.bench: the figures that other tools read, from the real program on a tiny deployment."""

import json
import os
import subprocess
import sys

import pytest

from launch import bench, config_file
from moe_jax import config as config_lib
from moe_jax.plan import cost
from tests import runs

SMALL = ["--config=configs/tiny.py", "--config.model.layers=1", "--config.pipeline.micro_batches=2"]
MESH = ["--config.mesh.expert=2", "--config.mesh.tensor=1", "--config.mesh.stage=1"]
GEMMS = {"square", "into_hidden", "out_of_hidden"}


def started(*arguments):
  return subprocess.Popen(
    [sys.executable, "-W", "error", "-m", "launch.bench", *arguments],
    cwd=runs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
  )  # fmt: skip


def ended(process):
  out, err = process.communicate(timeout=300)
  return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def launch(*arguments):
  return ended(started(*arguments))


def shipped(name):
  values = config_file.load(str(runs.ROOT / "configs" / f"{name}.py"))
  return config_lib.from_mapping(values)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  file = tmp_path_factory.mktemp("bench") / "new folder" / "bench.json"
  done = launch(*SMALL, *MESH, "--virtual_devices=2", "--repeats=12", f"--json={file}")
  assert done.returncode == 0, done.stderr
  return json.loads(file.read_text()), done.stdout


@pytest.mark.parametrize("kind", ["train", "forward"])
def test_the_figures_agree_with_each_other(finished, kind):
  found, _ = finished
  part, peak = found[kind], found["matmul_peak_flops_per_s"]
  settings = config_lib.from_mapping(found["config"])
  tokens = settings.train.batch * settings.train.sequence
  assert part["step_s"] >= part["fastest_step_s"] > 0 and part["cpu_s"] > 0
  assert part["tokens_per_s"] == pytest.approx(tokens / part["step_s"])
  assert part["model_flops_per_s"] == pytest.approx(part["model_flops"] / part["step_s"])
  assert part["matmul_peak_flops_per_s"] == peak
  assert part["fraction_of_peak"] == pytest.approx(part["model_flops_per_s"] / peak)
  # tiny has room for every token, so all of the model's work is counted.
  assert part["dropped_fraction"] == 0
  passes = {"train": 3, "forward": 1}[kind]
  forward = cost.forward_flops(settings.model, [settings.train.sequence] * settings.train.batch)
  assert part["model_flops"] == passes * forward.total


def test_a_train_step_takes_longer_than_its_forward_pass(finished):
  assert finished[0]["train"]["fastest_step_s"] > finished[0]["forward"]["fastest_step_s"]


def test_the_peak_is_the_best_of_three_shapes_and_three_times(finished):
  found, _ = finished
  assert {gemm["name"] for gemm in found["gemms"]} == GEMMS
  assert all(len(gemm["flops_per_s"]) == 3 for gemm in found["gemms"])
  rates = [rate for gemm in found["gemms"] for rate in gemm["flops_per_s"]]
  assert found["matmul_peak_flops_per_s"] == max(rates)


def test_the_table_shows_both_steps_and_every_shape(finished):
  found, shown = finished
  assert bench.to_text(found) in shown
  for name in ("train", "forward", *GEMMS):
    assert name in shown
  assert found["devices"].startswith("2 x ")


@pytest.mark.slow
def test_of_two_processes_the_first_says_what_both_run(tmp_path):
  file = tmp_path / "bench.json"
  together = [f"--coordinator=localhost:{runs.free_port()}", "--num_processes=2", f"--json={file}"]
  devices = ["--virtual_devices=1", "--repeats=1"]
  pair = [started(*SMALL, *MESH, *devices, *together, f"--process_id={i}") for i in range(2)]
  first, second = map(ended, pair)
  assert (first.returncode, second.returncode) == (0, 0), (first.stderr, second.stderr)
  found = json.loads(file.read_text())
  assert bench.to_text(found) in first.stdout and "tokens/s" not in second.stdout
  assert found["devices"].startswith("2 x ")
  assert found["train"]["dropped_fraction"] == 0


def test_what_was_dropped_is_no_work():
  settings = shipped("bench")
  steps = [((2.0, 3.0), 0.1), ((1.0, 2.0), 0.3), ((9.0, 9.0), 0.2)]
  found = bench.figures(settings, "train", steps, 1e12)
  whole = cost.train_flops(settings.model, [512] * 4)
  assert found["dropped_fraction"] == pytest.approx(0.2)
  assert found["model_flops"] == pytest.approx(whole.total - 0.2 * whole.experts)
  assert (found["step_s"], found["fastest_step_s"], found["cpu_s"]) == (2.0, 1.0, 3.0)
  assert found["tokens_per_s"] == 1024
  assert found["fraction_of_peak"] == pytest.approx(found["model_flops"] / 2e12)


def test_the_bench_config_is_what_the_bar_states():
  settings, pod64 = shipped("bench"), shipped("pod64")
  assert settings.mesh.num_devices == 1 and settings.pipeline.micro_batches == 1
  assert (settings.train.batch, settings.train.sequence) == (4, 512)
  assert (settings.model.layers, settings.model.vocab) == (4, 256)
  for name in ("d_model", "heads", "kv_heads", "head_dim", "experts", "experts_per_token"):
    assert getattr(settings.model, name) == getattr(pod64.model, name)
  assert settings.model.expert_hidden == pod64.model.expert_hidden
  assert settings.model.dtype == "float32"


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--repeats=0", *SMALL], "--repeats=0"),
    (["--jsn=x", *SMALL], "did you mean --json?"),
    ([*SMALL, *MESH, "--virtual_devices=3"], "needs 2 devices, found 3"),
    (
      [*SMALL, *MESH, "--virtual_devices=2", "--symmetric_memory"],
      "--symmetric_memory is for GPUs, and --virtual",
    ),
    (
      [*SMALL, *MESH, "--virtual_devices=2", "--scheduling_profile=x"],
      "--scheduling_profile is for GPUs, and",
    ),
  ],
)
def test_bad_input_takes_one_line(arguments, said):
  done = launch(*arguments)
  assert done.returncode == 2
  assert done.stderr.count("\n") == 1 and said in done.stderr
