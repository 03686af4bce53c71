"""Sorting and comparing each with each find the same order, and it is numpy's."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe import order

E, GROUP_SIZE = 6, 2
# Few sizes, for each is compiled.
EXPERTS = hnp.arrays(np.int32, st.sampled_from([1, 2, 17, 40]), elements=st.integers(0, E))
# Few different ones, so that many are equal.
WEIGHTS = st.sampled_from([-1.0, 0.0, 0.25, 0.5])
WAYS = {
  "sorted": (order._sorted_ranks, order._sorted_fillers),
  "compared": (order._compared_ranks, order._compared_fillers),
}


@pytest.mark.parametrize("way", WAYS)
@hypothesis.given(EXPERTS, st.sampled_from([1, 2, 5]), st.data())
@hypothesis.settings(deadline=None, max_examples=60)
def test_the_order_is_by_falling_weight_and_equal_ones_stay_in_order(way, expert_A, C, data):
  size = expert_A.size
  weight_A = np.array(data.draw(st.lists(WEIGHTS, min_size=size, max_size=size)), np.float32)
  assigned_E = np.bincount(expert_A, minlength=E + 1)[:E].astype(np.int32)
  ranks, fillers = WAYS[way]
  rank_A = np.asarray(ranks(*map(jnp.asarray, (expert_A, weight_A, assigned_E))))
  expected_EC = np.full((E, C), size)
  for expert in range(E):
    (mine,) = np.nonzero(expert_A == expert)
    mine = mine[np.argsort(-weight_A[mine], kind="stable")]
    np.testing.assert_array_equal(rank_A[mine], np.arange(mine.size))
    expected_EC[expert, : mine.size] = mine[:C]
  served_A = np.where(rank_A < C, expert_A, E).astype(np.int32)
  rows_E = np.minimum(assigned_E, C).astype(np.int32)
  given = map(jnp.asarray, (served_A, rank_A, rows_E))
  found_GCg = fillers(*given, num_rows=C, group_size=GROUP_SIZE)
  expected_GCg = expected_EC.reshape(-1, GROUP_SIZE, C).swapaxes(1, 2)
  np.testing.assert_array_equal(found_GCg, expected_GCg)


@pytest.mark.parametrize("way", [order._sorted_by_key, order._compared_by_key])
@hypothesis.given(EXPERTS)
@hypothesis.settings(deadline=None, max_examples=30)
def test_the_order_by_key_is_numpys_stable_one(way, key_A):
  order_A, place_A = way(jnp.asarray(key_A))
  expected_A = np.argsort(key_A, kind="stable")
  np.testing.assert_array_equal(order_A, expected_A)
  np.testing.assert_array_equal(np.asarray(place_A)[expected_A], np.arange(key_A.size))


@pytest.mark.parametrize("way", [order._sorted, order._scattered])
@pytest.mark.parametrize("size", [1, 17, 40])
def test_what_each_holds_lies_at_its_place(way, size):
  random = np.random.default_rng(0)
  place_A = random.permutation(size).astype(np.int32)
  x_A = random.integers(0, 100, size).astype(np.int32)
  expected_A = np.empty_like(x_A)
  expected_A[place_A] = x_A
  np.testing.assert_array_equal(way(*map(jnp.asarray, (place_A, x_A))), expected_A)
  inverse_A = order.inverse(jnp.asarray(place_A))
  np.testing.assert_array_equal(inverse_A, np.argsort(place_A))


@pytest.mark.parametrize("size, compared", [(order._MOST_COMPARED, True), (10_000, False)])
def test_only_few_are_compared_each_with_each(size, compared):
  ways = order._on_platform(size, "compared", "by sorting")
  assert (ways != "by sorting") == compared
