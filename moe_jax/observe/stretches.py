"""How long each device ran a phase each time that it did: latencies from a profiler's trace.

A stretch is what a device runs of a phase until it begins something of another one: of `experts`
mostly one layer's pass over one micro-batch, forward or backward; where a tick's two halves run
side by side, a part of one. Its latency is the time in which something of the phase ran, waits for
other devices in its collectives included. Knows events; must not know the model or where a trace
lies.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from moe_jax.observe.trace import PHASES, Event, phase_of

PERCENTILES = (50, 90, 99)


def of_events(
  events: Iterable[Event], phase: str, phases: tuple[str, ...] = PHASES
) -> dict[int, np.ndarray]:
  """Returns {device: seconds of each stretch}, in time order.

  Args:
    events: in time order, as `trace.read_events` returns them.
    phase: one of `phases`.
    phases: names of `jax.named_scope`s; what ran under none of them ends no stretch.

  Raises:
    ValueError: `phase` is not among `phases`, or never ran.
  """
  check_phase(phase, phases)
  known: dict[str, str | None] = {}
  seconds: dict[int, list[float]] = {}
  last_phase: dict[int, str] = {}
  covered_s: dict[int, float] = {}  # until when the device's stretch is counted
  for event in events:
    if event.op_name not in known:
      known[event.op_name] = phase_of(event.op_name, phases)
    found = known[event.op_name]
    if found is None:
      continue
    if found == phase:
      of_device = seconds.setdefault(event.device, [])
      if last_phase.get(event.device) != phase:
        of_device.append(0.0)
      stop_s = event.start_s + event.duration_s
      # What overlaps, such as a loop and what it holds, counts once.
      start_s = max(event.start_s, covered_s.get(event.device, event.start_s))
      of_device[-1] += max(stop_s - start_s, 0.0)
      covered_s[event.device] = max(stop_s, start_s)
    last_phase[event.device] = found
  if not seconds:
    raise ValueError(
      f"the trace holds nothing of phase {phase}; profile steps of a model that has it"
    )
  return {device: np.array(seconds[device]) for device in sorted(seconds)}


def check_phase(phase: str, phases: tuple[str, ...] = PHASES) -> None:
  """Checks that `phase` is one of `phases`.

  Raises:
    ValueError: it is not.
  """
  if phase not in phases:
    raise ValueError(f"phase={phase!r} is not one of {', '.join(phases)}; choose one of them")


def percentiles(seconds: np.ndarray, at: tuple[int, ...] = PERCENTILES) -> list[float]:
  """Returns percentiles of latencies, each a latency that occurred, seconds."""
  return [float(each) for each in np.percentile(seconds, at, method="inverted_cdf")]


def histogram(
  seconds_by_device: Mapping[int, np.ndarray], num_bins: int = 24
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
  """Returns (edges_s, {device: stretches in each bin}), bins of one ratio and alike for all.

  Args:
    num_bins: from the shortest to the longest stretch of any device.
  """
  together = np.concatenate(list(seconds_by_device.values()))
  positive = together[together > 0]
  low, high = (positive.min(), positive.max()) if len(positive) else (1e-9, 1e-9)
  edges_s = np.geomspace(low, max(high, low * 1.001), num_bins + 1)
  # Ends that rounding moved inwards would lose what lies on them; the first takes what was nothing.
  edges_s[-1] = max(edges_s[-1], high)
  inside = lambda seconds: np.clip(seconds, edges_s[0], edges_s[-1])
  return edges_s, {
    device: np.histogram(inside(seconds), edges_s)[0]
    for device, seconds in seconds_by_device.items()
  }
