"""What the experts served: sums in logical order, shares of late, and the counts of real calls."""

import numpy as np
import pytest

from moe_jax import config
from moe_jax.pipeline.schedules import SCHEDULES, forward_only
from moe_jax.serve import expert_load

MODEL = config.Model(layers=4, experts=2, experts_per_token=1)
# Two stages of two chunks: the first holds layers 0 and 2.
TABLE = forward_only(SCHEDULES["interleaved"](2, 1, 2))


def test_layers_are_in_logical_order():
  counts = expert_load.ExpertCounts(MODEL, TABLE)
  for _ in range(2):
    counts.add(np.array([[3, 1], [4, 0], [2, 2], [0, 4]], np.int32), np.array([0, 1, 0, 0]))
  load = counts.load()
  assert load.tokens_LE.tolist() == [[6, 2], [4, 4], [8, 0], [0, 8]]
  np.testing.assert_allclose(load.share_LE, [[0.75, 0.25], [0.5, 0.5], [1, 0], [0, 1]])
  np.testing.assert_allclose(load.max_over_mean_L, [1.5, 1, 2, 2])
  assert load.dropped == 2


def test_shares_are_those_of_late():
  counts = expert_load.ExpertCounts(MODEL, TABLE)
  for call in range(1000):
    counts.add(np.tile([[0, 1]] if call < 300 else [[1, 0]], (4, 1)), np.zeros(4, np.int32))
  load = counts.load()
  assert (load.tokens_LE == [700, 300]).all()
  assert load.share_LE[:, 0].min() > 0.99


def test_nothing_served_yet_is_no_load():
  load = expert_load.ExpertCounts(MODEL, TABLE).load()
  assert not load.tokens_LE.any() and not load.share_LE.any()
  assert load.max_over_mean_L.tolist() == pytest.approx([1] * 4)
