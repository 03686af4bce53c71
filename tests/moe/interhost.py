"""Bytes that one layer's dispatch and combine send between hosts, read from the compiled program.

Run `python -m tests.moe.interhost`: 64 virtual CPU devices as 8 hosts x 8 GPUs, nothing executed.
Each collective's replica groups say which of its peers are on other hosts, its shape how much goes
to each. Forward only: the backward sends the same again. Knows programs and hosts; tests nothing.
"""

import argparse
import json
import sys

GPUS_PER_HOST = 8
# Of its bytes what a device sends to `away` of n devices: directly; and twice round a ring that
# leaves the host.
SHARE = {"all-to-all": lambda away, n: away / n, "all-reduce": lambda away, n: 2 * (n - 1) / n}
TOKENS, NUM_EXPERTS, NUM_CHOICES, WIDTH, NUM_HIDDEN = 256, 64, 2, 512, 128  # tokens of a device
# (expert, tensor) on 64 GPUs: the name is that of the dispatch or exchange.
WAYS = {
  "flat": {"exchange": "flat"},
  "hierarchical": {},
  "two_level, one host a token": {"dispatch": "two_level", "hosts_per_token": 1},
  "two_level, any hosts": {"dispatch": "two_level"},
}


def bytes_between_hosts(text: str, mesh, gpus_per_host: int) -> float:
  """Returns the bytes that device 0 sends to other hosts, loops counted once.

  Args:
    text: of the compiled program.
    mesh: size of each axis by name, outermost first.
  """
  from moe_jax.rehearse import groups, hlo

  total = 0.0
  for computation in hlo.parse(text).computations.values():
    for each in computation.instructions:
      if each.opcode in ("all-to-all", "all-gather", "reduce-scatter", "all-reduce"):
        members = next(group for group in groups.parse(each.attributes, mesh).members if 0 in group)
        away = sum(member // gpus_per_host > 0 for member in members)
        if away and each.opcode not in SHARE:
          raise ValueError(f"{each.opcode} {each.name} crosses hosts, which none was known to")
        if away:
          total += each.num_bytes * SHARE[each.opcode](away, len(members))
  return total


def compiled(mesh_sizes, moe: dict) -> str:
  """Returns the compiled text of one layer's first round, forward."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import PartitionSpec as P

  from moe_jax import config
  from moe_jax.moe import plan as plans
  from moe_jax.moe.dispatch import DISPATCH
  from moe_jax.moe.exchange import EXCHANGE
  from moe_jax.moe.experts import Weights
  from moe_jax.moe.router import Routing
  from moe_jax.parallel import mesh as mesh_lib
  from moe_jax.parallel.axes import EXPERT, TENSOR

  sizes = config.Mesh(*mesh_sizes)
  entry = DISPATCH[moe.get("dispatch", "capacity")]
  setting = plans.Setting(
    TOKENS, NUM_CHOICES, NUM_EXPERTS, 1.25, False, EXCHANGE[moe.get("exchange", "hierarchical")],
    GPUS_PER_HOST // sizes.tensor, moe.get("hosts_per_token", 0),
  )  # fmt: skip

  def region(x_tD, experts_tK, weights_tK, logits_tE, weights):
    plan = entry.plan(setting, Routing(experts_tK, weights_tK), logits_tE)
    computed = entry.compute(weights, plan, entry.send(setting, x_tD, plan, 0))
    return entry.back(setting, computed, weights_tK, plan, 0)

  every = P((EXPERT, TENSOR))
  weights_spec = Weights(P(EXPERT, None, None, TENSOR), P(EXPERT, TENSOR))
  struct = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
  T, E, D, F = TOKENS * sizes.num_devices, NUM_EXPERTS, WIDTH, NUM_HIDDEN
  call = jax.jit(
    jax.shard_map(
      region, mesh=mesh_lib.make(sizes), in_specs=(*[every] * 4, weights_spec), out_specs=every
    )
  )
  lowered = call.lower(
    struct(T, D), struct(T, NUM_CHOICES, dtype=jnp.int32), struct(T, NUM_CHOICES), struct(T, E),
    Weights(struct(E, D, 2, F), struct(E, F, D)),
  )  # fmt: skip
  return lowered.compile().as_text()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--tensor", type=int, default=4)
  parser.add_argument("--json", action="store_true")
  args = parser.parse_args()
  mesh = (64 // args.tensor, args.tensor)
  sizes = {"stage": 1, "expert": mesh[0], "tensor": mesh[1]}
  found = {
    name: bytes_between_hosts(compiled(mesh, moe), sizes, GPUS_PER_HOST)
    for name, moe in WAYS.items()
  }
  if args.json:
    json.dump(found, sys.stdout)
    return
  print(f"mesh expert {mesh[0]} x tensor {mesh[1]}, 8 hosts x 8 GPUs, {TOKENS} tokens a device")
  for name, each in found.items():
    print(
      f"{name:30} {each / 1e6:8.3f} MB a device, {each / found['hierarchical']:.2f}x hierarchical"
    )


if __name__ == "__main__":
  from launch import environment

  environment.virtual_devices(64)
  main()
