"""A small train step, compiled for a pod that is not there, by the command that users type."""

import dataclasses
import importlib.util
import json
import types

import pytest

from moe_jax import config as config_lib
from moe_jax.model import flash
from moe_jax.plan import cost, units
from moe_jax.rehearse import lowering, memory, text
from moe_jax.train import step as step_lib
from tests import runs
from tests.plan import executed
from tests.rehearse.command import rehearse

if not importlib.util.find_spec("jax_plugins"):
  pytest.skip("the rehearse extra is not installed", allow_module_level=True)


# More work than tiny has, so that what formulas leave out is small beside it.
BIGGER = [
  "--config.model.d_model=128", "--config.model.expert_hidden=128", "--config.model.vocab=512",
  "--config.model.head_dim=16", "--config.train.sequence=64", "--config.model.dtype=bfloat16",
]  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  path = tmp_path_factory.mktemp("report") / "report.json"
  files = [f"--json={path}", f"--picture={path.with_name('tick.html')}"]
  finished = rehearse("--pod=h100:2x4", *files, *BIGGER)
  assert finished.returncode == 0, finished.stderr
  trace = json.loads(path.with_name("tick.trace.json").read_text())
  return finished, json.loads(path.read_text()), path.with_name("tick.html").read_text(), trace


@pytest.mark.slow
def test_the_report_has_the_documented_keys(done):
  _, report, _, _ = done
  assert {"memory_bytes", "collectives", "exposure", "prediction", "claims"} <= set(report)
  assert "total" in report["memory_bytes"]
  for row in report["collectives"]:
    keys = ("kind", "axis", "phase", "link", "count", "bytes_per_gpu", "seconds", "hidden_seconds")
    assert set(keys) <= set(row)
    assert 0 <= row["hidden_seconds"] <= row["seconds"] * (1 + 1e-9)
  for found in (report["exposure"], report["planned"]["exposure"]):
    assert {"hidden_fraction", "hidden_fraction_by_axis"} <= set(found)
    assert {"hideable_fraction", "hidden_of_hideable", "hidden_of_hideable_by_axis"} <= set(found)
  prediction = ("step_s", "tokens_per_ms_per_gpu", "ttft_s", "bubble_fraction")
  assert set(prediction) <= set(report["prediction"])
  for row in report["claims"]:
    assert set(row) == {"claim", "asked", "found", "holds", "how"}


def on_pod(tmp_path, config, *more):
  """Returns the report of a config's train step, or of another one, on the reference's pod; by
  XLA's own guess, unless it is told otherwise.
  """
  path = tmp_path / "report.json"
  words = ["--pod=h100:16x4", "--symmetric_memory", "--once", f"--json={path}", *more]
  finished = rehearse(*words, config=config)
  assert finished.returncode == 0, finished.stderr
  return json.loads(path.read_text())


@pytest.mark.slow
def test_the_reference_deployment_on_h100(tmp_path):
  found = on_pod(tmp_path, "pod64")
  assert found["exposure"]["beside_kernels_fraction"] >= 0.95
  assert found["planned"]["exposure"]["hidden_of_hideable"] >= 0.64
  assert found["prediction"]["bubble_fraction"] <= 0.016
  assert found["prediction"]["tokens_per_ms_per_gpu"] >= 100
  assert found["memory_bytes"]["total"] <= 4.312e9
  # Master weights travel in bfloat16: XLA would rather gather float32 and convert afterwards.
  settings = config_lib.from_mapping(found["config"])
  planned = next(step for step in units.begin(settings) if step.kind == "all-gather")
  gathers = ("all-gather", "expert")
  sent = sum(r["bytes_per_gpu"] for r in found["collectives"] if (r["kind"], r["axis"]) == gathers)
  expected = planned.operand_bytes * (settings.mesh.expert - 1)
  assert sent == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_copies_hide_what_they_send(tmp_path):
  """The reference's model and batch with experts inside hosts, no token dropped: what the plan asks
  of its chip, and of H100.
  """
  found = on_pod(tmp_path, "pod64_copies", "--noonce")
  for chip in (found, found["planned"]):
    assert chip["exposure"]["hidden_of_hideable"] >= 0.92
    assert chip["prediction"]["tokens_per_ms_per_gpu"] >= 100
  assert found["prediction"]["tokens_per_ms_per_gpu"] >= 270
  assert found["prediction"]["bubble_fraction"] == 0
  assert found["memory_bytes"]["total"] <= 4.312e9
  # No token leaves its host: between hosts weights travel, gradients and some numbers.
  between = [r for r in found["collectives"] if r["link"] == "between"]
  assert all("data" in r["axis"] for r in between)
  assert all("data" not in r["axis"] for r in found["collectives"] if r["link"] == "inside")


