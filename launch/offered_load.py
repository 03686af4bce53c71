"""Requests of mixed lengths, when they come, and what an engine makes of them in real time.

Knows the engine; must not know flags or files.
"""

import math
import time
from collections.abc import Sequence

import numpy as np

from moe_jax.serve import latency
from moe_jax.serve import requests as requests_lib
from moe_jax.serve.engine import Engine
from moe_jax.serve.requests import Overloaded, Request


def requests(mix, vocab: int) -> list[Request]:
  """Returns random greedy requests; lengths lie evenly on a logarithmic scale.

  Args:
    mix: a `load_figures.Mix`.
    vocab: prompts are of its tokens.
  """
  random = np.random.default_rng(mix.seed)

  def length(fewest, most):
    # Between the logarithms of fewest and most + 1, so that rounding down gives each its share.
    drawn = np.exp(random.uniform(np.log(fewest), np.log(most + 1)))
    return min(int(drawn), most)

  return [
    Request(random.integers(0, vocab, length(*mix.prompt_tokens)).tolist(), length(*mix.new_tokens))
    for _ in range(mix.num_requests)
  ]


def arrivals(count: int, rate_per_s: float, seed: int) -> list[float]:
  """Returns when each request comes, in seconds: a Poisson process."""
  return np.random.default_rng(seed).exponential(1 / rate_per_s, count).cumsum().tolist()


def play(engine: Engine, given: Sequence[Request], arrivals_s: Sequence[float]) -> dict:
  """Returns the figures of the requests, each given to the engine when its time has come.

  Args:
    engine: idle, on the clock `time.monotonic`.
    given: the requests.
    arrivals_s: rising, from now.
  """
  before, start_s = engine.load(), time.monotonic()
  timings, refused, num_given = [], 0, 0
  while num_given < len(given) or not engine.is_idle():
    now_s = time.monotonic() - start_s
    while num_given < len(given) and arrivals_s[num_given] <= now_s:
      try:
        engine.submit(given[num_given], arrived_s=start_s + arrivals_s[num_given])
      except Overloaded:
        refused += 1
      num_given += 1
    if engine.is_idle():
      if num_given < len(given):
        time.sleep(max(0.0, start_s + arrivals_s[num_given] - time.monotonic()))
      continue
    events = engine.step()
    timings += [event.timing for event in events if event.ended == requests_lib.LENGTH]
  seconds, after = time.monotonic() - start_s, engine.load()
  prompt_tokens = after.prompt_tokens - before.prompt_tokens
  new_tokens = after.new_tokens - before.new_tokens
  return {
    "completed": len(timings),
    "refused": refused,
    "seconds": seconds,
    "prompt_tokens": prompt_tokens,
    "new_tokens": new_tokens,
    "padding_tokens": after.padding_tokens - before.padding_tokens,
    "tokens_per_ms": (prompt_tokens + new_tokens) / seconds / 1e3,
    "new_tokens_per_ms": new_tokens / seconds / 1e3,
    **{name: _or_none(found) for name, found in latency.summary(timings).items()},
  }


def _or_none(percentiles: dict[str, float]) -> dict[str, float | None]:
  """Returns percentiles with None in place of NaN, which JSON does not have."""
  return {share: None if math.isnan(value) else value for share, value in percentiles.items()}
