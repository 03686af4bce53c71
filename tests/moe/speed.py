"""Times the MoE layer's forward and backward against a dense network of the same FLOPs.

Run `python -m tests.moe.speed`: pod64's layer on 8 virtual CPU devices, an even load and a skewed
one. The dense network multiplies as many rows by as many weights, in one batched product a matrix
and without routing or exchange: it is what the layer costs at least. The programs take turns, so
that what else the machine does falls on all of them; they run under the malloc of the launch
programs, without which page faults weigh as much as products. Knows the layer; tests nothing.
"""

import argparse
import functools
import time

from tests import conftest  # isort: skip  # the devices, before jax

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from launch import environment
from moe_jax import config
from moe_jax.moe import capacity
from moe_jax.moe.experts import Weights, swiglu
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel.axes import EXPERT, TENSOR
from tests.moe import served

WIDTH, NUM_HIDDEN = 512, 1024  # of pod64
FACTOR = 1.25


def dense(mesh, num_rows):
  """Returns the jitted gradient of every expert on `num_rows` rows of its own."""
  sizes = config.Mesh(expert=mesh[0], tensor=mesh[1])
  weights_spec = Weights(*[P(EXPERT, None, TENSOR)] * 2, P(EXPERT, TENSOR))

  def region(rows_eRD, weights, cotangent_eRD):
    # Whole rows on each tensor rank, partial sums out: the share of the product that a rank has.
    _, vjp = jax.vjp(lambda r, w: swiglu(w, r), rows_eRD, weights)
    return vjp(cotangent_eRD)

  rows = P((EXPERT, TENSOR))
  call = jax.jit(
    jax.shard_map(
      region, mesh=mesh_lib.make(sizes), in_specs=(rows, weights_spec, rows),
      out_specs=(rows, weights_spec),
    )
  )  # fmt: skip
  weights = served.case("even", served.NUM_EXPERTS, 1, WIDTH, NUM_HIDDEN).weights
  random = np.random.default_rng(0)
  shape = (served.NUM_EXPERTS * mesh[1], num_rows, WIDTH)
  x, cotangent = (jnp.asarray(random.normal(size=shape), jnp.float32) for _ in range(2))
  return functools.partial(call, x, weights, cotangent)


def layer(mesh, num_tokens, load, **moe):
  program = served.program(mesh, config.Moe(capacity_factor=FACTOR, **moe))
  num_ranks = mesh[0] if load == "all_to_one_device" else 1
  case = served.case(load, num_tokens, num_ranks, WIDTH, NUM_HIDDEN)
  return functools.partial(program, *case)


def measure(programs, num_turns):
  """Returns (wall, processor) seconds of each program in each turn, {name: [turns, 2]}."""
  clocks = lambda: np.array([time.perf_counter(), time.process_time()])
  seconds = {name: [] for name in programs}
  for turn in range(num_turns + 1):
    for name, program in programs.items():
      start = clocks()
      jax.block_until_ready(program())
      if turn:  # the first compiles
        seconds[name].append(clocks() - start)
  return {name: np.stack(each) for name, each in seconds.items()}


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--expert", type=int, default=8)
  parser.add_argument("--tokens", type=int, default=8 * 2048, help="of a micro-batch")
  parser.add_argument("--turns", type=int, default=7)
  parser.add_argument("--loads", nargs="+", default=["zipf_1"], choices=served.LOADS)
  args = parser.parse_args()
  mesh = (args.expert, conftest.NUM_DEVICES // args.expert)
  here = args.tokens // conftest.NUM_DEVICES
  E, K = served.NUM_EXPERTS, served.NUM_CHOICES
  rows = capacity.rows_per_expert(here, K, E, FACTOR) * conftest.NUM_DEVICES
  padded, exact = f"dense, {rows} rows an expert", f"dense, {args.tokens * K // E} rows an expert"
  programs = {padded: dense(mesh, rows), exact: dense(mesh, args.tokens * K // E)}
  against = {}
  for load in args.loads:
    for dispatch, floor in (("capacity", padded), ("dropless", exact)):
      name = f"{dispatch}, {load}"
      programs[name] = layer(mesh, args.tokens, load, dispatch=dispatch)
      against[name] = floor
  seconds = measure(programs, args.turns)
  print(f"mesh expert {mesh[0]} x tensor {mesh[1]}, {args.tokens} tokens, forward and backward")
  print(
    f"{'median of':34} {'wall s':>8} {'cpu s':>8} {'wall over dense':>16} {'cpu over dense':>15}"
  )
  for name, each in seconds.items():
    ratio = np.median(each / seconds[against.get(name, name)], 0)
    wall, cpu = np.median(each, 0)
    print(f"{name:34} {wall:8.3f} {cpu:8.3f} {ratio[0]:16.2f} {ratio[1]:15.2f}")


if __name__ == "__main__":
  environment.keep_freed_memory(8)
  main()
