"""Times the MoE layer's forward and backward against a dense network of the same FLOPs.

Run `python -m tests.moe.speed`: pod64's layer on 8 virtual CPU devices, an even load and a skewed
one, which dropless serves in further rounds, and stealing by shadows of the busiest experts. The
dense network multiplies as many rows by as many weights, in one batched product a matrix and
without routing or exchange: it is what the layer costs at least. Each program runs in processes of
its own, as users run it: beside another one's arrays it gets its memory anew in every call. The
processes take turns, so that what else the machine does falls on all of them; they run under the
malloc of the launch programs, without which page faults weigh as much as products. Knows the layer;
tests nothing.
"""

import argparse
import functools
import json
import subprocess
import sys
import time

from launch import environment

if __name__ == "__main__":  # before jax is imported
  environment.virtual_devices(8)
  environment.keep_freed_memory(8)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.moe import capacity
from moe_jax.moe.experts import Weights, swiglu
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel.axes import EXPERT, TENSOR
from tests.moe import served

NUM_DEVICES = 8
WIDTH, NUM_HIDDEN = 512, 1024  # of pod64
FACTOR = 1.25


def dense(mesh, num_rows):
  """Returns the jitted gradient of every expert on `num_rows` rows of its own."""
  sizes = config.Mesh(expert=mesh[0], tensor=mesh[1])
  weights_spec = Weights(P(EXPERT, None, None, TENSOR), P(EXPERT, TENSOR))

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


def measure(call, num_turns):
  """Returns the medians of wall and processor seconds over calls, after one that compiles."""
  clocks = lambda: np.array([time.perf_counter(), time.process_time()])
  seconds = []
  for _ in range(num_turns + 1):
    start = clocks()
    jax.block_until_ready(call())
    seconds.append(clocks() - start)
  return np.median(seconds[1:], 0)


def program(name, mesh, num_tokens):
  """Returns the program of a name: "dense, ROWS" or "DISPATCH, LOAD"."""
  kind, of = name.split(", ")
  if kind == "dense":
    return dense(mesh, int(of))
  return layer(mesh, num_tokens, of, dispatch=kind)


def in_a_process(name, args):
  """Returns what `measure` finds in a process that runs this program alone."""
  words = [f"--only={name}", f"--expert={args.expert}", f"--tokens={args.tokens}"]
  done = subprocess.run(
    [sys.executable, "-m", "tests.moe.speed", *words, f"--turns={args.turns}"],
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  return np.array(json.loads(done.stdout))


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--expert", type=int, default=8)
  parser.add_argument("--tokens", type=int, default=8 * 2048, help="of a micro-batch")
  parser.add_argument("--turns", type=int, default=5, help="calls in a process")
  parser.add_argument("--rounds", type=int, default=3, help="processes of each program, in turns")
  parser.add_argument("--loads", nargs="+", default=["even", "zipf_1"], choices=served.LOADS)
  parser.add_argument("--only", help="one program, measured in this process")
  args = parser.parse_args()
  mesh = (args.expert, NUM_DEVICES // args.expert)
  if args.only:
    print(json.dumps(list(measure(program(args.only, mesh, args.tokens), args.turns))))
    return
  here = args.tokens // NUM_DEVICES
  E, K = served.NUM_EXPERTS, served.NUM_CHOICES
  padded = f"dense, {capacity.rows_per_expert(here, K, E, FACTOR) * NUM_DEVICES}"
  exact = f"dense, {args.tokens * K // E}"
  against = {padded: padded, exact: exact}
  for load in args.loads:
    against |= {f"capacity, {load}": padded}
    against |= {f"{each}, {load}": exact for each in ("dropless", "stealing")}
  rounds = [{name: in_a_process(name, args) for name in against} for _ in range(args.rounds)]
  print(f"mesh expert {mesh[0]} x tensor {mesh[1]}, {args.tokens} tokens, forward and backward")
  print(
    f"{'median of':34} {'wall s':>8} {'cpu s':>8} {'wall over dense':>16} {'cpu over dense':>15}"
  )
  for name, floor in against.items():
    wall, cpu = np.median([each[name] for each in rounds], 0)
    ratio = np.median([each[name] / each[floor] for each in rounds], 0)
    title = f"{name} rows an expert" if name == floor else name
    print(f"{title:34} {wall:8.3f} {cpu:8.3f} {ratio[0]:16.2f} {ratio[1]:15.2f}")


if __name__ == "__main__":
  main()
