"""Compiles a deployment for a pod that is not there, and says what it would do.

  python -m launch.rehearse --config=configs/pod64.py --pod=h100:16x4 --json=report.json
  python -m launch.rehearse --config=configs/pod64.py --pod=tpu:v5p:4x4x4

Needs no GPU and no TPU: XLA's compiler for them alone, wheels that a first run names. Memory is
XLA's; times are a model's, of the compiled schedule (moe_jax/rehearse), and of GPUs only.
"""

import json
import pathlib
import sys
import time

from absl import flags

from launch import environment, paths
from launch.flags import run

_POD = flags.DEFINE_string(
  "pod",
  None,
  "CHIP:HOSTSxGPUS, such as h100:16x4, of a100, h100, h200, b200; or tpu:CHIP:SHAPE, such as"
  " tpu:v5p:4x4x4, of v5p, v5e, v6e.",
  required=True,
)
_STEP = flags.DEFINE_enum(
  "step", "train", ["train", "prefill", "decode"],
  "What to compile; prefill and decode are sized by the config's section serve.",
)  # fmt: skip
_JSON = paths.define_json("Also write the report here.")
_PICTURE = paths.define_file(
  "picture",
  "Also draw a steady tick here, as an .html file and a Perfetto .trace.json beside it.",
)
_PROFILE = paths.define_file(
  "profile",
  "Also write here the profile that the program was scheduled by; launch.train takes it as"
  " --scheduling_profile.",
)
_ONCE = flags.DEFINE_boolean(
  "once",
  False,
  "Compile once, by XLA's own guess, and not again by a profile: in half the time, but of two"
  " schedules the better one may be missed.",
)
_SYMMETRIC_MEMORY = flags.DEFINE_boolean(
  "symmetric_memory", False, "Compile as launch.train --symmetric_memory does."
)
_DOES_NOT_FIT = 1


def main(config) -> int:
  if _ONCE.value and _PROFILE.value:
    raise ValueError("--once compiles by no profile, so that --profile has none; leave one out")
  environment.described_devices(_POD.value, _SYMMETRIC_MEMORY.value)
  # jax takes seconds to import, which a mistyped flag need not wait for.
  from moe_jax.rehearse import memory, picture, pod, report, slice_report, slices, text

  start = time.perf_counter()
  progress = lambda what: print(f"[{time.perf_counter() - start:5.1f} s] {what}", file=sys.stderr)
  described = pod.describe(_POD.value)
  if isinstance(described, slices.Slice):
    _refuse_of_gpus()
    found, tick, profile = slice_report.make(_STEP.value, config, described, progress), None, ""
  else:
    found, tick, profile = report.make(_STEP.value, config, described, progress, _ONCE.value)
  progress("done")
  print(text.render(found))
  if _JSON.value:
    paths.write_json(_JSON.value, found)
  if _PICTURE.value:
    path = pathlib.Path(_PICTURE.value)
    paths.write(path, picture.page(tick, found["pod"]["name"], found["binding"]))
    paths.write(path.with_suffix(".trace.json"), json.dumps(picture.trace(tick)))
  if _PROFILE.value and profile:
    paths.write(_PROFILE.value, profile)
  elif _PROFILE.value:
    print("XLA's own guess schedules this program better; no profile written", file=sys.stderr)
  if not found["fits"]:
    total, capacity = found["memory_bytes"]["total"], found["pod"]["memory_bytes"]
    advice, unit = memory.advice(found["memory_bytes"], config), found["pod"]["unit"]
    print(
      f"the program needs {total / 1e9:.1f} GB, the {unit} has {capacity / 1e9:.0f} GB; {advice}",
      file=sys.stderr,
    )
    return _DOES_NOT_FIT
  return 0


def _refuse_of_gpus() -> None:
  """Refuses what shows times, of which a TPU's program has none, and what NCCL would do.

  Raises:
    ValueError: it is asked for.
  """
  for flag in (_PICTURE, _PROFILE):
    if flag.value:
      raise ValueError(
        f"--{flag.name} shows times, which are not read for TPUs; leave it out, or choose a pod of"
        " GPUs"
      )
  if _ONCE.value:
    raise ValueError("--once is of GPUs: for TPUs nothing is compiled twice; leave it out")
  if _SYMMETRIC_MEMORY.value:
    raise ValueError(
      "--symmetric_memory is of GPUs and NCCL; leave it out, or choose a pod of GPUs"
    )


if __name__ == "__main__":
  run(main)
