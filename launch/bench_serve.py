"""Measures how a deployment answers under rising load: requests of all lengths, at random times.

  python -m launch.bench_serve --config=configs/bench.py --json=serve.json --plot=serve.png

First all requests at once, which shows the capacity; then the same requests by Poisson arrivals, at
shares of it. Time to the first token counts from when a request arrived, the wait for the engine
included. Untrained weights, uniform random prompts, in process, without HTTP.
"""

import json
import pathlib
from typing import NamedTuple

from absl import flags

from launch.flags import run
from moe_jax import config as config_lib

_JSON = flags.DEFINE_string("json", None, "also write the figures here")
_PLOT = flags.DEFINE_string("plot", None, "also draw them here")
_REQUESTS = flags.DEFINE_integer("requests", 64, "at each load", lower_bound=1)
_LOADS = flags.DEFINE_list("loads", ["0.3", "0.6", "0.9", "1.2"], "shares of the capacity")
_QUEUE = flags.DEFINE_integer(
  "queue", 64, "requests that may wait; past it they are refused", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "of lengths, prompts and arrivals", lower_bound=0)
_PROMPT_TOKENS = flags.DEFINE_list("prompt_tokens", ["8", "512"], "fewest and most of a prompt")
_NEW_TOKENS = flags.DEFINE_list("new_tokens", ["4", "64"], "fewest and most to make")


class Mix(NamedTuple):
  """What requests are alike in: lengths lie between two, evenly on a logarithmic scale."""

  prompt_tokens: tuple[int, int]
  new_tokens: tuple[int, int]
  num_requests: int
  seed: int


def main(settings: config_lib.Config) -> None:
  loads = [_number(load, "loads", float) for load in _LOADS.value]
  mix = Mix(
    _range(_PROMPT_TOKENS.value, "prompt_tokens"),
    _range(_NEW_TOKENS.value, "new_tokens"),
    _REQUESTS.value,
    _SEED.value,
  )
  most = settings.serve.max_tokens
  if mix.prompt_tokens[1] + mix.new_tokens[1] > most:
    raise ValueError(
      f"--prompt_tokens and --new_tokens come to {mix.prompt_tokens[1] + mix.new_tokens[1]}; choose"
      f" at most serve.max_tokens={most} together, or raise it"
    )
  found = measure(settings, mix, loads, _QUEUE.value)
  print(to_text(found))
  if _JSON.value:
    path = pathlib.Path(_JSON.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
  if _PLOT.value:
    from launch import load_curve

    load_curve.draw(found, pathlib.Path(_PLOT.value))


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
      f"{seconds * 1e3:.1f}"
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


def _range(words: list[str], flag: str) -> tuple[int, int]:
  bounds = tuple(_number(word, flag, int) for word in words)
  if len(bounds) != 2 or bounds[0] > bounds[1]:
    raise ValueError(f"--{flag}={','.join(words)} is not fewest,most, such as 8,512")
  return bounds


def _number(word: str, flag: str, kind: type):
  try:
    value = kind(word)
  except ValueError:
    value = 0
  if not 0 < value < 1e9:
    raise ValueError(f"--{flag}: {word} is not a positive number; see --help")
  return value


if __name__ == "__main__":
  run(main, devices=True)
