"""Measures what an uneven load costs where it costs something, and what stealing leaves of it.

Run `python -m tests.balance.imbalance`: two processes, each pinned to a core of its own and
computing with one thread, are the two ranks of `expert` of one MoE layer, forward and backward,
over gloo. Virtual devices of one process share the cores, so an uneven load does not show in their
step time. The same tokens are routed evenly (the force-balanced ideal), by Zipf 1.5 with the
popular experts on one rank, and by Zipf 1.5 with stealing; the three take turns. Exits with 1 where
the uneven run is not at least 1.5 times the ideal, or stealing leaves more than 1.15 times. Knows
the layer; needs two free cores: where others compute too, `--clock=cpu`.
"""

import argparse
import functools
import json
import sys
import time

from tests.balance import pinned
from tests.balance.pinned import NUM_PROCESSES

NUM_EXPERTS, NUM_CHOICES, NUM_SHADOWS, EXPONENT = 16, 2, 2, 1.5
LEAST_UNEVEN, MOST_STOLEN = 1.5, 1.15


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--tokens", type=int, default=16384, help="of both ranks together")
  parser.add_argument("--width", type=int, default=256)
  parser.add_argument("--hidden", type=int, default=1024)
  parser.add_argument("--turns", type=int, default=7)
  pinned.add_arguments(parser)
  args = parser.parse_args()
  if args.process is not None:
    return worker(args)
  words = [f"--{name}={getattr(args, name)}" for name in ("tokens", "width", "hidden", "turns")]
  try:
    found = pinned.conduct("tests.balance.imbalance", words)
  except ValueError as error:
    print(error, file=sys.stderr)
    return 2
  return report(found, args.clock)


