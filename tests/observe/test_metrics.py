"""Metrics as another program reads them: JSON lines, TensorBoard event files, the summary."""

import json
import signal
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from moe_jax.observe import metrics
from tests.train.test_checkpoint import full_disk


def _lines(path):
  # Strict: a reader outside Python takes no NaN.
  def refuse(name):
    raise AssertionError(f"{name} is not JSON")

  return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_every_kind_of_number_becomes_plain_json(tmp_path):
  writer = metrics.JsonlWriter(tmp_path / "run/metrics.jsonl")
  writer.write(0, {
    "loss": jnp.float32(2.5), "eval_loss": None, "grad_norm": np.float64(1.25), "name": "laptop",
    "skipped_steps": np.int64(3), "load_max_over_mean": jnp.array([1.5, jnp.inf]),
    "share": np.array([[0.5, 0.25]]), "half": jnp.bfloat16(0.5),
    "halves": jnp.ones(2, jnp.bfloat16), "ok": np.bool_(True),
    "nested": {"nan": float("nan"), "pair": (1, np.float32("-inf"))},
  })  # fmt: skip
  writer.write(jnp.int32(1), {"loss": float("nan")})
  writer.close()
  assert _lines(tmp_path / "run/metrics.jsonl") == [
    {
      "step": 0, "loss": 2.5, "eval_loss": None, "grad_norm": 1.25, "name": "laptop",
      "skipped_steps": 3, "load_max_over_mean": [1.5, None], "share": [[0.5, 0.25]], "half": 0.5,
      "halves": [1.0, 1.0], "ok": True, "nested": {"nan": None, "pair": [1, None]},
    },
    {"step": 1, "loss": None},
  ]  # fmt: skip


def test_a_value_that_is_no_metric_is_named(tmp_path):
  writer = metrics.JsonlWriter(tmp_path / "metrics.jsonl")
  with pytest.raises(ValueError, match=r"metrics\.when=.* is of type object"):
    writer.write(0, {"when": object()})
  writer.close()
  assert not (tmp_path / "metrics.jsonl").read_text()


def test_a_resumed_run_repeats_no_step(tmp_path):
  path = tmp_path / "metrics.jsonl"
  for first_step, stop in ((0, 6), (4, 8)):
    writer = metrics.JsonlWriter(path, first_step)
    for step in range(first_step, stop):
      writer.write(step, {"loss": 0.1 * step, "run": first_step})
    writer.close()
    writer.close()
  rows = _lines(path)
  assert [row["step"] for row in rows] == list(range(8))
  assert [row["run"] for row in rows] == [0] * 4 + [4] * 4
  assert metrics.read_jsonl(path) == rows
  metrics.JsonlWriter(path).close()
  assert path.read_text() == ""


def test_a_step_is_written_once(tmp_path):
  writer = metrics.JsonlWriter(tmp_path / "metrics.jsonl", 2)
  writer.write(2, {})
  with pytest.raises(ValueError, match=r"step=2 is already in .* at least 3"):
    writer.write(2, {})
  writer.close()


@pytest.mark.parametrize("cut", ['{"step": 2, "lo', "{", '{"step": 2, "loss": 1', "\0\0\0"])
def test_a_half_written_last_line_is_left_out_and_removed(tmp_path, cut):
  path = tmp_path / "metrics.jsonl"
  whole = [{"step": 0, "loss": 3.0}, {"step": 1, "loss": 2.0}]
  path.write_text("".join(json.dumps(row) + "\n" for row in whole) + cut)
  assert metrics.read_jsonl(path) == whole
  writer = metrics.JsonlWriter(path, 2)
  writer.write(2, {"loss": 1.0})
  writer.close()
  assert _lines(path) == [*whole, {"step": 2, "loss": 1.0}]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 0}\n{"step": 1}')
  writer = metrics.JsonlWriter(path, 2)
  writer.write(2, {})
  writer.close()
  assert [row["step"] for row in _lines(path)] == [0, 1, 2]


@pytest.mark.parametrize("bad", ["half", "[1]", '{"loss": 1.0}', '{"step": "1"}', ""])
def test_a_damaged_line_elsewhere_is_named_and_kept(tmp_path, bad):
  path = tmp_path / "metrics.jsonl"
  text = f'{{"step": 0}}\n{bad}\n{{"step": 2}}\n'
  path.write_text(text)
  with pytest.raises(ValueError, match="line 2 is not a step"):
    metrics.JsonlWriter(path, 3)
  assert path.read_text() == text


