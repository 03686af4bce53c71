"""The monitor against a loop over experts, on numpy and on jax arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from moe_jax.balance import monitor

COUNTS_LE = arrays(
  np.int64, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.integers(0, 10_000)
)


@settings(max_examples=50, deadline=None)
@given(COUNTS_LE)
def test_figures_equal_a_loop_over_experts(counts_LE):
  share_LE = monitor.load_share(counts_LE)
  ratio_L = monitor.max_over_mean(counts_LE)
  cv_L = monitor.coefficient_of_variation(counts_LE)
  for l, row in enumerate(counts_LE.tolist()):
    total = sum(row)
    if total == 0:
      assert share_LE[l].sum() == 0 and ratio_L[l] == 1 and cv_L[l] == 0
      continue
    mean = total / len(row)
    deviation = (sum((count - mean) ** 2 for count in row) / len(row)) ** 0.5
    np.testing.assert_allclose(share_LE[l], [count / total for count in row], rtol=1e-12)
    np.testing.assert_allclose(ratio_L[l], max(row) / mean, rtol=1e-12)
    np.testing.assert_allclose(cv_L[l], deviation / mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("function", [
  monitor.load_share, monitor.max_over_mean, monitor.coefficient_of_variation,
])  # fmt: skip
def test_jax_arrays_give_what_numpy_arrays_give(function):
  counts_LE = np.array([[5, 1, 0, 2], [0, 0, 0, 0], [3, 3, 3, 3]], np.int32)
  under_jit = jax.jit(function)(jnp.asarray(counts_LE))
  assert under_jit.dtype == jnp.float32
  np.testing.assert_allclose(under_jit, function(counts_LE), rtol=1e-6, atol=1e-6)


def test_one_hot_expert_and_even_load_are_the_extremes():
  counts_LE = np.array([[0, 8, 0, 0], [2, 2, 2, 2]])
  np.testing.assert_array_equal(monitor.max_over_mean(counts_LE), [4, 1])
  np.testing.assert_allclose(monitor.coefficient_of_variation(counts_LE), [3**0.5, 0])


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_dropped_fraction_is_over_all_layers(array):
  counts = {"sent": array([10, 30]), "kept": array([10, 25]), "dropped": array([0, 5])}
  assert monitor.dropped_fraction(counts) == 0.125
  assert monitor.dropped_fraction({"sent": array([0]), "dropped": array([0])}) == 0


def test_missing_counts_are_named():
  with pytest.raises(ValueError, match=r"counts lack dropped.*got sent, kept"):
    monitor.dropped_fraction({"sent": np.array([1]), "kept": np.array([1])})


def test_percentiles_are_over_the_mean():
  counts_LE = np.stack([np.arange(101), np.full(101, 7)])
  np.testing.assert_allclose(
    monitor.percentiles(counts_LE), [[1.0, 1.8, 1.98], [1, 1, 1]], rtol=1e-12
  )
  under_jit = jax.jit(monitor.percentiles)(jnp.asarray(counts_LE))
  np.testing.assert_allclose(under_jit, monitor.percentiles(counts_LE), rtol=1e-5)
  # Across layers: their busiest expert against each other.
  assert monitor.percentiles(counts_LE.T, (100,))[-1] == pytest.approx(2 * 100 / 107)


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_ranks_queues_and_windows(array):
  counts_LE = array([[5, 1, 0, 2], [3, 3, 3, 3]])
  assert monitor.rank_counts(counts_LE, 2).tolist() == [[6, 2], [6, 6]]
  assert monitor.queue(counts_LE, 3).tolist() == [[2, 0, 0, 0], [0, 0, 0, 0]]
  stream = array(np.arange(5 * 2).reshape(5, 1, 2))
  assert monitor.over_windows(stream, 2).tolist() == [[[2, 4]], [[10, 12]]]
