"""Where a run's numbers go: writers with one signature, `write(step, metrics)` and `close()`.

What the metrics mean is the caller's; this module must not know models, meshes or the loop.
"""

import contextlib
import json
import math
import os
import pathlib
import time

import numpy as np
from tensorboardX import summary as summary_lib
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

_FLUSH_S = 30.0  # between two writings of the event file, which TensorBoard reads meanwhile


class JsonlWriter:
  """Appends one JSON object a line, flushed, so that a killed run keeps every step it finished."""

  def __init__(self, path, first_step: int = 0):
    """Opens the file; of an earlier run only the steps before `first_step` stay in it.

    Args:
      path: file to write; its folder is made.
      first_step: index of the step that this run begins with; 0 is a new run.

    Raises:
      ValueError: a line of the existing file, other than a half-written last one, is not a step.
    """
    self._path = pathlib.Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    if self._path.exists():
      kept = [row for row in read_jsonl(self._path) if row["step"] < first_step]
      _replace(self._path, "".join(_line(row) for row in kept))
    self._last_step = first_step - 1
    self._file = self._path.open("a", encoding="utf-8")

  def write(self, step: int, metrics: dict):
    """Appends `metrics` as the line of `step`; NaN and infinity become null.

    Raises:
      ValueError: the step is already in the file, or a value is no number, text, list or mapping.
    """
    step = int(step)
    if step <= self._last_step:
      raise ValueError(
        f"step={step} is already in {self._path}, expected at least {self._last_step + 1};"
        " write each step once, in order"
      )
    self._file.write(_line({"step": step, **metrics}))
    self._file.flush()
    self._last_step = step

  def close(self):
    """Closes the file; a second call does nothing."""
    self._file.close()


class TensorBoardWriter:
  """Writes scalars, and an array over layers as one scalar a layer: `tag/layer_00`."""

  def __init__(self, folder, first_step: int = 0):
    """Opens an event file; TensorBoard hides an earlier run's steps from `first_step` on.

    Args:
      folder: folder of the event files; it is made.
      first_step: index of the step that this run begins with; 0 is a new run.
    """
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    # tensorboardX's SummaryWriter writes in a thread, which a full disk ends: the run would then
    # wait for it for ever.
    self._events = EventsWriter(str(path / "events"))
    self._write(first_step, session_log=SessionLog(status=SessionLog.START))
    self._flush()

  def write(self, step: int, metrics: dict):
    """Writes every number of `metrics`; None is left out.

    Raises:
      ValueError: a value is neither a number nor a list of numbers.
      OSError: the file cannot be written.
    """
    found = []
    for tag, value in metrics.items():
      if value is None:
        continue
      numbers = np.asarray(value)
      if numbers.ndim > 1 or not (numbers.dtype.kind in "biuf" or _is_ml_float(numbers.dtype)):
        raise ValueError(
          f"{tag} has shape {numbers.shape} and type {numbers.dtype}; TensorBoard takes a number or"
          " one number a layer"
        )
      if numbers.ndim == 0:
        found += summary_lib.scalar(tag, float(numbers)).value
      for layer, number in enumerate(numbers.tolist() if numbers.ndim else []):
        found += summary_lib.scalar(f"{tag}/layer_{layer:02d}", float(number)).value
    self._write(int(step), summary=summary_lib.Summary(value=found))
    if time.monotonic() - self._flushed_s > _FLUSH_S:
      self._flush()

  def close(self):
    """Writes what is buffered and closes the event file."""
    self._events.close()

  def _write(self, step: int, **content):
    self._events.write_event(Event(wall_time=time.time(), step=step, **content))

  def _flush(self):
    self._events.flush()
    self._flushed_s = time.monotonic()


class Writers:
  """Hands every call to each of several writers."""

  def __init__(self, writers):
    self._writers = tuple(writers)

  def write(self, step: int, metrics: dict):
    """Writes to each writer in turn."""
    for writer in self._writers:
      writer.write(step, metrics)

  def close(self):
    """Closes every writer, the rest too where one of them raises."""
    with contextlib.ExitStack() as stack:
      for writer in self._writers:
        stack.callback(writer.close)


def read_jsonl(path) -> list[dict]:
  """Returns the steps of a metrics file in order, without a last line that is half written.

  Raises:
    ValueError: another line is not a JSON object with a whole number `step`.
  """
  rows = []
  lines = pathlib.Path(path).read_bytes().split(b"\n")
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
    except ValueError:
      row = None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
      if number == len(lines):  # empty, or cut off by a kill
        break
      raise ValueError(
        f"{path} line {number} is not a step, expected an object with a whole number `step`, got"
        f" {line[:60]!r}; delete that line"
      )
    rows.append(row)
  return rows


def write_summary(path, summary: dict):
  """Writes `summary` as JSON; a reader, or a kill, sees the old file or the new one, never half.

  Args:
    path: file to write; its folder is made.
    summary: names to numbers, texts, lists or mappings; NaN and infinity become null.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  _replace(path, json.dumps(_plain("summary", summary), indent=2, allow_nan=False) + "\n")


def _replace(path: pathlib.Path, text: str):
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  with temporary.open("w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def _line(row: dict) -> str:
  return json.dumps(_plain("metrics", row), allow_nan=False) + "\n"


def _plain(name: str, value):
  if value is None or isinstance(value, bool | int | str):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, dict):
    return {str(key): _plain(f"{name}.{key}", each) for key, each in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(name, each) for each in value]
  if hasattr(value, "__array__"):
    array = np.asarray(value)
    if _is_ml_float(array.dtype):
      array = array.astype(np.float32)
    if array.dtype.kind in "biuf":
      return _plain(name, array.tolist())
  raise ValueError(
    f"{name}={value!r} is of type {type(value).__name__}; expected numbers, text, lists or mappings"
  )


def _is_ml_float(dtype: np.dtype) -> bool:
  # bfloat16 and the float8 types are not numpy's own: their kind is "V".
  return dtype.kind == "V" and np.can_cast(dtype, np.float32)