def test_a_killed_run_keeps_every_step_it_wrote(tmp_path):
  path = tmp_path / "metrics.jsonl"
  program = (
    "import sys; from moe_jax.observe import metrics; w = metrics.JsonlWriter(sys.argv[1])\n"
    "for step in range(10**9): w.write(step, {'loss': 1.5}); print(step, flush=True)"
  )
  with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE) as process:
    for _ in range(20):
      process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    written = 20 + len(process.stdout.readlines())
  assert len(metrics.read_jsonl(path)) >= written
  metrics.JsonlWriter(path, 10).close()
  assert [row["step"] for row in _lines(path)] == list(range(10))


def _events(folder):
  """Yields what event files hold, read as TFRecords."""
  for path in sorted(folder.glob("*tfevents*")):
    data = path.read_bytes()
    while data:
      (size,) = struct.unpack("<Q", data[:8])
      yield Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]


def _scalars(folder):
  """Returns {(tag, step): value} of event files."""
  return {
    (value.tag, event.step): value.simple_value
    for event in _events(folder)
    for value in event.summary.value
  }


def test_tensorboard_gets_scalars_and_one_scalar_a_layer(tmp_path):
  writer = metrics.TensorBoardWriter(tmp_path, 7)
  writer.write(7, {"loss": jnp.float32(2.5), "load": [1.5, 2.0], "eval_loss": None})
  writer.write(8, {"loss": 2.25, "skipped_steps": 1, "half": jnp.bfloat16(0.5)})
  writer.close()
  assert _scalars(tmp_path) == {
    ("loss", 7): 2.5, ("load/layer_00", 7): 1.5, ("load/layer_01", 7): 2.0,
    ("loss", 8): 2.25, ("skipped_steps", 8): 1.0, ("half", 8): 0.5,
  }  # fmt: skip


def test_tensorboard_hides_an_earlier_run_from_the_first_step_on(tmp_path):
  metrics.TensorBoardWriter(tmp_path, 7).close()
  start = [event for event in _events(tmp_path) if event.session_log.status == SessionLog.START]
  assert [event.step for event in start] == [7]


def test_tensorboard_sees_what_was_written_while_the_run_goes_on(tmp_path, monkeypatch):
  writer = metrics.TensorBoardWriter(tmp_path)
  writer.write(0, {"loss": 1.0})
  assert _scalars(tmp_path) == {}
  monkeypatch.setattr(metrics, "_FLUSH_S", 0.0)
  writer.write(1, {"loss": 2.0})
  assert _scalars(tmp_path) == {("loss", 0): 1.0, ("loss", 1): 2.0}
  writer.close()


def test_a_full_disk_is_an_error_and_not_waited_for(tmp_path):
  writer = metrics.TensorBoardWriter(tmp_path)
  with full_disk(), pytest.raises(OSError, match="too large"):
    for step in range(100_000):
      writer.write(step, {"loss": 1.0})
  writer.close()


@pytest.mark.parametrize("value", ["text", np.ones((2, 2))])
def test_tensorboard_names_what_is_no_scalar(tmp_path, value):
  writer = metrics.TensorBoardWriter(tmp_path)
  with pytest.raises(ValueError, match="share has shape"):
    writer.write(0, {"share": value})
  writer.close()


def test_writers_hand_each_call_to_all(tmp_path):
  paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
  writers = metrics.Writers([metrics.JsonlWriter(path) for path in paths])
  writers.write(0, {"loss": 1.0})
  writers.close()
  assert [_lines(path) for path in paths] == [[{"step": 0, "loss": 1.0}]] * 2
  with pytest.raises(ValueError, match="closed file"):
    writers.write(1, {})


def test_summary_replaces_the_old_one_whole(tmp_path):
  path = tmp_path / "run/summary.json"
  metrics.write_summary(path, {"eval_loss": np.float32(1.5), "bigram_loss": float("nan")})
  assert json.loads(path.read_text()) == {"eval_loss": 1.5, "bigram_loss": None}
  with pytest.raises(ValueError, match=r"summary\.steps"):
    metrics.write_summary(path, {"steps": object()})
  assert json.loads(path.read_text()) == {"eval_loss": 1.5, "bigram_loss": None}
  assert [each.name for each in path.parent.iterdir()] == ["summary.json"]
