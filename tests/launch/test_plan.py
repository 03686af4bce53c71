"""launch.plan from a shell: what it prints and writes, and that others can take its best config."""

import json
import subprocess
import sys

import pytest

from launch import config_file
from moe_jax import config as config_lib
from moe_jax.plan import calibration, simulate
from moe_jax.plan.hardware import cluster
from moe_jax.plan.machine import Machine
from tests import runs

SMALL = [
  "--config.model.layers=2", "--config.model.heads=4", "--config.model.kv_heads=4",
  "--config.model.experts=4", "--config.moe.capacity_factor=2.0", "--config.train.batch=8",
  "--config.pipeline.micro_batches=2",
]  # fmt: skip


def plan(*arguments):
  command = [sys.executable, "-W", "error", "-m", "launch.plan", f"--config={runs.TINY}"]
  return subprocess.run(
    [*command, *SMALL, *arguments], cwd=runs.ROOT, capture_output=True, text=True, timeout=120
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A run that writes everything."""
  folder = tmp_path_factory.mktemp("plan")
  arguments = (f"--json={folder}/plan.json", f"--out={folder}/out", "--zipf=1.0")
  done = plan(*arguments, "--tokens_per_ms=0.001")
  assert done.returncode == 0, done.stderr
  (folder / "stdout").write_text(done.stdout)
  return folder


def test_it_prints_claims_plans_and_the_smallest_cluster(folder):
  text = (folder / "stdout").read_text()
  for heading in (
    "EVERY FIGURE OF THE REFERENCE PLAN", "WHAT DOES NOT HOLD, and why", "PLANS SIDE BY SIDE",
    "WHAT TO CHANGE FIRST", "SMALLEST CLUSTER",
  ):  # fmt: skip
    assert heading in text
  assert "modules: 8 x 4 x 2 GPUs" in text
  assert "1 GPUs" in text and "meets them" in text


def test_its_json_says_the_same(folder):
  found = json.loads((folder / "plan.json").read_text())
  assert {"claims", "plans", "change_first", "smallest", "sizes"} <= set(found)
  assert found["plans"]["best"]["seconds"] <= found["plans"]["given"]["seconds"]
  assert found["smallest"]["config"]["mesh"] == {"expert": 1, "tensor": 1, "stage": 1, "data": 1}
  assert len(found["claims"]) > 50


def test_the_best_config_is_ready_to_run(folder):
  """The file is loaded as every launcher loads it, and asks for what the plan says."""
  found = json.loads((folder / "plan.json").read_text())
  written = config_lib.from_mapping(config_file.load(str(folder / "out/best.py")))
  assert config_lib.as_dict(written) == found["plans"]["best"]["config"]
  assert written.mesh.num_devices == 8


@pytest.mark.parametrize(
  "name",
  ["graph.json", "graph.graphml", "modules.dot", "modules.svg", "best.trace.json", "best.html",
   "best.svg", "given.trace.json"],
)  # fmt: skip
def test_it_writes_graph_and_timeline(folder, name):
  content = (folder / "out" / name).read_text()
  assert len(content) > 500
  if name.endswith(".json"):
    json.loads(content)


def test_serving_has_a_time_to_first_token():
  done = plan("--workload=serve", "--prompt_tokens=64", "--tokens_per_ms=0.001")
  assert done.returncode == 0, done.stderr
  assert "time to first token" in done.stdout and "key-value cache" in done.stdout
  assert "for 8 sequences at once of 64 prompt and 256 output tokens each" in done.stdout


def test_sequences_are_not_those_of_training():
  done = plan("--workload=serve", "--prompt_tokens=64", "--tokens_per_ms=0.001", "--sequences=6")
  assert done.returncode == 0, done.stderr
  assert "cuts sequences into 4 shares" in done.stdout and "for 6 sequences" in done.stdout


@pytest.mark.parametrize("hosts_per_token", [0, 1])
def test_fields_of_the_given_mesh_do_not_bind_another_cluster(hosts_per_token):
  mesh = ["--config.mesh.expert=4", "--config.mesh.tensor=1"]
  hosts = [
    f"--config.moe.hosts_per_token={hosts_per_token}",
    "--config.moe.expert_ranks_per_host=2",
  ]
  done = plan("--cluster=h100:1x4", *mesh, *hosts, "--tokens_per_ms=0.001")
  assert done.returncode == 0, done.stderr
  assert "train.batch is taken as 4" in done.stdout


def test_the_default_cluster_has_as_many_gpus_as_the_mesh(tmp_path):
  mesh = ["--config.mesh.expert=3", "--config.mesh.tensor=2", "--config.mesh.stage=1"]
  sizes = ["--config.model.experts=6", "--config.train.batch=12", f"--json={tmp_path}/plan.json"]
  done = plan(*mesh, *sizes, "--tokens_per_ms=0.001")
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / "plan.json").read_text())
  assert found["plans"]["given"]["cluster"] == "h100:2x3" and found["claims"]


def test_a_target_that_no_size_meets_is_told_by_the_exit_code():
  done = plan("--tokens_per_ms=1e12")
  assert done.returncode == 1
  assert "none of these sizes meets them" in done.stdout


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--cluster=h100:0x4"], "error: cluster 'h100:0x4' has no GPU"),
    (
      ["--cluster=h1000:2x4"],
      "error: cluster 'h1000:2x4': chip 'h1000' is not known; did you mean",
    ),
    (["--config.model.d_model=400000000"], "too little; give more GPUs"),
    (["--workload=serve", "--ttft_s=1e-12"], "error: no plan gives the first token within 1e-12 s"),
    (["--bubble=-0.1"], "error: --bubble=-0.1 is wrong; expected a non-negative number"),
    (["--workload=serve", "--bubble=0.1"], "error: --bubble is of a training step, which"),
    (["--sequences=6"], "error: --sequences is of what is served, which --workload=train has not"),
    (["--prompt_tokens=64"], "error: --prompt_tokens is of what is served"),
    (["--output_tokens=256"], "error: --output_tokens is of what is served"),
    (["--ttft_s=6"], "error: --ttft_s is of what is served"),
    (["--zipf=1", "--trace=nowhere.json"], "error: --trace is a recorded load and --zipf a made"),
    (["--zipf=-1"], "error: zipf=-1.0 is not a number from 0 up"),
    (["--trace=nowhere.json"], "error: nowhere.json: No such file"),
    (["--calibration=nowhere.json"], "error: nowhere.json: No such file"),
    (["--workload=play"], "--workload=play is not one of train, serve"),
  ],
)
def test_a_bad_specification_takes_one_line(arguments, message):
  done = plan(*arguments)
  assert done.returncode == 2
  said = [line for line in done.stderr.splitlines() if not line.startswith("[")]
  assert len(said) == 1 and message in said[0], done.stderr


def calibrated(folder, report):
  path = folder / "report.json"
  if isinstance(report, bytes):
    path.write_bytes(report)
  else:
    path.write_text(report if isinstance(report, str) else json.dumps(report))
  return plan(f"--calibration={folder}/report.json", "--tokens_per_ms=0.001")


def test_it_is_calibrated_by_a_rehearsals_report(tmp_path):
  settings = runs.settings()
  run = simulate.train(settings, Machine(cluster("h100:2x4")))
  report = {
    "config": config_lib.as_dict(settings), "pod": {"name": "h100:2x4"},
    "workload": {"step": "train"},
    "prediction": {name: getattr(run, name) for name in calibration.FITTED},
  }  # fmt: skip
  as_planned = calibrated(tmp_path, report)
  assert as_planned.returncode == 0, as_planned.stderr
  assert as_planned.stdout == plan("--tokens_per_ms=0.001").stdout
  for name in calibration.FITTED:
    report["prediction"][name] = {of: 2 * s for of, s in report["prediction"][name].items()}
  slower = calibrated(tmp_path, report)
  assert slower.returncode == 0, slower.stderr
  assert slower.stdout != as_planned.stdout


@pytest.mark.parametrize(
  "report, message",
  [
    ("{", "is not JSON"),
    (b"\xff\xfe{", "is not JSON: 'utf-8' codec can't decode byte 0xff in position 0"),
    ("5", "is no report of launch.rehearse (TypeError: 'int' object is not subscriptable); write"),
    ({"prediction": {}}, "is no report of launch.rehearse (KeyError: 'workload'); write one with"),
    (
      {"workload": {"step": "decode"}, "config": {}, "pod": {"name": "h100:1x1"},
       "prediction": {name: {} for name in calibration.FITTED}},
      "is of --step=decode, and what is fitted is a step of training",
    ),
  ],
)  # fmt: skip
def test_what_is_no_report_takes_one_line(tmp_path, report, message):
  done = calibrated(tmp_path, report)
  assert done.returncode == 2
  assert done.stderr.count("\n") == 1 and message in done.stderr
