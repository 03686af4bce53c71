"""Slices of TPUs on paper: one line for what is wrong, and a small train step where libtpu is."""

import importlib.util
import json

import jax
import pytest

from moe_jax import config as config_lib
from moe_jax.plan.hardware import TPUS
from moe_jax.rehearse import lowering, memory, pod, slice_report, slices, text
from moe_jax.train import step as step_lib
from tests.plan import executed
from tests.rehearse.command import rehearse

needs_compiler = pytest.mark.skipif(
  not importlib.util.find_spec("libtpu"),
  reason="libtpu is not installed: pip install --no-deps 'libtpu==0.0.42.*' for jax 0.10.2",
)
SMALLEST = {"v5p": "2x2x1", "v5e": "2x2", "v6e": "2x2"}


@pytest.mark.parametrize("chip", TPUS.values(), ids=TPUS)
def test_every_chip_is_ordered_as_hardware_is(chip):
  assert TPUS[chip.name] is chip and chip.source.startswith("https://")
  assert chip.dimensions in (2, 3)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("tpu:v5p", "is not tpu:CHIP:AxBxC; write it as --pod=tpu:v5p:4x4x4"),
    ("tpu:v5p:4x4x", "is not tpu:CHIP:AxBxC"),
    ("tpu:v5:4x4x4", "chip 'v5' is not known; did you mean v5p?"),
    ("tpu:h100:4x4", "chip 'h100' is not known; choose from v5p, v5e, v6e"),
    ("tpu:v5p:8x8", "has 2 dimensions, a slice of v5p has 3; write it as --pod=tpu:v5p:4x4x4"),
    ("tpu:v5e:4x4x4", "has 3 dimensions, a slice of v5e has 2; write it as --pod=tpu:v5e:4x4"),
  ],
)
def test_wrong_slices_are_refused_in_one_line(name, message):
  with pytest.raises(ValueError) as error:
    pod.describe(name)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_compiler_is_named_with_its_command(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(NotImplementedError, match=r"pip install --no-deps 'libtpu==\d"):
    pod.describe("tpu:v5p:4x4x4")


@pytest.mark.parametrize(
  ("step", "advised"),
  [
    ("train", "pipeline.save=exchanges, more pipeline.micro_batches or a larger slice"),
    ("prefill", "serve.kv_dtype=int8, a shorter serve.prefill_chunk or a larger slice"),
    ("decode", "serve.pages_fraction, serve.kv_dtype=int8 or a larger slice"),
  ],
)
def test_what_does_not_fit_is_answered_by_fields_of_the_step(step, advised, monkeypatch):
  def too_large(settings, mesh, progress):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: \n Used 40G of 16G hbm")

  monkeypatch.setitem(lowering.COMPILED, step, too_large)
  settings = config_lib.Config(pipeline=config_lib.Pipeline(save="residuals"))
  with pytest.raises(ValueError, match=f"40G of 16G hbm; choose .*{advised}$"):
    slice_report._compiled(step, settings, None, None)


@needs_compiler
@pytest.mark.parametrize("kind", TPUS)
def test_every_chip_is_described(kind):
  found = pod.describe(f"tpu:{kind}:{SMALLEST[kind]}")
  assert isinstance(found, slices.Slice) and found.name == f"tpu:{kind}:{SMALLEST[kind]}"
  assert len(found.devices) == 4 and found.hosts == 1
  with pytest.raises(ValueError, match=r"needs 8 TPUs, pod tpu:.* has 4; choose --pod=tpu:"):
    found.mesh(config_lib.Mesh(expert=2, tensor=2, stage=2))


@needs_compiler
def test_tensor_ranks_share_a_host():
  mesh = pod.describe("tpu:v5p:4x4x4").mesh(config_lib.Mesh(expert=8, tensor=4, stage=2))
  hosts = [[{d.process_index for d in row} for row in stage] for stage in mesh.devices]
  assert all(len(row) == 1 for stage in hosts for row in stage)


@needs_compiler
def test_a_shape_that_no_slice_has_is_refused_in_one_line():
  with pytest.raises(ValueError, match=r"^--pod=tpu:v5p:3x5x7: no such slice: [^\n]*$"):
    pod.describe("tpu:v5p:3x5x7")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  path = tmp_path_factory.mktemp("slice") / "report.json"
  # More work than tiny has, so that what formulas leave out is small beside it.
  bigger = [
    "--config.model.d_model=128", "--config.model.expert_hidden=128", "--config.model.vocab=512",
    "--config.model.head_dim=16", "--config.train.sequence=64", "--config.model.dtype=bfloat16",
  ]  # fmt: skip
  found = []
  for name in ("tpu:v5p:2x2x2", "h100:2x4"):
    finished = rehearse(f"--pod={name}", f"--json={path}", *bigger)
    assert finished.returncode == 0, finished.stderr
    found.append((finished.stdout, json.loads(path.read_text())))
  return found


@needs_compiler
@pytest.mark.slow
def test_the_report_says_what_is_read_and_what_is_not(done):
  (shown, report), _ = done
  assert shown.rstrip() == text.render(report) and report["binding"] == shown.splitlines()[0]
  found = report["memory_bytes"]
  assert sum(found[part] for part in memory.PARTS) == found["total"]
  assert all(found[part] >= 0 for part in memory.PARTS)
  assert report["exposure"]["hidden_fraction"] is None and "not read" in shown
  assert report["prediction"]["step_s"] is None
  assert not any("while" in what or "conditional" in what for what in report["unknown"])
  assert set(report["unknown"]) <= {
    "custom-call AllocateBuffer", "custom-call AssumeGatherIndicesInBound",
    "custom-call GatherScatterIndicesBitpacked", "custom-call PrepareAsyncCallStart",
    "custom-call PrepareAsyncCallDone", "call-start",
  }  # fmt: skip


@needs_compiler
@pytest.mark.slow
def test_the_exchange_is_that_of_gpus(done):
  (_, tpu), (_, gpu) = done

  def sent(report, field):
    exchange = [
      row[field]
      for row in report["collectives"]
      if row["kind"] == "all-to-all" and row["axis"] == "expert"
    ]
    return sum(exchange)

  assert sent(tpu, "count") == sent(gpu, "count") > 0
  assert sent(tpu, "bytes_per_gpu") == pytest.approx(sent(gpu, "bytes_per_gpu"), rel=0.01)


@needs_compiler
@pytest.mark.slow
def test_operations_are_those_of_the_formulas(done):
  (_, report), _ = done
  settings = config_lib.from_mapping(report["config"])
  table = step_lib.table(settings)
  analytic = executed.train_flops(settings, settings.train.sequence)
  idle = table.ticks_by_kind["forward"] / table.units_by_kind["forward"]  # masked cells run too
  expected = ((analytic.total - analytic.head) * idle + analytic.head) / 8
  assert report["flops"]["executed"] == pytest.approx(expected, rel=0.05)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--pod=tpu:v5p:2x2x1"], "needs 8 TPUs, pod tpu:v5p:2x2x1 has 4"),
    (["--pod=tpu:v5p:2x2x2", "--picture=tick.html"], "--picture shows times, which are not read"),
    (["--pod=tpu:v5p:2x2x2", "--once"], "--once is of GPUs"),
    (["--pod=tpu:v5p:2x2x2", "--symmetric_memory"], "--symmetric_memory is of GPUs and NCCL"),
    (
      ["--pod=tpu:v5e:2x4", "--config.model.d_model=8192", "--config.model.expert_hidden=65536"],
      "the program does not fit the TPU's memory",
    ),
  ],
)
def test_mistakes_end_in_one_line(words, message):
  finished = rehearse(*words)
  assert finished.returncode == 2 and finished.stdout == ""
  assert message in finished.stderr.splitlines()[-1] and "Traceback" not in finished.stderr
