"""What the executor costs in time and memory: 1f1b against gpipe and against a plain scan pipeline.

  python -m tests.pipeline.speed

prints the figures and exits with 1 where a bar is missed. It is a command and not a test because a
difference of 2% needs a machine that does nothing else: a test of it would fail by chance.
"""

import sys
import time

from launch import environment

if __name__ == "__main__":  # before jax is imported
  environment.virtual_devices(8)

import jax
import numpy as np

from moe_jax.pipeline.saving import SAVE
from tests.pipeline import baseline, toy
from tests.pipeline.test_cost import SCHEDULES, STAGES, temporary_bytes
from tests.pipeline.toy import Case

BARS = {"gpipe": 1.02, "baseline": 1.0}  # of the time of each, at most, that 1f1b may take


def programs():
  """Returns {name: (compiled step, its arrays)} of a layer heavy enough to be timed."""
  cases = {
    name: Case(name, STAGES, 16, chunks, expert=2, layers_per_chunk=2 // chunks)
    for name, chunks in SCHEDULES.items()
  }
  arrays = toy.make(2 * STAGES, 16, rows=128, width=256, hidden=512)
  mesh, gpipe = toy.make_mesh(cases["gpipe"]), cases["gpipe"].table()
  steps = {
    name: (toy.pipelined(mesh, case.table(), has_outputs=False), case.table())
    for name, case in cases.items()
  }
  steps["baseline"] = (baseline.pipelined(mesh, toy.functions(has_outputs=False), 16), gpipe)
  result = {}
  for name, (step, table) in steps.items():
    placed = toy.place(mesh, table, *arrays)
    result[name] = (jax.jit(step).lower(*placed).compile(), placed)
  return result


def step_seconds(steps, repeats: int = 11) -> dict[str, float]:
  """Returns the median of each step's seconds, the steps taking turns."""
  seconds = {name: [] for name in steps}
  for repeat in range(repeats + 1):
    # Each goes first as often as the others.
    for name in np.roll(list(steps), repeat):
      program, arrays = steps[name]
      start = time.perf_counter()
      jax.block_until_ready(program(*arrays))
      seconds[name].append(time.perf_counter() - start)
  return {name: float(np.median(each[1:])) for name, each in seconds.items()}


def main() -> int:
  for schedule in SCHEDULES:
    for save in SAVE:
      found = [temporary_bytes(schedule, m, save) for m in (16, 64)]
      print(f"{schedule} {save}: {found[0]:,} temporary bytes at m=16, {found[1]:,} at m=64")
  steps = programs()
  rounds = [step_seconds(steps) for _ in range(5)]
  code = 0
  for name, bar in BARS.items():
    ratios = sorted(each["1f1b"] / each[name] for each in rounds)
    print(f"1f1b / {name}: median {ratios[2]:.3f} of {[round(r, 3) for r in ratios]}, bar {bar}")
    code |= ratios[2] > bar
  return int(code)


if __name__ == "__main__":
  sys.exit(main())
