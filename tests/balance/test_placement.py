"""When and how little placements change: bounds, names of ranks, break-even."""

import numpy as np
import pytest

from moe_jax.balance import packing, placement
from tests.balance.test_packing import loads

NUM_LAYERS, NUM_EXPERTS, NUM_SLOTS, NUM_RANKS = 12, 64, 80, 8


@pytest.fixture
def drifted():
  """A placement made for one load, and the load that came."""
  random = np.random.default_rng(3)
  load_LE = loads("lognormal", NUM_LAYERS, NUM_EXPERTS).astype(float)
  before_LP = packing.plan(load_LE, NUM_SLOTS, NUM_RANKS)
  return before_LP, load_LE * random.lognormal(0, 0.4, load_LE.shape)


def peak(expert_LP, load_LE):
  return packing.rank_loads(expert_LP, load_LE, NUM_RANKS).max(1)


@pytest.mark.parametrize("most_moved", [0, 1, 2, 7, 40, 200, None])
def test_the_bound_on_what_moves_holds_and_nothing_gets_worse(drifted, most_moved):
  before_LP, load_LE = drifted
  change = placement.rebalance(before_LP, load_LE, NUM_RANKS, most_moved=most_moved)
  packing.check(change.expert_LP, NUM_EXPERTS, NUM_RANKS)
  np.testing.assert_array_equal(
    change.moved_LP, placement.moved(before_LP, change.expert_LP, NUM_RANKS)
  )
  assert most_moved is None or change.moved_LP.sum() <= most_moved
  gain_L = peak(before_LP, load_LE) - peak(change.expert_LP, load_LE)
  assert (gain_L >= 0).all()
  assert change.gain_tokens == pytest.approx(gain_L.sum())
  assert (change.gain_tokens > 0) == (most_moved not in (0, 1))


def test_more_moves_gain_more(drifted):
  before_LP, load_LE = drifted
  gains = [
    placement.rebalance(before_LP, load_LE, NUM_RANKS, most_moved=most).gain_tokens
    for most in (2, 20, 200, 2000)
  ]
  assert gains == sorted(gains) and gains[-1] > 3 * gains[0]


def test_aligned_plans_are_the_same_plan_with_fewer_moves(drifted):
  before_LP, load_LE = drifted
  fresh_LP = packing.plan(load_LE, NUM_SLOTS, NUM_RANKS)
  aligned_LP = placement.align(before_LP, fresh_LP, NUM_RANKS)
  ranks = lambda expert_LP: [
    sorted(map(tuple, np.sort(layer.reshape(NUM_RANKS, -1), 1).tolist())) for layer in expert_LP
  ]
  assert ranks(aligned_LP) == ranks(fresh_LP)
  num_moved = lambda expert_LP: placement.moved(before_LP, expert_LP, NUM_RANKS).sum()
  # Ranks may be named in any way: of two hundred drawn, none comes near.
  random, fresh_LXS = np.random.default_rng(0), fresh_LP.reshape(NUM_LAYERS, NUM_RANKS, -1)
  drawn = (
    random.permuted(np.tile(np.arange(NUM_RANKS), (NUM_LAYERS, 1)), axis=1) for _ in range(200)
  )
  layer = np.arange(NUM_LAYERS)[:, None]
  fewest = min(num_moved(fresh_LXS[layer, each].reshape(fresh_LP.shape)) for each in drawn)
  assert num_moved(aligned_LP) < 0.9 * fewest
  # What stays on its rank stays in its slot.
  stays = ~placement.moved(before_LP, aligned_LP, NUM_RANKS)
  np.testing.assert_array_equal(aligned_LP[stays], before_LP[stays])


def test_renamed_ranks_move_nothing():
  load_LE = loads(1.0, NUM_LAYERS, NUM_EXPERTS)
  before_LP = packing.plan(load_LE, NUM_SLOTS, NUM_RANKS, num_hosts=2, num_groups=8)
  order = [6, 5, 4, 7, 1, 0, 3, 2]  # ranks within hosts, and the hosts
  shuffled = before_LP.reshape(NUM_LAYERS, NUM_RANKS, -1)[:, order, ::-1]
  again_LP = placement.align(before_LP, shuffled.reshape(before_LP.shape), NUM_RANKS, num_hosts=2)
  np.testing.assert_array_equal(again_LP, before_LP)


def test_a_change_pays_from_the_horizon_on_at_which_it_earns_what_it_costs(drifted):
  before_LP, load_LE = drifted
  change = placement.rebalance(before_LP, load_LE, NUM_RANKS)
  slots = placement.busiest_moved(change.moved_LP, NUM_RANKS)
  by_rank = change.moved_LP.reshape(NUM_LAYERS, NUM_RANKS, -1).sum((0, 2))
  assert slots == by_rank.max() > 0
  even = slots * 1e6 / 1e9 / (change.gain_tokens * 1e-6)
  cost = lambda horizon: placement.Cost(1e6, 1e9, 1e-6, horizon)
  assert placement.pays(change, NUM_RANKS, cost(int(even) + 1))
  assert not placement.pays(change, NUM_RANKS, cost(int(even)))


def test_a_load_that_stayed_moves_nothing():
  load_LE = loads(1.0, NUM_LAYERS, NUM_EXPERTS)
  before_LP = packing.plan(load_LE, NUM_SLOTS, NUM_RANKS, sweeps=32)
  change = placement.rebalance(before_LP, load_LE, NUM_RANKS)
  assert not change.moved_LP.any() and change.gain_tokens == 0
  assert not placement.pays(change, NUM_RANKS, placement.Cost(1.0, 1e12, 1.0, 10**6))


def test_the_first_placement_holds_each_expert_once():
  expert_LP = placement.initial(3, NUM_EXPERTS)
  packing.check(expert_LP, NUM_EXPERTS, NUM_RANKS)
  assert expert_LP.shape == (3, NUM_EXPERTS)
