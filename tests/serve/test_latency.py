"""Percentiles against their definition."""

import math

import numpy as np

from moe_jax.serve import latency
from moe_jax.serve.requests import Timing


def test_a_percentile_is_the_lowest_value_with_that_share_at_or_below_it():
  values = np.random.default_rng(0).permutation(np.arange(1, 201) / 10).tolist()
  assert latency.percentiles(values) == {"p50": 10.0, "p90": 18.0, "p99": 19.8}
  assert latency.percentiles([3.0, math.nan]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0}
  assert all(map(math.isnan, latency.percentiles([math.nan]).values()))


def test_only_the_newest_that_made_a_token_count():
  found = latency.Latencies(window=3)
  found.add(Timing(0.0))
  for first_s in (9.0, 1.0, 2.0, 3.0):
    found.add(Timing(0.0, first_s, first_s + 6.0, 4))
  summary = found.summary()
  assert summary["time_to_first_token_s"] == {"p50": 2.0, "p90": 3.0, "p99": 3.0}
  assert summary["time_per_token_s"]["p99"] == 2.0
  found.add(Timing(0.0, 7.0, 7.0, 1))  # one token tells nothing of the time per token
  assert found.summary()["time_per_token_s"]["p50"] == 2.0
