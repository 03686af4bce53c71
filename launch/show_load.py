"""Draws which experts a run's tokens went to, over time, from the run's folder.

  python -m launch.show_load --workdir=runs/laptop --out=load.png
  python -m launch.show_load --workdir=runs/laptop --phase=experts

Above, how uneven each layer is; below, for each layer, its experts' share of the tokens over steps,
as a multiple of the even share. Reads load.jsonl, which training writes, and prints a table of the
last steps: busiest expert, coefficient of variation, percentiles. With `--phase` instead how long
each device ran that phase each time, by the trace of `launch.train --profile_steps`: percentiles
and a histogram. Needs no device.
"""

import pathlib

from absl import flags

from launch.flags import run
from launch.paths import define_png, define_workdir

_WORKDIR = define_workdir()
_OUT = define_png("out", "Draw it here, .png; by default load.png in the folder.")
_LAST = flags.DEFINE_integer("last", 20, "Steps that the table sums up.", lower_bound=1)
_PHASE = flags.DEFINE_string("phase", None, "Show a phase's latencies by device, from profile/.")


def main() -> None:
  folder = pathlib.Path(_WORKDIR.value)
  out = pathlib.Path(_OUT.value or folder / "load.png")
  if _PHASE.value is not None:
    # jax takes seconds to import, which a mistyped flag need not wait for.
    from launch import phase_text

    print(phase_text.to_text(folder, _PHASE.value))
    return
  # matplotlib takes a second to import, which a mistyped flag need not wait for.
  from launch import load_picture

  steps, counts_WLE = load_picture.read(folder)
  print(load_picture.to_text(counts_WLE[-_LAST.value :]))
  load_picture.picture(steps, counts_WLE, out, folder.resolve().name)
  print(out)


if __name__ == "__main__":
  run(main, config=False)
