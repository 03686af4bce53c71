"""Shows a pipeline schedule: its table as text, its ticks, bubble and stash, and a picture.

  python -m launch.plot_schedule --schedule=interleaved --stages=2 --micro_batches=16 --chunks=4
  ... --out=schedule.png --json=schedule.json --costs=forward=1,backward=2,head=0.3

Needs no device and no jax. Bad values and flags end in one line on stderr and exit code 2.
"""

from absl import flags

from launch import paths
from launch.flags import run
from moe_jax.pipeline.schedules import SCHEDULES
from moe_jax.pipeline.table import CLASSIC_COSTS, Table, check, to_text

_SCHEDULE = flags.DEFINE_enum("schedule", "1f1b", list(SCHEDULES), "Which schedule.")
_STAGES = flags.DEFINE_integer("stages", 2, "Pipeline stages.", lower_bound=1)
_MICRO_BATCHES = flags.DEFINE_integer("micro_batches", 16, "Micro-batches a step.", lower_bound=1)
_CHUNKS = flags.DEFINE_integer("chunks", 1, "Pieces of layers on each stage.", lower_bound=1)
_COSTS = flags.DEFINE_list(
  "costs",
  [],
  "Time of one unit, kind=number, in any one unit of time. The kinds that are not named keep: "
  + ",".join(f"{kind}={cost:g}" for kind, cost in CLASSIC_COSTS.items()),
)
_JSON = paths.define_json("Also write the figures here.")
_OUT = paths.define_file("out", "Also draw the schedule here, .png or .svg.", (".png", ".svg"))


def main() -> None:
  costs = _parse_costs(_COSTS.value)
  table = SCHEDULES[_SCHEDULE.value](_STAGES.value, _MICRO_BATCHES.value, _CHUNKS.value)
  check(table)
  figures = _figures(table, costs)
  print(to_text(table))
  for name in ("ticks", "bubble_fraction", "peak_in_flight"):
    print(f"{name:<16}{figures[name]:.6g}")
  if _JSON.value:
    paths.write_json(_JSON.value, figures)
  if _OUT.value:
    # matplotlib takes a second to import, which the text need not wait for.
    from moe_jax.pipeline.picture import picture

    picture(table, _OUT.value, costs)


def _figures(table: Table, costs):
  return {
    "schedule": table.name,
    "stages": table.num_stages,
    "micro_batches": table.num_micro_batches,
    "chunks": table.num_chunks,
    "costs": costs,
    "ticks": table.num_ticks,
    "ticks_by_kind": table.ticks_by_kind,
    "bubble_fraction": table.bubble_fraction(costs),
    "peak_in_flight": table.peak_in_flight,
  }


def _parse_costs(pairs):
  costs = dict(CLASSIC_COSTS)
  for pair in pairs:
    kind, _, cost = pair.partition("=")
    try:
      costs[kind.strip()] = float(cost)
    except ValueError:
      raise ValueError(f"--costs={pair!r} is not kind=number, such as backward=2") from None
  return costs


if __name__ == "__main__":
  run(main, config=False)
