"""What side-by-side units, ties, XLA's flag and the profile each do for the rehearsed pod64.

  python -m tests.rehearse.overlap [--config=configs/pod64.py] [--pod=h100:16x4]

Prints a row for each way to lay a tick's forward and backward unit over each other: the predicted
step, the communication hidden in time, and how many of the layers' collectives have a kernel
between start and done. Each way is two compilations; the whole takes some minutes.
"""

import argparse
import importlib.util
import os
import sys

_LIMIT = "xla_gpu_experimental_parallel_collective_overlap_limit"


def main(arguments) -> None:
  from launch import environment

  # Read by XLA once in a process: without the flag is a process of its own.
  if arguments.one_at_a_time:
    os.environ["XLA_FLAGS"] = f"--{_LIMIT}=1"
  environment.described_devices(arguments.pod)
  from moe_jax import config
  from moe_jax.pipeline import tie
  from moe_jax.rehearse import pod as pod_lib

  spec = importlib.util.spec_from_file_location("deployment", arguments.config)
  deployment = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(deployment)
  settings = config.from_mapping(deployment.get_config())
  pod = pod_lib.describe(arguments.pod)
  tied = tie.side_by_side
  if arguments.one_at_a_time:
    ways = {"tied, one collective at a time": tied}
  else:
    ways = {
      "one after the other": lambda f, b: ((len(f), 0), (0, len(b))),
      "side by side, not tied": lambda f, b: ((len(f), len(b)),),
      "tied": tied,
    }
  for name, slots in ways.items():
    tie.side_by_side = slots
    _row(name, settings, pod)


def _row(name, settings, pod) -> None:
  from moe_jax.rehearse import figures, kernels, lowering, profile, program, ticks
  from moe_jax.rehearse.exposure import Simulator
  from moe_jax.train import step

  mesh, table = pod.mesh(settings.mesh), step.table(settings)
  first = lowering.train(settings, mesh)
  compiled, text = first, ""
  for how in ("XLA's guess", "profile"):
    if text:
      compiled = lowering.schedule_again(first, text, lambda _: None)
    found = program.read(compiled.text, dict(mesh.shape), kernels.KERNELS, ticks.TURNS)
    taken = ticks.branches_taken(found, table)
    simulator = Simulator(pod.chip, pod.gpus_per_host, taken.branch_of_turn)
    run = simulator.run(found)
    text = profile.of(simulator, found)
    rows = figures.collectives(simulator, run)
    of_layers = [row for row in rows if figures.is_of_layers(row["phase"])]
    sent_s, hidden_s = (sum(row[k] for row in of_layers) for k in ("seconds", "hidden_seconds"))
    hidden, covered = hidden_s / sent_s, figures.beside_kernels_fraction(found, run)
    print(
      f"{name:32} {how:12} step {run.total_s * 1e3:7.2f} ms"
      f"   hidden {hidden:6.1%}   with a kernel between start and done {covered:6.1%}",
      flush=True,
    )


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--config", default="configs/pod64.py")
  parser.add_argument("--pod", default="h100:16x4")
  parser.add_argument("--one_at_a_time", action="store_true", help="XLA's default instead of 4")
  sys.exit(main(parser.parse_args()))
