"""python -m tests.plan.skewed [--dispatches=dropless,capacity] [--save=inputs] [--clock=cpu]

What a train step takes under uneven routing over what it takes under an even one: planned beside
executed. Two processes, each pinned to a core and computing with one thread, are the ranks of
`expert` (tests.balance.pinned). One compiled step runs in turns under even, Zipf 1.0 and Zipf 2.0
routing, the popular experts on the first rank; nothing but the routers' biases differs, which are
moved until each expert gets its share. The planner is calibrated on the even step alone: by its
trace, phase by phase, and by a core's rates (one product, one pass over memory, two collectives),
and predicts the others from their exponents. Exits with 1 where one is off by more than 15%. Takes
9 minutes and two free cores; where others compute too, `--clock=cpu`.
"""

import argparse
import collections
import functools
import json
import sys
import tempfile
import time

import numpy as np

from launch import config_file
from moe_jax import config as config_lib
from moe_jax.plan import calibration, load, simulate, skew
from moe_jax.plan.hardware import Chip, Cluster
from moe_jax.plan.machine import Machine
from tests.balance import pinned
from tests.plan import protocols

EXPONENTS, BAR = {"even": 0.0, "Zipf 1.0": 1.0, "Zipf 2.0": 2.0}, 0.15
# Of the routers' biases: how far a turn follows the logarithm of what is missing, and how often.
_FOLLOWS, _CORRECTIONS = 0.5, 12
_TRACED = 5  # even steps
_PHASES = ("embed", "attention", "dispatch", "experts", "combine", "head", "optimizer")
_COLLECTIVES = ("all-", "reduce-scatter", "collective-permute")
_MANY = 2**20  # elements of a large collective


def settings_of(dispatch: str, save: str) -> config_lib.Config:
  """Returns configs/laptop.py on two ranks of `expert`, with experts wide enough to be its work."""
  values = config_lib.as_dict(config_lib.from_mapping(config_file.load("configs/laptop.py")))
  values["model"].update(
    layers=2, d_model=256, heads=4, head_dim=64, experts=16, expert_hidden=1024, vocab=1024,
    router_bias=True,
  )  # fmt: skip
  values["mesh"].update(expert=pinned.NUM_PROCESSES, tensor=1, stage=1)
  values["pipeline"].update(schedule="1f1b", chunks=1, micro_batches=2, save=save)
  values["moe"].update(dispatch=dispatch, capacity_factor=1.25)
  # The parameters are to stay: a rate of nothing is refused.
  values["train"].update(batch=32, sequence=256, learning_rate=1e-12)
  return config_lib.from_mapping(values)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
  parser.add_argument("--dispatches", default="dropless,capacity")
  parser.add_argument("--save", default="inputs")
  parser.add_argument("--turns", type=int, default=7)
  pinned.add_arguments(parser)
  args = parser.parse_args()
  if args.process is not None:
    return worker(args)
  kept = [compare(dispatch, args) for dispatch in args.dispatches.split(",")]
  return 0 if all(kept) else 1


def compare(dispatch: str, args) -> bool:
  """Prints a dispatch's rows; returns whether all keep to the bar."""
  settings = settings_of(dispatch, args.save)
  words = [f"--dispatches={dispatch}", f"--save={args.save}", f"--turns={args.turns}"]
  found = pinned.conduct("tests.plan.skewed", words)
  seconds = pinned.least(found)
  machine = calibrated(settings, found)
  predicted = {
    name: skew.end_seconds(settings, machine, load.zipf(settings, exponent), tied=False).max()
    for name, exponent in EXPONENTS.items()
  }
  print(
    f"{dispatch}, {args.save} saved; an even step {seconds['wall']['even']:.3f} s by the wall,"
    f" {seconds['cpu']['even']:.3f} s of a core, planned {predicted['even']:.3f} s"
  )
  print(f"{'':<10}{'rows of the ranks':>22}{'wall':>8}{'cpu':>8}{'planned':>9}{'error':>8}")
  kept = True
  for name, exponent in EXPONENTS.items():
    if name == "even":
      continue
    ratios = {clock: each[name] / each["even"] for clock, each in seconds.items()}
    planned = predicted[name] / predicted["even"]
    error = planned / ratios[args.clock] - 1
    kept &= abs(error) <= BAR
    shares_LE = np.asarray(found[0]["assigned"][name], float)
    asked = load.zipf(settings, exponent).max_over_mean
    rows = f"{load.of(settings, shares_LE).max_over_mean:.2f} (asked {asked:.2f})"
    print(
      f"{name:<10}{rows:>22}{ratios['wall']:>7.2f}x{ratios['cpu']:>7.2f}x{planned:>8.2f}x"
      f"{error:>+8.1%}",
      flush=True,
    )
  return kept


