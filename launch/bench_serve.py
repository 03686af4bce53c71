"""Measures how a deployment answers under rising load: requests of all lengths, at random times.

  python -m launch.bench_serve --config=configs/bench.py --json=serve.json --plot=serve.png

First all requests at once, which shows the capacity; then the same requests by Poisson arrivals, at
shares of it. Time to the first token counts from when a request arrived, the wait for the engine
included. Untrained weights, uniform random prompts, in process, without HTTP.
"""

import pathlib

from absl import flags

from launch import load_figures, paths
from launch.flags import run
from launch.load_figures import Mix
from moe_jax import config as config_lib

_JSON = paths.define_json("also write the figures here")
_PLOT = paths.define_file("plot", "also draw them here")
_REQUESTS = flags.DEFINE_integer("requests", 64, "at each load", lower_bound=1)
_LOADS = flags.DEFINE_list("loads", ["0.3", "0.6", "0.9", "1.2"], "shares of the capacity")
_QUEUE = flags.DEFINE_integer(
  "queue", 64, "requests that may wait; past it they are refused", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "of lengths, prompts and arrivals", lower_bound=0)
_PROMPT_TOKENS = flags.DEFINE_list("prompt_tokens", ["8", "512"], "fewest and most of a prompt")
_NEW_TOKENS = flags.DEFINE_list("new_tokens", ["4", "64"], "fewest and most to make")


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
  if _PLOT.value:
    # Only here, for matplotlib takes a second to import; and before the measurement.
    from launch import load_curve

    if not loads:
      raise ValueError("--loads= is empty, and --plot draws over loads; choose one, such as 0.6")
    load_curve.check(pathlib.Path(_PLOT.value))
  found = load_figures.measure(settings, mix, loads, _QUEUE.value)
  print(load_figures.to_text(found))
  if _JSON.value:
    paths.write_json(_JSON.value, found)
  if _PLOT.value:
    load_curve.draw(found, pathlib.Path(_PLOT.value))


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
