"""How long each device of a run took over a phase, as launch.show_load prints it.

Knows the run's profile folder and config; must not know flags.
"""

import json
import pathlib

import numpy as np

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
    names = (lambda device: f"device {device}") if processes else _ranks(folder)
    seconds = stretches.of_events(trace.read_events(process), phase)
    found |= {f"{name}{names(device)}": each for device, each in seconds.items()}
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


def _ranks(folder: pathlib.Path):
  """Returns the function from a device's number to its name on the run's mesh."""
  path = folder / "config.json"
  if not path.is_file():
    raise ValueError(f"{path} is missing; name the folder of a run of launch.train")
  sizes = json.loads(path.read_text(encoding="utf-8"))["mesh"]
  shown = _AXES if sizes.get("data", 1) > 1 else _AXES[1:]

  def name(device: int) -> str:
    place = np.unravel_index(device, [sizes.get(axis, 1) for axis in _AXES])
    known = [(axis, index) for axis, index in zip(_AXES, place, strict=True) if axis in shown]
    return ", ".join(f"{axis} {index}" for axis, index in known)

  return name