def calibrated(settings: config_lib.Config, found: list[dict]) -> Machine:
  """Returns the planner's machine: a core by its rates, and by the trace of the even step."""
  mean = lambda key: sum(rank["rates"][key] for rank in found) / len(found)
  chip = Chip(
    name="core",
    # Exact float32 products; the planner takes a GPU's for half as fast as bfloat16's.
    peak_flops_per_s={"bfloat16": 2 * mean("flops_per_s"), "float32": mean("flops_per_s")},
    memory_bytes=0.0,
    memory_bytes_per_s=mean("bytes_per_s"),
    inside_bytes_per_s=mean("sent_bytes_per_s"),
    between_bytes_per_s=mean("sent_bytes_per_s"),
    source="measured beside the steps",
    protocols=protocols.steps(mean("nothing_s")),
  )
  machine = Machine(Cluster(chip, 1, pinned.NUM_PROCESSES))
  phases = {
    phase: sum(rank["compute_s_by_phase"].get(phase, 0.0) for rank in found) / len(found)
    for phase in found[0]["compute_s_by_phase"]
  }
  # What a rank waits for the other is no part of a collective.
  collectives_s = min(rank["collectives_s"] for rank in found)
  predicted = simulate.train(settings, machine, tied=False)._asdict()
  executed = {"compute_s_by_phase": phases, "seconds_by_link": {"inside": collectives_s}}
  fitted = calibration.fit(predicted, executed, "an even step")
  print("factors on a core's rates:", fitted, flush=True)
  return machine._replace(calibration=fitted)


def worker(args) -> int:
  """Runs one rank and prints its figures as one line of JSON."""
  pinned.join(args.process, args.port)
  import jax

  jax.config.update("jax_numpy_dtype_promotion", "standard")
  settings = settings_of(args.dispatches, args.save)
  program = Program(settings)
  assigned, biases = {}, {}
  for name, exponent in EXPONENTS.items():
    shares_LE = load.zipf(settings, exponent).share_LE
    biases[name], assigned[name] = _biases(program, shares_LE)
  calls = {name: functools.partial(_step, program, bias_LE) for name, bias_LE in biases.items()}
  seconds, _ = pinned.take_turns(calls, args.turns)
  by_phase, collectives_s = _traced(calls["even"])
  print(
    json.dumps(
      {
        **pinned.by_clock(seconds),
        "assigned": {name: counts_LE.tolist() for name, counts_LE in assigned.items()},
        "compute_s_by_phase": by_phase,
        "collectives_s": collectives_s,
        "rates": _rates(settings),
      }
    ),
    flush=True,
  )
  return 0


class Program:
  """A deployment's compiled train step, its state and one batch, on all ranks."""

  def __init__(self, settings: config_lib.Config):
    import jax

    from launch import stopwatch
    from moe_jax.parallel import mesh as mesh_lib
    from moe_jax.train import optimizer as optimizer_lib
    from moe_jax.train import state as state_lib
    from moe_jax.train import step as step_lib

    mesh, optimizer = mesh_lib.make(settings.mesh), optimizer_lib.make(settings.train)
    order = np.arange(settings.model.layers)
    self.state = state_lib.initialiser(settings, mesh, optimizer, order)(jax.random.key(0))
    place = lambda leaf, spec: jax.device_put(leaf, jax.NamedSharding(mesh, spec))
    inputs = stopwatch.random_inputs(settings)
    self.inputs = jax.tree.map(place, inputs, step_lib.inputs_spec())
    self.train = jax.jit(step_lib.train_step(settings, mesh, optimizer), donate_argnums=0)


def _step(program, bias_LE):
  """Takes a step with these biases of the routers; returns its metrics."""
  import jax

  def place(path, leaf):
    if not jax.tree_util.keystr(path).endswith("['router']['bias'].value"):
      return leaf
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: bias_LE[index])

  parameters = jax.tree_util.tree_map_with_path(place, program.state.parameters)
  state = program.state._replace(parameters=parameters)
  program.state, metrics = program.train(state, program.inputs)
  return metrics


def _biases(program, share_LE):
  """Returns biases under which experts are chosen as often as asked, and the counts they give."""
  bias_LE = np.zeros(share_LE.shape, np.float32)
  for _ in range(_CORRECTIONS):
    counts_LE = _assigned(_step(program, bias_LE))
    missing_LE = share_LE * counts_LE.sum(1, keepdims=True) / np.maximum(counts_LE, 0.5)
    bias_LE = bias_LE + np.float32(_FOLLOWS) * np.log(missing_LE).astype(np.float32)
  return bias_LE, _assigned(_step(program, bias_LE))


