"""Which steps are profiled: starts and stops `jax.profiler` around them, and names their phases.

It must not know what a step computes.
"""

import pathlib
import re
from collections.abc import Callable

import jax

from moe_jax.observe import metrics, trace

ABOUT = "about.json"  # beside the newest trace
_UNREADABLE = (ValueError, IndexError, RuntimeError)  # what a trace that is cut off raises


def parse_steps(text: str) -> tuple[int, int]:
  """Returns (start, stop) of `start:stop`, steps counted from 0 and stop left out, as in a slice.

  Raises:
    ValueError: the text is not two whole numbers with the first below the second.
  """
  match = re.fullmatch(r"(\d+):(\d+)", text)
  start, stop = map(int, match.groups()) if match else (0, 0)
  if start >= stop:
    raise ValueError(
      f"profile_steps={text!r} is not start:stop, expected whole numbers with start below stop;"
      " 10:13 profiles steps 10, 11 and 12"
    )
  return start, stop


class Profiler:
  """Writes one trace of the steps from `start` up to, without, `stop`.

  Call `before_step` and `after_step` around every step of the run, and `close` at its end. Where
  several processes run, give each its own folder: a trace is named by its host alone.
  """

  def __init__(
    self,
    folder,
    start: int,
    stop: int,
    phases=trace.PHASES,
    *,
    about: dict | None = None,
    report: Callable[[str], None] = print,
  ):
    """Starts nothing yet.

    Args:
      folder: where the trace is written, in `plugins/profile/<time>/`; TensorBoard reads it too.
      start: index of the first profiled step.
      stop: index after the last profiled step.
      phases: names of `jax.named_scope`s to write onto the trace's events.
      about: what is profiled, plain JSON, to write beside the trace.
      report: takes one line where a trace cannot be read and its events stay without phases.
    """
    self.folder = pathlib.Path(folder)
    self._steps = range(start, stop)
    self._phases = tuple(phases)
    self._about, self._report = about, report
    self._annotation = None
    self._running = False

  def before_step(self, step: int):
    """Starts the trace where `step` is the first of the window that this run sees."""
    if step not in self._steps:
      return
    if not self._running:
      options = jax.profiler.ProfileOptions()
      # Python's own calls would outnumber the operations and slow the steps that are measured.
      options.python_tracer_level = 0
      jax.profiler.start_trace(str(self.folder), profiler_options=options)
      self._running = True
    self._annotation = jax.profiler.StepTraceAnnotation("step", step_num=step)
    self._annotation.__enter__()

  def after_step(self, step: int, arrays):
    """Waits for `arrays`, the step's results, within the window; after its last step, writes."""
    # Dispatch returns at once: without waiting, the step before the window would run on into the
    # trace, and the last one would be cut off.
    if self._running or step + 1 == self._steps.start:
      jax.block_until_ready(arrays)
    if not self._running:
      return
    self._end_annotation()
    if step + 1 >= self._steps.stop:
      self.close()

  def close(self):
    """Writes the trace if the run ended inside the window; otherwise does nothing."""
    if self._running:
      self._end_annotation()
      self._running = False
      jax.profiler.stop_trace()
      if self._about is not None:
        metrics.write_summary(self.folder / ABOUT, self._about)
      try:
        trace.annotate(self.folder, self._phases)
      except _UNREADABLE as error:
        self._report(f"the trace in {self.folder} is without phases: it cannot be read ({error})")

  def _end_annotation(self):
    if self._annotation is not None:
      self._annotation.__exit__(None, None, None)
      self._annotation = None
