"""The terminal's live line: where the run is, how fast, and how even its experts are.

It is given numbers and a stream; it must not know the loop, files or devices.
"""

import math
import shutil
import sys
import time

import numpy as np

REDRAW_S = 0.1  # shortest time between two drawings of the live line

# What the line shows, in this order.
FIGURES = {
  "loss": lambda loss: f"loss {float(loss):.4f}",
  "tokens_per_s": lambda rate: f"{float(rate):,.0f} tokens/s",
  "left": str,
  "load_max_over_mean": lambda ratio: f"busiest expert {float(np.max(ratio)):.2f}x",
  "dropped_fraction": lambda fraction: f"dropped {float(fraction):.1%}",
  "skipped_steps": lambda count: f"skipped {int(count)}",
}


class Progress:
  """One line redrawn in place on a terminal; elsewhere a plain line every few seconds."""

  def __init__(self, num_steps: int, stream=None, plain_every_s: float = 5.0, clock=time.monotonic):
    """Draws nothing yet.

    Args:
      num_steps: steps of the whole run, those before a resume included.
      stream: text stream to draw on; standard output by default.
      plain_every_s: shortest time between two lines where the stream is no terminal.
      clock: returns seconds that never go back.
    """
    self._num_steps = num_steps
    self._stream = sys.stdout if stream is None else stream
    self._is_terminal = self._stream.isatty()
    self._every_s = REDRAW_S if self._is_terminal else plain_every_s
    self._clock = clock
    self._first = None  # (step, time) when this run's first step, which compiles, had ended
    self._drawn_at_s = -math.inf
    self._line = ""

  def update(self, step: int, metrics: dict):
    """Shows a finished step.

    Args:
      step: its index, from 0.
      metrics: of its keys `loss`, `tokens_per_s`, `load_max_over_mean` (a number, or one a layer),
        `dropped_fraction` and `skipped_steps` are shown where present.
    """
    now_s = self._clock()
    if self._first is None:
      self._first = step, now_s
    is_last = step + 1 >= self._num_steps
    if now_s - self._drawn_at_s < self._every_s and not is_last:
      return
    self._drawn_at_s = now_s
    done = f"step {step + 1:>{len(str(self._num_steps))}}/{self._num_steps}"
    self._line = "  ".join([done, *_figures({**metrics, "left": self._remaining(step, now_s)})])
    self._draw(self._line)

  def message(self, text: str):
    """Prints a line of its own; on a terminal above the live line, which stays last."""
    if not self._is_terminal:
      self._stream.write(f"{text}\n")
    else:
      self._stream.write(f"\r\x1b[K{text}\n")
      if self._line:
        self._draw(self._line)
    self._stream.flush()

  def close(self):
    """Ends the live line, which stays as last drawn; a second call does nothing."""
    if self._is_terminal and self._line:
      self._stream.write("\n")
      self._stream.flush()
    self._line = ""

  def _draw(self, line: str):
    if self._is_terminal:
      # A line as wide as the terminal wraps, and could not be redrawn in place.
      width = shutil.get_terminal_size().columns - 1
      self._stream.write(f"\r{line[:width]}\x1b[K")
    else:
      self._stream.write(f"{line}\n")
    self._stream.flush()

  def _remaining(self, step: int, now_s: float) -> str:
    first_step, first_s = self._first
    if step + 1 >= self._num_steps:
      return "done"
    if step == first_step:
      return "-- left"
    step_s = (now_s - first_s) / (step - first_step)
    return f"{duration(step_s * (self._num_steps - step - 1))} left"


def duration(seconds: float) -> str:
  """Returns a time in its two largest units, such as `42s`, `3m 05s` or `2h 07m`."""
  seconds = round(seconds)
  minutes, hours = seconds // 60, seconds // 3600
  if hours:
    return f"{hours}h {minutes % 60:02d}m"
  return f"{minutes}m {seconds % 60:02d}s" if minutes else f"{seconds}s"


def _figures(metrics: dict) -> list[str]:
  return [show(metrics[name]) for name, show in FIGURES.items() if metrics.get(name) is not None]