def _assigned(metrics):
  return np.asarray(metrics.losses.report.assigned_E.addressable_data(0)).astype(float)


def _traced(call):
  """Returns the seconds of a step by phase, and of its collectives; of each event the least of
  several steps, for a neighbour seldom hits the same one every time.
  """
  from moe_jax.observe import profile, trace

  with tempfile.TemporaryDirectory() as folder:
    profiler = profile.Profiler(folder, 0, _TRACED)
    for number in range(_TRACED):
      profiler.before_step(number)
      profiler.after_step(number, call())
    by_run = collections.defaultdict(list)
    for event in trace.read_events(folder):
      by_run[event.program, event.run_id].append(event)
  most = max(map(len, by_run.values()))  # what else ran is short
  runs = [own_seconds(events) for events in by_run.values() if len(events) == most]
  if len(runs) != _TRACED or any(run.keys() != runs[0].keys() for run in runs):
    raise ValueError(f"{_TRACED} steps were traced, {len(runs)} alike found; run it again")
  by_phase = collections.Counter()
  for key, (phase, _) in runs[0].items():
    by_phase[phase] += min(run[key][1] for run in runs)
  return by_phase, by_phase.pop("collectives")


def own_seconds(events) -> dict[tuple[str, int], tuple[str, float]]:
  """Returns {(instruction, its number): (phase, seconds)} of one run, without those of events
  inside; of collectives the phase is "collectives", and what has none has that of what it is inside
  of, or "other", as has what lies between events.
  """
  from moe_jax.observe import trace

  begin_s, end_s = events[0].start_s, max(event.start_s + event.duration_s for event in events)
  whole = ("", 0)
  phases, seconds = {whole: "other"}, {whole: end_s - begin_s}
  inside, seen = [(end_s, whole)], collections.Counter()
  for event in sorted(events, key=lambda event: (event.start_s, -event.duration_s)):
    while inside[-1][0] <= event.start_s and len(inside) > 1:
      inside.pop()
    phase = trace.phase_of(event.op_name, _PHASES)
    key = (event.op, seen[event.op])
    seen[event.op] += 1
    phases[key] = phase or phases[inside[-1][1]]
    if event.op.startswith(_COLLECTIVES):
      phases[key] = "collectives"
    # Two events of one device may overlap by rounding.
    stop_s = min(event.start_s + event.duration_s, inside[-1][0])
    seconds[inside[-1][1]] -= stop_s - event.start_s
    seconds[key] = stop_s - event.start_s
    inside.append((stop_s, key))
  return {key: (phases[key], seconds[key]) for key in seconds}


def _rates(settings: config_lib.Config) -> dict[str, float]:
  """Returns what this core does in a second, while the others do the same, and between them."""
  import jax
  import jax.numpy as jnp

  from moe_jax.parallel import mesh as mesh_lib
  from moe_jax.parallel.axes import EXPERT

  x, weights = jnp.ones((512, settings.model.d_model)), jnp.ones((settings.model.d_model, 1024))
  many = jnp.ones((2**24,), jnp.float32)
  multiply, add = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
  mesh, spec = mesh_lib.make(settings.mesh), jax.P(EXPERT)
  region = lambda x: jax.lax.all_to_all(x, EXPERT, 0, 0, tiled=True)
  exchange = jax.jit(jax.shard_map(region, mesh=mesh, in_specs=spec, out_specs=spec))
  sharding = jax.NamedSharding(mesh, spec)
  put = lambda n: jax.make_array_from_callback(
    (n * pinned.NUM_PROCESSES**2,), sharding, lambda index: np.ones((n * pinned.NUM_PROCESSES,))
  )
  little, much = put(1), put(_MANY // pinned.NUM_PROCESSES)
  nothing_s, much_s = (_least(lambda x=x: exchange(x)) for x in (little, much))
  sent_bytes = much.dtype.itemsize * _MANY / pinned.NUM_PROCESSES
  return {
    "flops_per_s": 2 * x.size * weights.shape[1] / _least(lambda: multiply(x, weights)),
    "bytes_per_s": 2 * many.nbytes / _least(lambda: add(many)),
    "sent_bytes_per_s": sent_bytes / (much_s - nothing_s),
    "nothing_s": nothing_s,
  }


def _least(call) -> float:
  import jax

  best = float("inf")
  for _ in range(20):
    start = time.perf_counter()
    jax.block_until_ready(call())
    best = min(best, time.perf_counter() - start)
  return best


if __name__ == "__main__":
  sys.exit(main())
