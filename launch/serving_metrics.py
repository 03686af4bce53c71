"""What the service holds and has done, as Prometheus reads it.

Knows the service's load; must not know HTTP.
"""

from collections.abc import Iterator

import numpy as np
from prometheus_client import core

from moe_jax.serve.expert_load import ExpertLoad
from moe_jax.serve.latency import PERCENTILES
from moe_jax.serve.service import Service

_PREFIX = "moe_jax"
_GAUGES = {
  "requests_waiting": ("num_waiting", "requests in the queue"),
  "requests_running": ("num_running", "requests in slots"),
  "slots": ("num_slots", "requests that can run at once"),
  "free_pages": ("num_free_pages", "pages of the key-value cache that nobody holds"),
  "pages": ("num_pages", "pages of the key-value cache"),
}
_COUNTERS = {
  "requests_refused": ("num_refused", "requests that found the queue full"),
  "prompt_tokens": ("prompt_tokens", "tokens of prompts that were read"),
  "new_tokens": ("new_tokens", "tokens made"),
  "padding_tokens": ("padding_tokens", "positions of prefill calls that held no token"),
}
_PER_EXPERT = {
  "expert_tokens": (core.CounterMetricFamily, "tokens_LE", "tokens that chose an expert"),
  "expert_share": (core.GaugeMetricFamily, "share_LE", "an expert's part of its layer's, recently"),
}
_LATENCIES = {
  "time_to_first_token_seconds": ("time_to_first_token_s", "from arrival, of recent requests"),
  "time_per_token_seconds": ("time_per_token_s", "after the first, of recent requests"),
}


class ServiceCollector:
  """Reads the service whenever it is asked for metrics."""

  def __init__(self, service: Service):
    """Reads nothing yet."""
    self._service = service

  def collect(self) -> Iterator[core.Metric]:
    """Yields every metric."""
    load = self._service.load()
    for name, (field, text) in _GAUGES.items():
      yield core.GaugeMetricFamily(f"{_PREFIX}_{name}", text, getattr(load, field))
    for name, (field, text) in _COUNTERS.items():
      yield core.CounterMetricFamily(f"{_PREFIX}_{name}", text, getattr(load, field))
    ended = core.CounterMetricFamily(
      f"{_PREFIX}_requests", "requests that ended, by how", labels=["end"]
    )
    for end, count in load.num_ended.items():
      ended.add_metric([end], count)
    yield ended
    yield from _of_experts(load.experts)
    for name, (field, text) in _LATENCIES.items():
      found = core.GaugeMetricFamily(f"{_PREFIX}_{name}", text, labels=["quantile"])
      for share in PERCENTILES:
        found.add_metric([f"{share / 100}"], load.latency_s[field][f"p{share}"])
      yield found


def _of_experts(load: ExpertLoad) -> Iterator[core.Metric]:
  """Yields the load of every layer's experts, tokens counted once for each expert they choose."""
  for name, (family, field, text) in _PER_EXPERT.items():
    found = family(f"{_PREFIX}_{name}", text, labels=["layer", "expert"])
    for (layer, expert), value in np.ndenumerate(getattr(load, field)):
      found.add_metric([str(layer), str(expert)], float(value))
    yield found
  uneven = core.GaugeMetricFamily(
    f"{_PREFIX}_expert_load_max_over_mean",
    "the busiest expert's recent tokens over the mean expert's; 1 is even",
    labels=["layer"],
  )
  for layer, ratio in enumerate(load.max_over_mean_L):
    uneven.add_metric([str(layer)], float(ratio))
  yield uneven
  yield core.CounterMetricFamily(
    f"{_PREFIX}_dropped_assignments", "choices that no expert served", load.dropped
  )