@pytest.mark.slow
@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_a_copy_on_each_gpu_serves_without_waiting(tmp_path, step):
  found = on_pod(tmp_path, "pod64_serve", f"--step={step}")
  # Nothing but the counts of experts' loads is sent, beside the last products.
  assert [(r["kind"], r["axis"], r["count"]) for r in found["collectives"]] == [
    ("all-reduce", "data", 1)
  ]
  for chip in (found, found["planned"]):
    assert chip["exposure"]["hidden_of_hideable"] >= 0.92
  assert found["memory_bytes"]["total"] <= 4.312e9
  if step == "prefill":
    assert found["prediction"]["ttft_s"] < 0.25
  assert not found["unknown"]


@pytest.mark.slow
def test_registered_memory_is_read_off_the_program(done, tmp_path):
  """The same collectives; those inside hosts that gather and sum may take less, and no others."""
  path = tmp_path / "report.json"
  words = ["--pod=h100:2x4", "--symmetric_memory", "--once", f"--json={path}", *BIGGER]
  finished = rehearse(*words)
  assert finished.returncode == 0, finished.stderr
  assert "memory registered inside hosts" in finished.stdout
  _, plain, _, _ = done
  registered = json.loads(path.read_text())
  assert registered["pod"]["symmetric_memory"] and not plain["pod"]["symmetric_memory"]
  keys = ("kind", "axis", "phase", "link", "is_backward", "count", "bytes_per_gpu")
  alike = lambda report: {
    tuple(row[k] for k in keys): row["seconds"] for row in report["collectives"]
  }
  before, after = alike(plain), alike(registered)
  assert set(before) == set(after)
  may = {row for row in after if row[keys.index("link")] == "inside" and row[0] != "all-to-all"}
  # Not all: a ring of two begins sooner than the kernel for more than a few bytes.
  shorter = {row for row in after if after[row] < before[row]}
  assert {row for row in may if "tensor" in row[1]} <= shorter <= may
  assert {row for row in after if after[row] != before[row]} == shorter


@pytest.mark.slow
def test_of_two_schedules_the_shorter_is_reported(done):
  finished, report, _, _ = done
  assert finished.stderr.count("compiled in") == 2
  assert set(report["schedule_s"]) == {"by_guess", "by_profile"}
  assert report["prediction"]["step_s"] == min(report["schedule_s"].values())


@pytest.mark.slow
def test_nothing_is_left_unread(done):
  assert done[1]["unknown"] == {}


@pytest.mark.slow
def test_stealing_is_read_as_if_nothing_were_stolen(tmp_path):
  path = tmp_path / "report.json"
  words = ["--pod=h100:2x4", "--once", f"--json={path}", "--config.moe.dispatch=stealing"]
  finished = rehearse(*words)
  assert finished.returncode == 0, finished.stderr
  found = json.loads(path.read_text())
  assert finished.stderr.count("compiled in") == 1 and set(found["schedule_s"]) == {"by_guess"}
  assert found["unknown"] == {} and found["prediction"]["bubble_fraction"] > 0
  assert any("nothing is stolen" in what for what in found["assumed"])


@pytest.mark.slow
def test_parts_of_memory_add_up_to_xlas_total(done):
  found = done[1]["memory_bytes"]
  assert sum(found[part] for part in memory.PARTS) == found["total"]
  assert all(found[part] >= 0 for part in memory.PARTS)


