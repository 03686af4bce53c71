"""The log of a run, step by step: its rate, and what it says of its checkpoints when it stops."""

import io

import jax
import numpy as np
import pytest

from moe_jax.observe.progress import Progress
from moe_jax.train import figures, log, optimizer
from moe_jax.train.step import Metrics
from tests import runs


class _Nothing:
  """In place of an evaluation, for which the devices take 7 seconds, and of a balancer."""

  def __init__(self, clock):
    self._clock = clock

  def finish(self, losses):
    del losses
    self._clock.now_s += 7
    return 1.0

  def observe(self, tokens_LE):
    del tokens_LE


class _Clock:
  now_s = 0.0

  def monotonic(self):
    return self.now_s


@pytest.fixture(autouse=True, scope="module")
def optax_promotes():
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture
def clock():
  return _Clock()


@pytest.fixture
def started(tmp_path, monkeypatch, clock):
  """A log from step 8 on, whose figures are none, and what logs its next step."""
  monkeypatch.setattr(log, "time", clock)

  def row(*given):
    clock.now_s += 0.5  # of the host, while the devices compute the next step
    return {"loss": 1.0}

  monkeypatch.setattr(figures, "row", row)
  monkeypatch.setattr(figures, "expert_tokens", lambda *given: np.zeros((4, 8)))
  (tmp_path / "checkpoints" / "8").mkdir(parents=True)
  progress = Progress(40, io.StringIO())
  settings = runs.settings(train={"steps": 40})
  log_ = log.Log(settings, tmp_path, progress, _Nothing(clock), _Nothing(clock), np.arange(4), 8)
  bad_in_a_row, step_id = 0, 8

  def step(is_finite=True, evaluation=None, done_s=None):
    nonlocal bad_in_a_row, step_id
    clock.now_s = clock.now_s + 1 if done_s is None else done_s
    bad_in_a_row = 0 if is_finite else bad_in_a_row + 1
    metrics = Metrics(None, 1.0, is_finite, bad_in_a_row, bad_in_a_row)
    log_.step(log.Dispatched(step_id, metrics, evaluation, 1.0, np.zeros((4, 8), int), None))
    step_id += 1

  yield log_, step
  log_.close()


def stop(step):
  with pytest.raises(log.Diverged) as error:
    for _ in range(5):
      step(is_finite=False)
  return str(error.value)


def test_a_run_that_stops_names_the_checkpoint_that_a_finite_step_followed(started, tmp_path):
  log_, step = started
  step()
  log_.saved(9)
  assert f"; the last good checkpoint is {tmp_path}/checkpoints/8; lower" in stop(step)


def test_a_run_that_stops_names_no_checkpoint_that_no_finite_step_followed(started):
  _, step = started
  assert "; no checkpoint of this run that is known to be good is left; lower" in stop(step)


def test_a_run_that_stops_names_no_checkpoint_that_is_deleted(started, tmp_path):
  _, step = started
  step()
  (tmp_path / "checkpoints" / "8").rmdir()
  assert "; no checkpoint of this run that is known to be good is left; lower" in stop(step)


def test_the_learning_rate_is_that_of_the_optimizer_after_any_number_of_steps(tmp_path):
  settings = runs.settings(train={"steps": 2**31 - 1, "warmup_steps": 10_000})
  progress = Progress(40, io.StringIO())
  log_ = log.Log(settings, tmp_path, progress, None, None, np.arange(4), 4090)
  schedule = optimizer.schedule(settings.train)
  for count in (4090, 4096, 9_999, 2**31 - 2):
    assert log_._learning_rate(count) == pytest.approx(float(schedule(count)), rel=1e-6)
  log_.close()


def test_the_rate_is_of_the_time_between_steps_without_what_else_was_waited_for(
  started, clock, tmp_path
):
  log_, step = started
  for done_s in (1, 3, 5):
    step(done_s=done_s)
  step(done_s=7, evaluation=[])
  step(done_s=16)  # the evaluation took until 14
  clock.now_s = 30
  log_.saved(13)
  step(done_s=34)
  seconds = [None, 2, 2, 2, 2, 4]
  num_tokens = 32 * 16
  expected = [each and num_tokens / each for each in seconds]
  assert [row["tokens_per_s"] for row in runs.rows(tmp_path)] == expected
