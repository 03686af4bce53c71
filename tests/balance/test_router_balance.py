"""The two biases on streams of scores: they even the load, and change no weight."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.balance import bias, monitor, quantile, workloads

SIZES = workloads.Sizes(layers=1, experts=16, choices=2, tokens=2048, micro_batches=60)


def ratios(name, update):
  """Returns max/mean of each micro-batch, its choice biased by those before."""
  bias_E, found = np.zeros(16, np.float32), []
  for each in workloads.stream(name, SIZES):
    counts_LE = workloads.choose(each.scores_LTE + bias_E, 2)
    found.append(float(monitor.max_over_mean(counts_LE)[0]))
    bias_E = update(bias_E, counts_LE[0], each.scores_LTE[0])
  return np.array(found)


def test_deepseeks_bias_evens_a_skewed_load():
  found = ratios("zipf 0.5", lambda b, counts_E, _: bias.update(b, counts_E, 0.03))
  assert found[:5].mean() > 2 and found[-20:].mean() < 1.35


def test_quantiles_even_a_skewed_load_at_once():
  found = ratios("zipf 1.5", lambda b, _, scores_TE: quantile.update(b, scores_TE, 2))
  assert found[0] > 3 and found[3:].mean() < 1.4


def test_quantiles_balance_the_batch_that_they_are_taken_of():
  each = next(workloads.stream("zipf 1.5", SIZES))
  before, after = (
    workloads.choose(each.scores_LTE + b, 2)
    for b in (0.0, quantile.update(np.zeros(16, np.float32), each.scores_LTE[0], 2, rounds=8))
  )
  assert monitor.max_over_mean(before)[0] > 3
  assert monitor.max_over_mean(after)[0] < 1.03


def test_a_step_of_the_bias_by_hand():
  found = bias.update(np.zeros((1, 4)), np.array([[10, 2, 2, 2]]), 0.1)
  # -0.1, and three times +0.1, less their mean of 0.05.
  np.testing.assert_allclose(found, [[-0.15, 0.05, 0.05, 0.05]])


@pytest.mark.parametrize("keep", [0.0, 0.75])
def test_quantiles_keep_a_share_of_what_was(keep):
  scores_TE = next(workloads.stream("zipf 1", SIZES)).scores_LTE[0]
  old_E = np.linspace(-1, 1, 16, dtype=np.float32)
  fresh_E = quantile.update(old_E, scores_TE, 2)
  np.testing.assert_allclose(
    quantile.update(old_E, scores_TE, 2, keep=keep), keep * old_E + (1 - keep) * fresh_E, rtol=1e-5
  )


def test_jax_arrays_give_what_numpy_arrays_give():
  scores_TE = next(workloads.stream("zipf 1", SIZES)).scores_LTE[0]
  counts_E, old_E = np.arange(16), np.zeros(16, np.float32)
  found = quantile.update(jnp.asarray(old_E), jnp.asarray(scores_TE), 2)
  np.testing.assert_allclose(found, quantile.update(old_E, scores_TE, 2), atol=1e-5)
  found = bias.update(jnp.asarray(old_E), jnp.asarray(counts_E), 0.1)
  np.testing.assert_allclose(found, bias.update(old_E, counts_E, 0.1), atol=1e-6)
  np.testing.assert_allclose(
    bias.biased(jnp.asarray(scores_TE), found), scores_TE + np.asarray(found)[None], rtol=1e-6
  )