def test_weights_that_are_computed_with_as_they_lie_have_no_copy():
  """float32 on one device: the only temporaries are gradients and what XLA needs besides."""
  settings = runs.settings(
    mesh={"expert": 1, "tensor": 1, "stage": 1}, pipeline={"gradient_dtype": "float32"}
  )
  account = types.SimpleNamespace(
    argument_size_in_bytes=0, output_size_in_bytes=0, alias_size_in_bytes=0,
    generated_code_size_in_bytes=0, temp_size_in_bytes=1_000_000,
  )  # fmt: skip
  compiled = lowering.Compiled("", account, {"optimizer": ()}, 0.0, 0.0, None)
  elements = cost.num_parameters(settings.model).total
  found = memory.by_part(settings, compiled)
  assert found["gradients"] == 4 * elements and found["compute_copies"] == 0
  assert found["activations_and_buffers"] == 1_000_000 - 4 * elements > 0
  model = dataclasses.replace(settings.model, dtype="bfloat16")
  cast = memory.by_part(dataclasses.replace(settings, model=model), compiled)
  assert 0 < cast["compute_copies"] < 2 * elements  # norms and router stay in float32
  assert sum(cast[part] for part in memory.PARTS) == cast["total"] == 1_000_000


@pytest.mark.slow
def test_operations_are_those_of_the_formulas(done):
  _, report, _, _ = done
  settings = config_lib.from_mapping(report["config"])
  table, gpus = step_lib.table(settings), settings.mesh.num_devices
  analytic = executed.train_flops(settings, flash.BLOCK, flash.PRODUCTS[flash.BACKWARD])
  idle = table.ticks_by_kind["forward"] / table.units_by_kind["forward"]  # masked cells run too
  expected = ((analytic.total - analytic.head) * idle + analytic.head) / gpus
  assert report["flops"]["executed"] == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_the_terminal_says_what_binds_first(done):
  finished, report, _, _ = done
  assert finished.stdout.splitlines()[0] == report["binding"]
  assert finished.stdout.rstrip() == text.render(report)
  assert "compiled in" in finished.stderr and "Traceback" not in finished.stderr


@pytest.mark.slow
def test_the_picture_and_the_trace_show_the_same_tick(done):
  _, report, page, trace = done
  assert "http" not in page and report["pod"]["name"] in page
  events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
  assert len(events) == page.count("<rect ") > 50
  assert {event["tid"] for event in events} == {0, 1, 2, 3}
  for is_backward in (False, True):
    of_unit = [e for e in events if e["args"]["is_backward"] == is_backward]
    exchange = next(e for e in of_unit if e["name"].startswith("all-to-all"))
    words = f"{exchange['name']}, {exchange['args']['phase']}{', backward' * is_backward}"
    assert f"{words}: {exchange['dur']:.1f} us" in page


@pytest.mark.slow
def test_a_program_that_is_too_large_says_so_in_one_line():
  # A decode step has the fewest kernels to compile; its weights alone are too large.
  wide = [
    "--step=decode",
    "--once",
    "--config.model.d_model=16384",
    "--config.model.expert_hidden=131072",
  ]
  finished = rehearse("--pod=h100:2x4", *wide)
  assert finished.returncode == 1
  assert "DOES NOT FIT" in finished.stdout
  last = finished.stderr.splitlines()[-1]
  assert "the GPU has 80 GB; choose a larger mesh.tensor or mesh.stage" in last


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--pod=h100:4x4"], "mesh expert=2 x tensor=2 x stage=2 needs 8 GPUs, pod h100:4x4 has 16"),
    (
      ["--pod=h100:4x4", "--config.mesh.data=4"],
      "mesh expert=2 x tensor=2 x stage=2 x data=4 needs 32 GPUs, pod h100:4x4 has 16",
    ),
    (["--pod=h10:2x4"], "chip 'h10' is not known; did you mean h100?"),
    (["--pod=64"], "--pod=64 is not CHIP:HOSTSxGPUS"),
    (["--pod=h100:2x4", "--once", "--profile=x"], "so that --profile has none; leave one out"),
  ],
)
def test_mistakes_end_in_one_line(words, message):
  finished = rehearse(*words)
  assert finished.returncode == 2 and finished.stdout == ""
  assert len(finished.stderr.splitlines()) == 1 and message in finished.stderr
