"""Times the two decisions: placement of 58 layers x 256 experts x 288 slots, stealing of one layer.

Run `python -m tests.balance.speed`. Placement on one core, numpy; stealing compiled, with what it
takes to call it. The fastest of many is what the machine can do, the median what it did; the
process's own time leaves out what neighbours took.
"""

import functools
import time

from launch import environment

if __name__ == "__main__":  # before jax is imported
  environment.virtual_devices(8)

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.balance import packing, stealing
from tests.balance.test_packing import loads
from tests.balance.test_stealing import holders

NUM_LAYERS, NUM_EXPERTS, NUM_SLOTS, NUM_RANKS = 58, 256, 288, 32
TURNS = 60


def measure(call):
  """Returns (fastest, median, fastest processor) seconds."""
  wall, cpu = [], []
  for _ in range(TURNS):
    starts = time.perf_counter(), time.process_time()
    call()
    wall.append(time.perf_counter() - starts[0])
    cpu.append(time.process_time() - starts[1])
  return min(wall), float(np.median(wall)), min(cpu)


def show(name, seconds, unit, factor):
  fastest, median, cpu = (each * factor for each in seconds)
  print(f"{name:<44}{fastest:>10.2f}{median:>10.2f}{cpu:>10.2f}  {unit}")


def main():
  print(f"{'':<44}{'fastest':>10}{'median':>10}{'cpu':>10}")
  for kind in ("uniform", "lognormal", 1.0, 1.5):
    load_LE = loads(kind, NUM_LAYERS, NUM_EXPERTS)
    call = functools.partial(packing.plan, load_LE, NUM_SLOTS, NUM_RANKS)
    load_LX = packing.rank_loads(call(), load_LE, NUM_RANKS)
    even = (load_LX.mean(1) / load_LX.max(1)).mean()
    name = f"placement, {kind if isinstance(kind, str) else f'zipf {kind}'}, {even:.4f} balanced"
    show(name, measure(call), "ms", 1e3)
  for num_ranks, num_experts, num_shadows in ((64, 128, 8), (64, 128, 16), (8, 16, 4)):
    counts_E = jnp.asarray(loads(1.5, 1, num_experts)[0], jnp.int32)
    sizes = f"{num_ranks} ranks, {num_experts} experts, {num_shadows} shadows"
    holds_EX = stealing.held_once(num_experts, num_ranks)
    once = jax.jit(functools.partial(_decide, holds_EX, num_shadows))
    once(counts_E)
    show(
      f"stealing, {sizes}",
      measure(lambda once=once, counts_E=counts_E: jax.block_until_ready(once(counts_E))),
      "us",
      1e6,
    )
    decide = jax.jit(functools.partial(stealing.decide, num_shadows=num_shadows))
    placed = packing.plan(counts_E[None], num_experts + num_ranks, num_ranks)[0]
    held = holders(placed, num_experts, num_ranks)
    decide(counts_E, held)
    seconds = measure(lambda: jax.block_until_ready(decide(counts_E, held)))
    show("  with a placement's replicas", seconds, "us", 1e6)


def _decide(holds_EX, num_shadows, counts_E):
  return stealing.decide(counts_E, holds_EX, num_shadows)


if __name__ == "__main__":
  main()
