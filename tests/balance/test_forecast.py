"""Forecasters: what each foresees exactly, no look ahead, the choice by record, real routing."""

import numpy as np
import pytest

from launch import balance, recording
from moe_jax.balance import forecast, monitor, workloads
from moe_jax.balance.forecast import FORECAST, History
from tests import runs

RECORDED = str(runs.ROOT / "configs" / "laptop_routing.npz")


def made(name, num_windows=16, size=8, seed=0):
  """Returns (counts_WLE, tokens_WV) of a workload."""
  sizes = workloads.Sizes(2, 16, 2, 2048, num_windows * size)
  stream = list(workloads.stream(name, sizes, seed))
  counts = np.stack([workloads.choose(each.scores_LTE, 2) for each in stream])
  tokens = np.stack([each.tokens_V for each in stream])
  return monitor.over_windows(counts, size), monitor.over_windows(tokens, size)


@pytest.fixture(scope="module")
def recorded():
  return balance.windows(recording.load(RECORDED), 8)


@pytest.mark.parametrize("name", FORECAST)
def test_a_load_that_never_changes_is_foreseen_exactly(name):
  counts_WLE = np.tile([[[6, 3, 1], [2, 2, 6]]], (7, 1, 1))
  tokens_WV = np.random.default_rng(0).integers(1, 9, (7, 5))
  share_LE = FORECAST[name](History(counts_WLE, tokens_WV), tokens_WV[0])
  np.testing.assert_allclose(share_LE, [[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]], atol=1e-9)
  assert forecast.accuracy(share_LE, counts_WLE[0]) == pytest.approx(1)


def test_a_trend_is_continued():
  first = 10 + 5 * np.arange(6)
  counts_WLE = np.stack([first, 100 - first], -1)[:, None]
  share_LE = forecast.trend(History(counts_WLE, np.ones((6, 1))), np.ones(1))
  np.testing.assert_allclose(share_LE, [[0.4, 0.6]])


def test_affinity_learns_which_experts_tokens_prefer():
  random = np.random.default_rng(0)
  prefers_VLE = random.dirichlet(np.ones(8), (4, 2))
  tokens_WV = np.stack([random.multinomial(10_000, p) for p in random.dirichlet(np.ones(4), 31)])
  counts_WLE = np.einsum("wv,vle->wle", tokens_WV, prefers_VLE)
  history = History(counts_WLE[:-1], tokens_WV[:-1])
  found = {
    name: forecast.accuracy(entry(history, tokens_WV[-1]), counts_WLE[-1])
    for name, entry in FORECAST.items()
  }
  assert found["affinity"] > 0.97 > max(found["last"], found["average"]) + 0.02


def test_accuracy_is_one_minus_total_variation():
  share_LE = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
  counts_LE = np.array([[5, 0, 5], [0, 3, 3]])
  assert forecast.accuracy(share_LE, counts_LE) == pytest.approx(1 - (0.5 + 1.0) / 2)


@pytest.mark.parametrize("name", FORECAST)
def test_no_forecaster_looks_ahead(name):
  counts_WLE, tokens_WV = made("zipf 1", 6, 2)
  other_WLE = counts_WLE.copy()
  other_WLE[4:] = other_WLE[4:, :, ::-1]
  first, second = (
    forecast.walk_forward(each, tokens_WV, first=3)[name] for each in (counts_WLE, other_WLE)
  )
  assert first[0] == second[0] and first[1] != second[1]


def test_the_simplest_of_nearly_equals_is_chosen():
  assert forecast.best({"last": [0.9], "average": [0.901], "affinity": [0.9015]}) == "last"
  assert forecast.best({"last": [0.9], "average": [0.95], "affinity": [0.951]}) == "average"
  assert forecast.best({name: [] for name in FORECAST}) == "last"


def test_the_running_forecast_keeps_the_record_of_walk_forward():
  counts_WLE, tokens_WV = made("bursts")
  running = forecast.Forecast()
  running.observe(counts_WLE[0], tokens_WV[0])
  for counts_LE, tokens_V in zip(counts_WLE[1:], tokens_WV[1:], strict=True):
    running.next(tokens_V)
    running.observe(counts_LE, tokens_V)
  expected = forecast.walk_forward(counts_WLE, tokens_WV, first=1)
  for name in FORECAST:
    np.testing.assert_allclose(running.record[name], expected[name])
  assert running.best == forecast.best(expected)


def test_what_was_said_is_held_to_one_window():
  counts_WLE, tokens_WV = made("bursts")
  running = forecast.Forecast()
  running.observe(counts_WLE[0], tokens_WV[0])
  running.next(tokens_WV[1])
  for counts_LE, tokens_V in zip(counts_WLE[1:3], tokens_WV[1:3], strict=True):
    running.observe(counts_LE, tokens_V)
  assert [len(found) for found in running.record.values()] == [1] * len(FORECAST)


def test_a_forecast_needs_a_window():
  with pytest.raises(ValueError, match="needs a window that was observed, got none"):
    forecast.Forecast().next(np.ones(3))


def test_recorded_routing_is_foreseen_to_85_percent(recorded):
  record = forecast.walk_forward(*recorded)
  chosen = forecast.best(record)
  assert record[chosen].mean() >= 0.85
  assert record[chosen].mean() >= max(each.mean() for each in record.values()) - 0.002


def test_the_best_beats_the_last_value_on_at_least_4_workloads():
  better = []
  for name in workloads.WORKLOADS:
    record = {key: each.mean() for key, each in forecast.walk_forward(*made(name)).items()}
    assert record[forecast.best(forecast.walk_forward(*made(name)))] >= record["last"] - 1e-12
    if max(record["average"], record["affinity"]) > record["last"]:
      better.append(name)
  assert len(better) >= 4, better
