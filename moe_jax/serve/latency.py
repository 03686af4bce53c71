"""How long requests waited: percentiles over the newest ones.

Knows times; must not know where they come from or who reads them.
"""

import collections
import math
from collections.abc import Iterable

import numpy as np

from moe_jax.serve.requests import Timing

PERCENTILES = (50, 90, 99)


def percentiles(values: Iterable[float]) -> dict[str, float]:
  """Returns p50, p90 and p99 of the values that are numbers; NaN where there are none.

  A percentile is a value that occurred: the lowest with at least that share at or below it.
  """
  found = [value for value in values if not math.isnan(value)]
  if not found:
    return {f"p{share}": math.nan for share in PERCENTILES}
  at = np.percentile(found, PERCENTILES, method="inverted_cdf")
  return {f"p{share}": float(value) for share, value in zip(PERCENTILES, at, strict=True)}


def summary(timings: Iterable[Timing]) -> dict[str, dict[str, float]]:
  """Returns the percentiles of the time to the first token and of the time per token, seconds."""
  timings = list(timings)
  return {
    "time_to_first_token_s": percentiles(each.time_to_first_token_s for each in timings),
    "time_per_token_s": percentiles(each.time_per_token_s for each in timings),
  }


class Latencies:
  """The timings of the newest requests that made a token."""

  def __init__(self, window: int = 4096):
    """Begins empty.

    Args:
      window: requests that count.
    """
    self._timings: collections.deque[Timing] = collections.deque(maxlen=window)

  def add(self, timing: Timing) -> None:
    """Counts a request that has ended; one without a token counts for nothing."""
    if timing.num_tokens:
      self._timings.append(timing)

  def summary(self) -> dict[str, dict[str, float]]:
    """Returns what `summary` does, of the window."""
    return summary(self._timings)
