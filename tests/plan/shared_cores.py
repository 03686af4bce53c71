"""A training step on virtual devices of one process, which share its cores.

Nothing hides behind anything there: a step costs the sum over devices of what their units take,
masked cells included, in seconds of all cores. A unit takes what its products take at the machine's
rate, its bytes at the machine's bandwidth, and its collectives as copies from memory to memory; all
but the copies times what that kind of unit took of it where it was measured. A layer that the
executor runs outside of its loop over layers takes longer than one in it: what a step takes beside
its units alone is put down to those. What a tick costs else was nowhere more than noise. Knows
units, tables and rates; must not know how rates were measured.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from moe_jax.config import Config
from moe_jax.pipeline.table import KINDS
from moe_jax.plan import links, memory, units
from moe_jax.plan.steps import Step, group_size

_OF_LAYERS = ("forward", "backward")
_UNROLLED = 2  # layers of a unit of which none is left to a loop


class Cores(NamedTuple):
  """What all cores together do in a second of their time.

  Attributes:
    flops_per_s: of matrix products.
    bytes_per_s: read from and written to memory.
    sent_bytes_per_s: that collectives bring from one device to another.
    meeting_s: of one device at one collective, whatever it sends.
  """

  flops_per_s: float
  bytes_per_s: float
  sent_bytes_per_s: float
  meeting_s: float


class UnitSeconds(NamedTuple):
  """Of one unit on all devices: its own work, and its collectives."""

  work_s: float
  sending_s: float


@dataclasses.dataclass(frozen=True)
class Model:
  """Seconds of a step; every constant is of the machine, or of one measured configuration.

  Attributes:
    cores: the machine.
    factors: by kind of unit, what its work took over what the rates say.
    outside: what a layer out of the loop takes more than one in it, as a fraction.
  """

  cores: Cores
  factors: Mapping[str, float]
  outside: float

  def seconds(self, settings: Config) -> float:
    """Returns the predicted seconds of a step."""
    each = unit_seconds(settings, self.cores)
    unit_s = {kind: s.work_s * self.factors[kind] + s.sending_s for kind, s in each.items()}
    in_units, in_layers = _ticks_seconds(settings, unit_s)
    return in_units + in_layers * self.outside * outside_fraction(settings)


def outside_fraction(settings: Config) -> float:
  """Returns which part of a unit's layers the executor runs outside of its loop over layers.

  The last one; and of two both, for XLA makes no loop of one turn.
  """
  num_layers = units.layers_per_unit(settings)
  return 1.0 if num_layers <= _UNROLLED else 1 / num_layers


def unit_seconds(settings: Config, cores: Cores) -> dict[str, UnitSeconds]:
  """Returns what one unit of each kind takes on all devices together, at the machine's rates."""
  found = {}
  for kind in KINDS:
    layers = units.layers_per_unit(settings) if kind in _OF_LAYERS else 1
    times = layers * settings.mesh.num_devices
    steps = units.unit(settings, kind)
    work_s = sum(s.flops / cores.flops_per_s + s.num_bytes / cores.bytes_per_s for s in steps)
    sending_s = sum(_sending_seconds(step, settings, cores) for step in steps)
    found[kind] = UnitSeconds(work_s * times, sending_s * times)
  return found


def calibrate(settings: Config, cores: Cores, unit_s: Mapping[str, float], step_s: float) -> Model:
  """Returns the model that one configuration's measured units and step give.

  Layers out of the loop are taken as much longer than those of units alone as makes up the step.

  Args:
    settings: the configuration.
    cores: the machine.
    unit_s: of one unit of each kind, run alone on all devices.
    step_s: of a step.

  Raises:
    ValueError: a unit took less than its collectives alone are said to.
  """
  each = unit_seconds(settings, cores)
  factors = {kind: (unit_s[kind] - each[kind].sending_s) / each[kind].work_s for kind in KINDS}
  for kind, factor in factors.items():
    if factor <= 0:
      raise ValueError(
        f"unit {kind} took {unit_s[kind]:.4f} s, its collectives alone are said to take"
        f" {each[kind].sending_s:.4f} s; measure sent_bytes_per_s and meeting_s again"
      )
  in_units, in_layers = _ticks_seconds(settings, unit_s)
  return Model(cores, factors, (step_s - in_units) / (in_layers * outside_fraction(settings)))


def _ticks_seconds(settings: Config, unit_s: Mapping[str, float]) -> tuple[float, float]:
  """Returns the seconds of all units of a step, and of those of layers alone."""
  ticks = memory.table(settings.pipeline, settings.mesh.stage).ticks_by_kind
  total = lambda kinds: sum(unit_s[kind] * ticks[kind] for kind in kinds)
  return total(KINDS), total(_OF_LAYERS)


def _sending_seconds(step: Step, settings: Config, cores: Cores) -> float:
  """Returns what a device spends on a collective."""
  size = group_size(settings, step) if step.is_communication else 1
  if size == 1:
    return 0.0
  sent = links.bytes_sent(step.kind, step.operand_bytes, size)
  return cores.meeting_s + sent / cores.sent_bytes_per_s
