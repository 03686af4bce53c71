"""Reads a trace that `jax.profiler` wrote, and tells which phase of the model each event is of.

An event names only its HLO instruction (`fusion.3`). The trace keeps the compiled programs beside
the events, and there each instruction has an `op_name` that holds the `jax.named_scope`s it was
traced under, forward, recomputed or backward: `jit(step)/transpose(jvp())/attention/dot_general`.
So a trace explains itself, and no compiled program need be at hand to read it.

This module must not know the model; phases are names that it is given.
"""

import dataclasses
import gzip
import json
import os
import pathlib
import re
import warnings
from collections.abc import Iterator

from jax.profiler import ProfileData

PHASES = ("embed", "attention", "dispatch", "experts", "combine", "head")

TRACK_PID = 10_000  # XLA gives hosts and devices ids below 1,000

# Field numbers of xplane.proto and hlo.proto. Source: tsl/profiler/protobuf/xplane.proto,
# xla/service/hlo.proto, xla/xla_data.proto of openxla/xla.
SPACE_PLANES, PLANE_NAME, PLANE_EVENT_METADATA, MAP_VALUE = 1, 2, 4, 2
METADATA_NAME, METADATA_STATS, STAT_BYTES = 2, 5, 6
PROTO_MODULE, MODULE_COMPUTATIONS, COMPUTATION_INSTRUCTIONS = 1, 3, 2
INSTRUCTION_NAME, INSTRUCTION_METADATA, OP_NAME = 1, 7, 2


@dataclasses.dataclass(frozen=True)
class Event:
  """One run of one HLO instruction on one device."""

  op: str  # the instruction's name, such as `fusion.3`
  op_name: str  # the scopes it was traced under; empty where XLA made it up
  program: str  # the compiled program, such as `jit_step(8)`
  run_id: str  # of this execution of the program, the same on all its devices
  device: int
  start_s: float
  duration_s: float


def phase_of(op_name: str, phases: tuple[str, ...]) -> str | None:
  """Returns the innermost of `phases` among the scopes of an HLO `op_name`, or None.

  A scope stands between slashes, or inside the name of a transformation, `jvp(attention)`; the name
  of a function under jit, `jit(head)`, is no scope.
  """
  names = "|".join(map(re.escape, phases))
  found = re.findall(rf"(?:^|/|(?<!jit)\()({names})(?=[/)]|$)", op_name)
  return found[-1] if found else None


def read_events(folder) -> list[Event]:
  """Returns every run of an HLO instruction in the newest trace under `folder`, in time order.

  Raises:
    ValueError: there is no trace.
  """
  events = []
  for path in sorted(_session(folder).glob("*.xplane.pb")):
    serialized = path.read_bytes()
    op_names = _op_names(serialized)
    with warnings.catch_warnings():
      # Its types lack __module__; where that warning is an error, jaxlib aborts the process.
      warnings.filterwarnings("ignore", "builtin type .* has no __module__", DeprecationWarning)
      for plane in ProfileData.from_serialized_xspace(serialized).planes:
        for line in plane.lines:
          events += [e for e in (_event(plane, each, op_names) for each in line.events) if e]
  return sorted(events, key=lambda event: event.start_s)


def annotate(folder, phases=PHASES):
  """Writes the phases into the newest trace under `folder`, for Perfetto and chrome://tracing.

  In its `*.trace.json.gz` the event of an instruction is renamed `attention/fusion.3`, gets
  `phase` and `op_name` among its arguments, and each device gets a track a phase.

  Args:
    folder: what `Profiler` was given.
    phases: names of `jax.named_scope`s.

  Raises:
    ValueError: there is no trace.
  """
  phases = tuple(phases)
  events = read_events(folder)
  phase_by_op_name = {name: phase_of(name, phases) for name in {e.op_name for e in events}}
  op_names = {(event.run_id, event.op): event.op_name for event in events}
  for path in sorted(_session(folder).glob("*.trace.json.gz")):
    chrome = json.loads(gzip.decompress(path.read_bytes()))
    for shown in chrome["traceEvents"]:
      arguments = shown.get("args", {})
      op_name = op_names.get((arguments.get("run_id"), arguments.get("hlo_op")))
      phase = phase_by_op_name.get(op_name)
      if phase is not None and "phase" not in arguments:
        shown["name"] = f"{phase}/{shown['name']}"
        shown["args"] = {**arguments, "phase": phase, "op_name": op_name}
    # XLA ends its list with an empty event.
    others = [shown for shown in chrome["traceEvents"] if shown.get("pid", TRACK_PID) < TRACK_PID]
    chrome["traceEvents"] = others + _tracks(events, phases)
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(gzip.compress(json.dumps(chrome).encode(), compresslevel=3))
    os.replace(temporary, path)


