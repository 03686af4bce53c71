"""python -m tests.plan.pods [NAME ...]

The plan beside the rehearsal of the same deployments, compiled for H100s that need not be there:
memory, bytes over each link, bubble, kernels and schedule. A command, for it compiles
for minutes. It exits with 1 where memory is off by more than 2%, bytes by more than 1%, or the
bubble by more than a thousandth of the step.
"""

import argparse
import sys

from launch import environment

if __name__ == "__main__":  # before jax is imported
  environment.described_devices("h100:16x4")

from launch import config_file
from moe_jax import config as config_lib
from moe_jax.plan import memory, simulate
from moe_jax.plan.hardware import cluster
from moe_jax.plan.machine import Machine
from moe_jax.rehearse import pod, report

CASES = {
  "pod64": ("pod64", "h100:16x4", {}),
  "pod64_10b": ("pod64_10b", "h100:16x4", {}),
  "pod64_10b, streams 1 layer": ("pod64_10b", "h100:16x4", {"pipeline": {"prefetch_layers": 1}}),
  "pod64, one stage": (
    "pod64", "h100:16x4",
    {"mesh": {"expert": 16, "stage": 1},
     "pipeline": {"schedule": "1f1b", "chunks": 1, "micro_batches": 8}},
  ),
  "pod64, 1f1b, flat": (
    "pod64", "h100:16x4",
    {"pipeline": {"schedule": "1f1b", "chunks": 1}, "moe": {"exchange": "flat"}},
  ),
  "pod64, float8": ("pod64", "h100:16x4", {"moe": {"exchange": "hierarchical_float8"}}),
  "pod64, saves inputs": ("pod64", "h100:16x4", {"pipeline": {"save": "inputs"}}),
  "pod64, 4 stages": ("pod64", "h100:16x4", {"mesh": {"expert": 4, "stage": 4}}),
  "pod64, 512 tokens on 32": (
    "pod64", "h100:8x4", {"mesh": {"expert": 4}, "train": {"sequence": 512}},
  ),
  "pod64, 4 stages, 2 copies": (
    "pod64", "h100:16x4",
    {"mesh": {"expert": 4, "tensor": 2, "stage": 4, "data": 2}, "pipeline": {"chunks": 2}},
  ),
  "pod64, 16 copies": (
    "pod64", "h100:16x4",
    {"mesh": {"expert": 4, "tensor": 1, "stage": 1, "data": 16},
     "pipeline": {"schedule": "1f1b", "chunks": 1, "micro_batches": 2}},
  ),
}  # fmt: skip
BARS = {"memory": 0.02, "inside": 0.01, "between": 0.01}


def settings_of(name: str, sections) -> config_lib.Config:
  """Returns a shipped config with some fields changed."""
  values = config_lib.as_dict(config_lib.from_mapping(config_file.load(f"configs/{name}.py")))
  for section, fields in sections.items():
    values[section].update(fields)
  return config_lib.from_mapping(values)


def compare(name: str) -> bool:
  """Prints one deployment's rows; returns whether they keep to the bars."""
  config, pod_name, sections = CASES[name]
  settings = settings_of(config, sections)
  found, _, _ = report.make("train", settings, pod.describe(pod_name))
  run = simulate.train(settings, Machine(cluster(pod_name)))
  links = {"inside": 0.0, "between": 0.0}
  for row in found["collectives"]:
    links[row["link"]] += row["bytes_per_gpu"]
  prediction = found["prediction"]
  pairs = {
    "memory": (memory.train(settings).total, found["memory_bytes"]["total"]),
    **{link: (run.bytes_by_link.get(link, 0.0), sent) for link, sent in links.items()},
    "kernels, s": (run.compute_s, prediction["compute_s"]),
    "step, s": (run.step_s, prediction["step_s"]),
  }
  off = {what: p / f - 1 if f else 0.0 for what, (p, f) in pairs.items()}
  bubbles = (run.bubble_fraction, prediction["bubble_fraction"])
  print(
    f"{name:<26}" + "".join(f"{what} {error:+.2%}  " for what, error in off.items())
    + f"bubble {bubbles[0]:.2%}, rehearsed {bubbles[1]:.2%}",
    flush=True,
  )  # fmt: skip
  return (
    all(abs(off[what]) <= bar for what, bar in BARS.items()) and abs(bubbles[0] - bubbles[1]) < 1e-3
  )


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("names", nargs="*", default=list(CASES))
  names = parser.parse_args().names
  kept = [compare(name) for name in names]
  return 0 if all(kept) else 1


if __name__ == "__main__":
  sys.exit(main())