def report(found: list[dict], clock: str) -> int:
  """Prints the figures of all ranks; returns 1 where a bar is missed."""
  names, seconds = list(found[0]["wall_s"]), pinned.least(found)
  fastest, busiest = seconds["wall"], seconds["cpu"]
  median = lambda values: sorted(values)[len(values) // 2]
  print(f"{'':<10}{'fastest s':>11}{'median s':>10}{'busiest cpu s':>15}{'over even':>11}"
        f"{'median':>8}{'cpu':>7}   rows of ranks")  # fmt: skip
  for name in names:
    print(
      f"{name:<10}{fastest[name]:>11.4f}{median(found[0]['wall_s'][name]):>10.4f}"
      f"{busiest[name]:>15.4f}{fastest[name] / fastest['even']:>11.2f}"
      f"{median(found[0]['wall_s'][name]) / median(found[0]['wall_s']['even']):>8.2f}"
      f"{busiest[name] / busiest['even']:>7.2f}   {found[0]['rows'][name]}"
    )
  alone = found[0]["alone_s"]
  print(f"experts' work of the busiest rank alone, uneven over even: {alone[1] / alone[0]:.2f}")
  of_clock = seconds[clock]
  uneven, stolen = (of_clock[name] / of_clock["even"] for name in ("uneven", "stolen"))
  failed = [
    said
    for is_bad, said in (
      (uneven < LEAST_UNEVEN, f"uneven {uneven:.2f} is below {LEAST_UNEVEN}: nothing to balance"),
      (stolen > MOST_STOLEN, f"stolen {stolen:.2f} is above {MOST_STOLEN}"),
    )
    if is_bad
  ]
  print(*failed, sep="\n", end="\n" if failed else "")
  return 1 if failed else 0


def worker(args) -> int:
  """Runs one rank and prints its figures as one line of JSON."""
  pinned.join(args.process, args.port)
  import numpy as np

  seconds, results = pinned.take_turns(_programs(args), args.turns)
  rows = {
    name: np.asarray(found[-1].addressable_data(0)).tolist() for name, found in results.items()
  }
  alone = _alone(args, rows["even"], rows["uneven"])
  print(json.dumps({**pinned.by_clock(seconds), "rows": rows, "alone_s": alone}), flush=True)
  return 0


def _programs(args):
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.sharding import NamedSharding
  from jax.sharding import PartitionSpec as P

  from moe_jax import config
  from moe_jax.moe import layer
  from moe_jax.moe.experts import Weights
  from moe_jax.moe.router import Routing
  from moe_jax.parallel import mesh as mesh_lib
  from moe_jax.parallel.axes import EXPERT, TENSOR

  mesh = mesh_lib.make(config.Mesh(expert=NUM_PROCESSES))
  weights_spec = Weights(P(EXPERT, None, None, TENSOR), P(EXPERT, TENSOR))
  every = P((EXPERT, TENSOR))

  def region(dispatch, x_tD, experts_tK, weights_tK, weights):
    moe_config = config.Moe(dispatch=dispatch, shadows=NUM_SHADOWS)
    logits_tE = jnp.zeros((x_tD.shape[0], NUM_EXPERTS))  # ranks what was not chosen: nobody asks
    y_tD, plan = layer.serve(weights, moe_config, Routing(experts_tK, weights_tK), logits_tE, x_tD)
    places = {"dropless": lambda of: of, "stealing": lambda of: of.of_rows}[dispatch](plan.places)
    rows_X = jax.lax.all_gather(places.arriving_Se.sum(), EXPERT)
    return y_tD, rows_X[None]

  def program(dispatch):
    sharded = jax.shard_map(
      functools.partial(region, dispatch),
      mesh=mesh, in_specs=(every, every, every, weights_spec), out_specs=(every, every),
    )  # fmt: skip

    def run(x_TD, experts_TK, weights_TK, weights):
      call = lambda x, weights: sharded(x, experts_TK, weights_TK, weights)
      y_TD, vjp, rows_XX = jax.vjp(call, x_TD, weights, has_aux=True)
      return vjp(y_TD), rows_XX[0]

    return jax.jit(run)

  random = np.random.default_rng(0)

  def put(values, spec):
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

  normal = lambda *shape: random.normal(0, shape[1] ** -0.5, shape).astype(np.float32)
  E, D, F = NUM_EXPERTS, args.width, args.hidden
  weights = Weights(normal(E, D, 2, F), normal(E, F, D))
  weights = jax.tree.map(put, weights, weights_spec)
  x_TD = put(normal(args.tokens, D), every)
  half_TK = put(np.full((args.tokens, NUM_CHOICES), 1 / NUM_CHOICES, np.float32), every)
  token, choice = np.arange(args.tokens)[:, None], np.arange(NUM_CHOICES)
  even_TK = (NUM_CHOICES * token + choice) % E
  noise_TE = random.gumbel(size=(args.tokens, E))
  # Popular experts first, so the first rank is the busy one.
  zipf_TK = np.argsort(-(noise_TE - EXPONENT * np.log1p(np.arange(E))), 1)[:, :NUM_CHOICES]
  even_TK, zipf_TK = (put(each.astype(np.int32), every) for each in (even_TK, zipf_TK))
  plain, stealing = program("dropless"), program("stealing")
  bound = lambda call, experts_TK: lambda: call(x_TD, experts_TK, half_TK, weights)
  return {
    "even": bound(plain, even_TK),
    "uneven": bound(plain, zipf_TK),
    "stolen": bound(stealing, zipf_TK),
  }


def _alone(args, *rows):
  """Returns processor seconds of the busiest rank's products, both passes, for each load."""
  import jax
  import jax.numpy as jnp

  seconds = []
  for load in rows:
    num_rows = max(load)
    x_RD = jnp.ones((num_rows, args.width))
    weights = [jnp.ones(s) for s in ((args.width, args.hidden),) * 2 + ((args.hidden, args.width),)]
    swiglu = lambda x, gate, up, down: (jax.nn.silu(x @ gate) * (x @ up)) @ down

    def step(x, *weights, swiglu=swiglu):
      y, vjp = jax.vjp(swiglu, x, *weights)
      return vjp(y)

    jitted, best = jax.jit(step), float("inf")
    for _ in range(args.turns):
      start = time.process_time()
      jax.block_until_ready(jitted(x_RD, *weights))
      best = min(best, time.process_time() - start)
    seconds.append(best)
  return seconds


if __name__ == "__main__":
  sys.exit(main())