def _event(plane, event, op_names: dict[str, dict[str, str]]) -> Event | None:
  stats = dict(event.stats)
  if "hlo_op" not in stats or "program_id" not in stats:
    return None
  op, program = stats["hlo_op"], f"{stats['hlo_module']}({stats['program_id']})"
  return Event(
    op=op,
    op_name=_program(op_names, program).get(op, ""),
    program=program,
    run_id=str(stats.get("run_id", "")),
    # A GPU is a plane of its own, `/device:GPU:3`; CPU devices share one, and the event says which.
    device=int(stats["device_ordinal"] if "device_ordinal" in stats else plane.name.split(":")[-1]),
    start_s=event.start_ns * 1e-9,
    duration_s=event.duration_ns * 1e-9,
  )


def _program(op_names: dict[str, dict[str, str]], program: str) -> dict[str, str]:
  if program in op_names:
    return op_names[program]
  # The events of a program from jax's compilation cache carry the number that it had when it was
  # compiled, its kept text the number of this process: only the name connects them.
  same_name = [p for p in op_names if p.rpartition("(")[0] == program.rpartition("(")[0]]
  return op_names[same_name[0]] if len(same_name) == 1 else {}


def _session(folder) -> pathlib.Path:
  sessions = sorted(pathlib.Path(folder).glob("plugins/profile/*/"))
  if not sessions:
    raise ValueError(
      f"{folder} holds no trace, expected plugins/profile/<time>/*.xplane.pb; profile a few steps"
    )
  return sessions[-1]


def _phase_spans(events: list[Event], phases: tuple[str, ...]):
  """Returns {(phase, device): [[start_s, stop_s], ...]}, apart and in order; `events` in order."""
  phase_by_op_name = {name: phase_of(name, phases) for name in {e.op_name for e in events}}
  spans = {}
  for event in events:
    phase = phase_by_op_name[event.op_name]
    if phase is None:
      continue
    merged = spans.setdefault((phase, event.device), [])
    stop_s = event.start_s + event.duration_s
    if merged and event.start_s <= merged[-1][1]:
      merged[-1][1] = max(merged[-1][1], stop_s)
    else:
      merged.append([event.start_s, stop_s])
  return spans


def _tracks(events: list[Event], phases: tuple[str, ...]) -> list[dict]:
  tracks = []
  for (phase, device), merged in sorted(_phase_spans(events, phases).items()):
    place = {"pid": TRACK_PID + device, "tid": phases.index(phase)}
    tracks += [
      {"ph": "M", **place, "name": "process_name", "args": {"name": f"phases of device {device}"}},
      {"ph": "M", **place, "name": "thread_name", "args": {"name": phase}},
      {"ph": "M", **place, "name": "thread_sort_index", "args": {"sort_index": place["tid"]}},
    ]
    tracks += [
      {"ph": "X", **place, "name": phase, "ts": start_s * 1e6, "dur": (stop_s - start_s) * 1e6}
      for start_s, stop_s in merged
    ]
  return tracks


def _op_names(serialized: bytes) -> dict[str, dict[str, str]]:
  """Returns {program: {instruction: op_name}} of the compiled programs that a trace keeps."""
  op_names = {}
  for plane in _get(serialized, SPACE_PLANES):
    if _first(plane, PLANE_NAME) != b"/host:metadata":
      continue
    for entry in _get(plane, PLANE_EVENT_METADATA):
      metadata = _first(entry, MAP_VALUE)
      op_names[_first(metadata, METADATA_NAME).decode()] = {
        _first(instruction, INSTRUCTION_NAME).decode(): _first(
          _first(instruction, INSTRUCTION_METADATA), OP_NAME
        ).decode()
        for stat in _get(metadata, METADATA_STATS)
        for proto in _get(stat, STAT_BYTES)
        for module in _get(proto, PROTO_MODULE)
        for computation in _get(module, MODULE_COMPUTATIONS)
        for instruction in _get(computation, COMPUTATION_INSTRUCTIONS)
      }
  return op_names


def _first(message: bytes, number: int) -> bytes:
  return next(_get(message, number), b"")


def _get(message: bytes, number: int) -> Iterator[bytes]:
  """Yields the length-delimited fields `number` of a serialized protobuf message.

  Source: https://protobuf.dev/programming-guides/encoding. The two schemas are in no package that
  jax depends on.
  """
  position = 0
  while position < len(message):
    key, position = _varint(message, position)
    size = {1: 8, 5: 4}.get(key & 7, 0)
    if key & 7 == 0:
      _, position = _varint(message, position)
    elif key & 7 == 2:
      size, position = _varint(message, position)
      if key >> 3 == number:
        yield message[position : position + size]
    elif not size:
      raise ValueError(f"the trace has wire type {key & 7} at byte {position}, expected 0, 1, 2, 5")
    position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = message[position]
    value |= (byte & 127) << shift
    position, shift = position + 1, shift + 7
    if byte < 128:
      return value, position
