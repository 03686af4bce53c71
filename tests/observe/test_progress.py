"""What a person sees: the stream is replayed on a small terminal, or read as a log."""

import io

import numpy as np
import pytest

from moe_jax.observe import progress

METRICS = {
  "loss": np.float32(2.34567), "tokens_per_s": 48210.4, "load_max_over_mean": [1.1, 1.32],
  "dropped_fraction": 0.0042,
}  # fmt: skip


class Terminal(io.StringIO):
  def isatty(self):
    return True

  def screen(self):
    """Returns the lines that the written text leaves on a terminal."""
    lines = [""]
    column = 0
    text = self.getvalue().replace("\x1b[K", "\0")
    for character in text:
      if character == "\n":
        lines.append("")
        column = 0
      elif character == "\r":
        column = 0
      elif character == "\0":
        lines[-1] = lines[-1][:column]
      else:
        lines[-1] = lines[-1][:column] + character + lines[-1][column + 1 :]
        column += 1
    return lines


class Clock:
  now_s = 0.0

  def __call__(self):
    return self.now_s


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
  monkeypatch.setenv("COLUMNS", "120")


def test_one_line_is_redrawn_in_place():
  terminal, clock = Terminal(), Clock()
  shown = progress.Progress(400, terminal, clock=clock)
  for step in range(120):
    clock.now_s += 2.0
    shown.update(step, METRICS)
  assert terminal.screen() == [
    "step 120/400  loss 2.3457  48,210 tokens/s  9m 20s left  busiest expert 1.32x  dropped 0.4%"
  ]


def test_messages_stand_above_the_live_line():
  terminal, clock = Terminal(), Clock()
  shown = progress.Progress(3, terminal, clock=clock)
  shown.message("1,024 parameters")
  for step in range(3):
    clock.now_s += 1.0
    shown.update(step, {"loss": 1.0 * step})
    shown.message(f"checkpoint {step}")
  shown.close()
  shown.close()
  assert terminal.screen() == [
    "1,024 parameters", "checkpoint 0", "checkpoint 1", "checkpoint 2",
    "step 3/3  loss 2.0000  done", "",
  ]  # fmt: skip


def test_a_shorter_line_leaves_nothing_of_a_longer_one():
  terminal, clock = Terminal(), Clock()
  shown = progress.Progress(9, terminal, clock=clock)
  shown.update(0, METRICS)
  clock.now_s += 1.0
  shown.update(1, {})
  assert terminal.screen() == ["step 2/9  7s left"]


def test_a_line_never_wraps(monkeypatch):
  monkeypatch.setenv("COLUMNS", "30")
  terminal = Terminal()
  progress.Progress(400, terminal, clock=Clock()).update(0, METRICS)
  assert terminal.screen() == ["step   1/400  loss 2.3457  48"]


def test_fast_steps_are_not_all_drawn_but_the_last_is():
  terminal, clock = Terminal(), Clock()
  shown = progress.Progress(1000, terminal, clock=clock)
  for step in range(1000):
    clock.now_s += 0.001
    shown.update(step, {})
  assert terminal.getvalue().count("\r") < 15
  assert terminal.screen() == ["step 1000/1000  done"]


def test_a_log_gets_a_plain_line_every_few_seconds():
  log, clock = io.StringIO(), Clock()
  shown = progress.Progress(20, log, plain_every_s=5.0, clock=clock)
  for step in range(20):
    clock.now_s += 1.0
    shown.update(step, {"loss": 1.0})
    if step == 6:
      shown.message("checkpoint saved")
  shown.close()
  assert log.getvalue().splitlines() == [
    "step  1/20  loss 1.0000  -- left", "step  6/20  loss 1.0000  14s left", "checkpoint saved",
    "step 11/20  loss 1.0000  9s left", "step 16/20  loss 1.0000  4s left",
    "step 20/20  loss 1.0000  done",
  ]  # fmt: skip


def test_a_slow_first_step_and_a_resume_do_not_bend_the_remaining_time():
  log, clock = io.StringIO(), Clock()
  shown = progress.Progress(100, log, plain_every_s=0.0, clock=clock)
  for step, step_s in ((50, 90.0), (51, 2.0), (52, 2.0)):
    clock.now_s += step_s
    shown.update(step, {})
  assert log.getvalue().splitlines()[-1] == "step  53/100  1m 34s left"


def test_what_went_wrong_is_shown():
  log = io.StringIO()
  progress.Progress(9, log, clock=Clock()).update(0, {"loss": float("nan"), "skipped_steps": 2})
  assert log.getvalue() == "step 1/9  loss nan  -- left  skipped 2\n"


@pytest.mark.parametrize(("seconds", "text"), [
  (0.4, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (185, "3m 05s"), (3599.7, "1h 00m"),
  (7625, "2h 07m"),
])  # fmt: skip
def test_durations_read_well(seconds, text):
  assert progress.duration(seconds) == text
