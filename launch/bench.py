"""Measures how fast this machine trains and evaluates a deployment, against its own matmul peak.

  python -m launch.bench --config=configs/bench.py --json=bench.json
  ... --virtual_devices=8 --config.mesh.expert=2 --config.mesh.tensor=2 --config.mesh.stage=2
  srun -N16 -n64 python -m launch.bench --config=configs/pod64.py

Text is uniform random tokens, routed by an untrained router. Steps are those of the training loop:
the train step with optimizer and donated state, the forward-only schedule of evaluation. Work is
counted as model FLOPs (moe_jax/plan/cost.py). The peak is the best that three named matrix products
reach before, between and after; where the three differ, a neighbour was busy. Of several processes
each times what all of them run together, and the first one speaks.
"""

import statistics

from absl import flags

from launch import distributed, paths
from launch.flags import run
from moe_jax import config as config_lib
from moe_jax.plan import cost

_JSON = paths.define_json("Also write the figures here.")
_REPEATS = flags.DEFINE_integer("repeats", 9, "Timed steps of each kind.", lower_bound=1)

WARMUP_STEPS = 2


def main(settings: config_lib.Config) -> None:
  distributed.start()
  found = measure(settings, _REPEATS.value)
  import jax

  if jax.process_index() > 0:
    return
  print(to_text(found))
  if _JSON.value:
    paths.write_json(_JSON.value, found)


def measure(settings: config_lib.Config, repeats: int) -> dict:
  """Returns the figures of `--json`.

  Args:
    settings: the deployment.
    repeats: timed steps of each kind, after WARMUP_STEPS; the median counts.
  """
  # jax takes seconds to import, which a mistyped flag need not wait for.
  import jax

  from launch import stopwatch

  program, gemms = stopwatch.Program(settings), stopwatch.Gemms(settings)
  steps = {}
  for kind, step in (("train", program.train), ("forward", program.forward)):
    gemms.measure()
    for _ in range(WARMUP_STEPS):
      step()
    steps[kind] = [step() for _ in range(repeats)]
  gemms.measure()
  peak = gemms.peak_flops_per_s
  unit_s = program.unit_seconds(repeats)
  return {
    **{
      kind: {"compile_s": program.compile_s[kind]} | figures(settings, kind, steps[kind], peak)
      for kind in steps
    },
    "matmul_peak_flops_per_s": peak,
    "unit_s": unit_s,
    "bubble_fraction": program.schedule.bubble_fraction(unit_s),
    "temporary_bytes": program.temporary_bytes,
    "gemms": [
      {"name": name, "shape": list(shape), "flops_per_s": gemms.flops_per_s[name]}
      for name, shape in gemms.shapes.items()
    ],
    "text": "uniform random tokens",
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "jax": jax.__version__,
    "config": config_lib.as_dict(settings),
  }


def figures(settings: config_lib.Config, kind: str, steps: list, peak_flops_per_s: float) -> dict:
  """Returns the figures of one kind of step; experts count what they computed, without the dropped.

  Args:
    settings: the deployment.
    kind: "train" or "forward".
    steps: the timed ones, each ((seconds by the clock, of the process on all cores), fraction of
      assignments dropped).
    peak_flops_per_s: of the machine.
  """
  documents = [settings.train.sequence] * settings.train.batch
  count = {"train": cost.train_flops, "forward": cost.forward_flops}[kind]
  by_phase = count(settings.model, documents)
  dropped_fraction = statistics.mean(dropped for _, dropped in steps)
  flops = by_phase.total - dropped_fraction * by_phase.experts
  step_s = statistics.median(wall_s for (wall_s, _), _ in steps)
  return {
    "step_s": step_s,
    "fastest_step_s": min(wall_s for (wall_s, _), _ in steps),
    "cpu_s": statistics.median(cpu_s for (_, cpu_s), _ in steps),
    "tokens_per_s": sum(documents) / step_s,
    "dropped_fraction": dropped_fraction,
    "model_flops": flops,
    "model_flops_per_s": flops / step_s,
    "matmul_peak_flops_per_s": peak_flops_per_s,
    "fraction_of_peak": flops / step_s / peak_flops_per_s,
  }


def to_text(found: dict) -> str:
  """Returns what `measure` found as a small table."""
  rows = [
    f"{'':<16}{'ms':>10}{'fastest':>10}{'tokens/s':>12}{'GFLOP/s':>12}{'of peak':>10}"
    f"{'dropped':>10}"
  ]
  for kind in ("train", "forward"):
    part = found[kind]
    rows.append(
      f"{kind:<16}{part['step_s'] * 1e3:>10.1f}{part['fastest_step_s'] * 1e3:>10.1f}"
      f"{part['tokens_per_s']:>12.0f}{part['model_flops_per_s'] / 1e9:>12.1f}"
      f"{part['fraction_of_peak']:>10.1%}{part['dropped_fraction']:>10.1%}"
    )
  units = ", ".join(f"{kind} {each * 1e3:.2f}" for kind, each in found["unit_s"].items())
  rows.append(f"units of a tick, ms: {units}")
  rows.append(f"bubble of the schedule in these: {found['bubble_fraction']:.2%}")
  rows.append(f"train step's temporaries, all devices: {found['temporary_bytes'] / 1e6:.0f} MB")
  rows.append(f"matmul {found['config']['model']['dtype']}, GFLOP/s before, between and after:")
  for gemm in found["gemms"]:
    rates = "".join(f"{rate / 1e9:>12.1f}" for rate in gemm["flops_per_s"])
    rows.append(f"{gemm['name']:<16}{'x'.join(map(str, gemm['shape'])):>20}{rates}")
  return "\n".join(rows)


if __name__ == "__main__":
  run(main, devices=True)
