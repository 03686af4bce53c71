"""The window of profiled steps: how it is written, and that it closes when the run ends inside."""

import json

import jax
import jax.numpy as jnp
import pytest

from moe_jax.observe import profile, trace
from tests.observe.test_trace import phase_seconds


def test_steps_are_start_and_stop():
  assert profile.parse_steps("10:13") == (10, 13)
  assert profile.parse_steps("0:1") == (0, 1)


@pytest.mark.parametrize(
  "text", ["", "10", "13:10", "5:5", "a:b", "1:2:3", "-1:2", "1.0:2", "1:2 "]
)
def test_other_texts_are_refused_with_an_example(text):
  with pytest.raises(ValueError, match=r"is not start:stop.*10:13"):
    profile.parse_steps(text)


def test_a_run_that_ends_inside_the_window_still_writes_its_trace(tmp_path):
  @jax.jit
  def step(x):
    with jax.named_scope("experts"):
      return jnp.sin(x) * 3.0

  profiler = profile.Profiler(tmp_path, 3, 10)
  for i in range(2, 5):
    profiler.before_step(i)
    x = step(jnp.ones((16, 16)))
    if i < 4:  # the last step is interrupted before it ends
      profiler.after_step(i, x)
  profiler.close()
  profiler.close()
  assert phase_seconds(tmp_path)["experts"][0] > 0
  jax.profiler.start_trace(str(tmp_path / "next"))  # raises if the first had been left running
  jax.profiler.stop_trace()


def test_a_run_resumed_inside_the_window_profiles_the_rest(tmp_path):
  step = jax.jit(lambda x: jnp.cos(x) * 2.0)
  x = step(jnp.ones((16, 16)))
  profiler = profile.Profiler(tmp_path, 1, 5)
  for i in range(3, 8):
    profiler.before_step(i)
    x = step(x)
    profiler.after_step(i, x)
  assert len({event.run_id for event in trace.read_events(tmp_path)}) == 2


@pytest.mark.parametrize("damage", [b"\x0f", b"\x0a\xff", b"\x0a\x05ab"])
def test_a_trace_that_cannot_be_read_ends_no_run(tmp_path, monkeypatch, damage):
  lines, stop = [], jax.profiler.stop_trace

  def stop_and_damage():
    stop()
    for path in tmp_path.rglob("*.xplane.pb"):
      path.write_bytes(damage)

  monkeypatch.setattr(jax.profiler, "stop_trace", stop_and_damage)
  profiler = profile.Profiler(tmp_path, 0, 1, about={"steps": 1}, report=lines.append)
  profiler.before_step(0)
  profiler.after_step(0, jnp.ones(3))
  (line,) = lines
  assert line.startswith(f"the trace in {tmp_path} is without phases: it cannot be read (")
  assert json.loads((tmp_path / profile.ABOUT).read_text()) == {"steps": 1}


def test_a_run_that_never_reaches_the_window_writes_nothing(tmp_path):
  profiler = profile.Profiler(tmp_path, 10, 13)
  for i in range(2):
    profiler.before_step(i)
    profiler.after_step(i, jnp.ones(3))
  profiler.close()
  assert not list(tmp_path.iterdir())
