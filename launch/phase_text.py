"""How long each device of a run took over a phase, as launch.show_load prints it.

Knows the run's profile folder and config; must not know flags.
"""

import json
import math
import pathlib

import numpy as np

from moe_jax.observe import profile as profile_lib
from moe_jax.observe import stretches, trace

_SHADES = " ▁▂▃▄▅▆▇█"
_AXES = ("data", "stage", "expert", "tensor")  # as parallel.axes.ALL, the last innermost


def to_text(folder: pathlib.Path, phase: str) -> str:
  """Returns a table, a row a device: stretches, percentiles in milliseconds, and a histogram.

  Args:
    folder: of a run with `--profile_steps`.
    phase: of trace.PHASES.

  Raises:
    ValueError: there is no trace, no such phase, or it never ran.
  """
  stretches.check_phase(phase)  # before a trace is read, which takes its time
  found = {}
  profile = folder / "profile"
  processes = sorted(profile.glob("process_*"), key=lambda path: int(path.name.split("_")[1]))
  for process in processes or [profile]:
    name = f"{process.name} " if processes else ""
    seconds = stretches.of_events(trace.read_events(process), phase)
    names = [f"device {device}" for device in seconds] if processes else _ranks(folder, [*seconds])
    found |= {f"{name}{device}": each for device, each in zip(names, seconds.values(), strict=True)}
  return table(found, phase)


def table(found: dict[str, np.ndarray], phase: str) -> str:
  """Returns the rows of devices, by name."""
  edges_s, counts = stretches.histogram(found)
  width = max(map(len, found))
  lines = [
    f"{phase} by device, ms a stretch (histogram from {edges_s[0] * 1e3:.3g} to"
    f" {edges_s[-1] * 1e3:.3g} ms, each bin {edges_s[1] / edges_s[0]:.2f} times the one before):",
    f"{'':<{width}}{'number':>8}{'total':>10}{'P50':>9}{'P90':>9}{'P99':>9}{'max':>9}",
  ]
  for name, seconds in found.items():
    figures = [*stretches.percentiles(seconds), seconds.max()]
    lines.append(
      f"{name:<{width}}{len(seconds):>8}{seconds.sum() * 1e3:>10.2f}"
      + "".join(f"{each * 1e3:>9.3f}" for each in figures)
      + f"  {_bars(counts[name])}"
    )
  totals = np.array([seconds.sum() for seconds in found.values()])
  lines.append(f"busiest device over the mean: {totals.max() / totals.mean():.3f}")
  return "\n".join(lines)


def _bars(count_N: np.ndarray) -> str:
  """Returns a character a bin; any that holds a stretch shows."""
  level_N = np.ceil(count_N / max(count_N.max(), 1) * (len(_SHADES) - 1)).astype(int)
  return "".join(_SHADES[level] for level in level_N)


def _ranks(folder: pathlib.Path, devices: list[int]) -> list[str]:
  """Returns the devices' names on the mesh that was profiled; their numbers if it is not known."""
  # A run may have gone on with another mesh since.
  paths = (folder / "profile" / profile_lib.ABOUT, folder / "config.json")
  path = next((path for path in paths if path.is_file()), None)
  if path is None:
    raise ValueError(f"{paths[-1]} is missing; name the folder of a run of launch.train")
  sizes = json.loads(path.read_text(encoding="utf-8"))["mesh"]
  shape = [sizes.get(axis, 1) for axis in _AXES]
  if max(devices) >= math.prod(shape):
    return [f"device {device}" for device in devices]
  shown = _AXES if sizes.get("data", 1) > 1 else _AXES[1:]

  def name(device: int) -> str:
    place = np.unravel_index(device, shape)
    known = [(axis, index) for axis, index in zip(_AXES, place, strict=True) if axis in shown]
    return ", ".join(f"{axis} {index}" for axis, index in known)

  return [name(device) for device in devices]
