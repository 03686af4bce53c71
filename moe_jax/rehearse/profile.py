"""What each kernel and each collective takes, as a profile that XLA's scheduler reads.

XLA guesses times when it lays computation behind communication; a profile tells it. On live devices
one is measured; here it comes from the same cost model as the report, so a program can be scheduled
by it before any device exists. Knows a program and its times; must not know how they are shown.
"""

from moe_jax.rehearse.exposure import Simulator
from moe_jax.rehearse.program import Collective, Done, Program, flat

# XLA starts a collective as late as its time allows, and what stands between start and done may
# wait itself: told twice the time, it starts early enough (pod64 on H100: 1x, 2x, 4x gave 95.7,
# 101.4 and 101.1 tokens/ms/GPU).
_OF_COLLECTIVES = 2.0


def of(simulator: Simulator, program: Program) -> str:
  """Returns the profile of a program, the text of a `ProfiledInstructionsProto`.

  Args:
    simulator: of the chip to schedule for.
    program: all of it counts, also what seldom runs.

  Source: OpenXLA, profile_guided_latency_estimator.h; the flag
  `xla_gpu_pgle_profile_file_or_directory_path` takes a file of it.
  """
  lines = []
  units = {unit.name: unit for unit, _ in flat(program.entry) if not isinstance(unit, Done)}
  for unit in units.values():
    factor = _OF_COLLECTIVES if isinstance(unit, Collective) else 1.0
    microseconds = factor * simulator.seconds(unit) * 1e6
    lines.append(f'costs {{ name: "{unit.name}" cost_us: {microseconds:.3f} }}')
  return "\n".join(lines) + "\n"
