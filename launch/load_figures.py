"""How a deployment answers under rising load, as figures: what `launch.bench_serve` reports.

Knows the engine and offered load; must not know flags or files.
"""

from typing import NamedTuple

from moe_jax import config as config_lib


class Mix(NamedTuple):
  """What requests are alike in: lengths lie between two, evenly on a logarithmic scale."""

  prompt_tokens: tuple[int, int]
  new_tokens: tuple[int, int]
  num_requests: int
  seed: int


def measure(settings: config_lib.Config, mix: Mix, loads: list[float], queue: int) -> dict:
  """Returns the figures of `--json`.

  Args:
    settings: the deployment.
    mix: of the requests, the same at every load.
    loads: offered, as shares of the requests a second that all at once take.
    queue: requests that may wait.
  """
  # jax takes seconds to import, which a mistyped flag need not wait for.
  import jax

  from launch import offered_load
  from moe_jax.model import transformer
  from moe_jax.parallel import mesh as mesh_lib
  from moe_jax.serve.engine import Engine
  from moe_jax.serve.programs import Programs

  mesh = mesh_lib.make(settings.mesh, jax.devices()[: settings.mesh.num_devices])
  programs = Programs(settings, mesh)
  master = jax.jit(transformer.init, static_argnums=1)(
    jax.random.key(settings.train.seed), settings.model
  )
  parameters = programs.parameters(master)
  engine = lambda room: Engine(settings, programs, parameters, queue=room)
  given = offered_load.requests(mix, settings.model.vocab)
  at_once = [0.0] * len(given)
  everyone = engine(len(given))
  offered_load.play(everyone, given, at_once)  # warm: of pages and code that were never touched
  capacity = offered_load.play(everyone, given, at_once)
  rate = capacity["completed"] / capacity["seconds"]
  rows = []
  for load in loads:
    arrivals = offered_load.arrivals(len(given), load * rate, mix.seed)
    row = offered_load.play(engine(queue), given, arrivals)
    rows.append({"load": load, "offered_per_s": load * rate, **row})
  return {
    "capacity": {"requests_per_s": rate, **capacity},
    "loads": rows,
    "mix": mix._asdict(),
    "queue": queue,
    "num_programs": programs.num_compiled,
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "jax": jax.__version__,
    "config": config_lib.as_dict(settings),
  }


def to_text(found: dict) -> str:
  """Returns what `measure` found as a small table."""
  head = ("load", "req/s", "done", "refused", "TTFT ms p50", "p90", "p99", "token ms p50", "p90",
          "p99", "tokens/ms")  # fmt: skip
  widths = (9, 8, 6, 9, 13, 9, 9, 14, 9, 9, 11)
  rows = ["".join(f"{name:>{width}}" for name, width in zip(head, widths, strict=True))]
  at_once = {"load": None, "offered_per_s": None, **found["capacity"]}
  for row in [at_once, *found["loads"]]:
    times = [
      "-" if seconds is None else f"{seconds * 1e3:.1f}"
      for name in ("time_to_first_token_s", "time_per_token_s")
      for seconds in row[name].values()
    ]
    is_at_once = row["load"] is None
    cells = (
      "at once" if is_at_once else f"{row['load']:.0%}",
      "" if is_at_once else f"{row['offered_per_s']:.2f}",
      str(row["completed"]), str(row["refused"]), *times, f"{row['tokens_per_ms']:.3f}",
    )  # fmt: skip
    rows.append("".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
  rows.append(f"capacity: {found['capacity']['requests_per_s']:.2f} requests/s")
  return "\n".join(rows)
