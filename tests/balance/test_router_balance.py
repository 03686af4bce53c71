"""The two biases on streams of scores: they even the load, and change no weight."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config
from moe_jax.balance import bias, monitor, quantile, rules, workloads

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


def test_where_every_token_takes_all_experts_the_bias_stays():
  scores_TE = np.random.default_rng(0).standard_normal((64, 16), np.float32)
  old_E = np.linspace(-1, 1, 16, dtype=np.float32)
  np.testing.assert_array_equal(quantile.update(old_E, scores_TE, 16), old_E)


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


def test_config_knows_the_same_names():
  assert set(config.ROUTER_BALANCE) == set(rules.RULES)


@pytest.mark.parametrize("kind", ["even", "zipf 0.5", "zipf 1.5"])
def test_counts_find_the_bias_that_quantiles_find(kind):
  scores_TE = next(workloads.stream(kind, SIZES)).scores_LTE[0]
  old_E = np.zeros(16, np.float32)
  for _ in range(3):
    expected_E = quantile.update(old_E, scores_TE, 2)
    found_E = from_counts(old_E, quantile.passing(old_E, scores_TE, 2), len(scores_TE))
    # Two edges are 0.017 apart at 0 and 0.16 for each unit beyond; between them density bends.
    assert (abs(found_E - expected_E) <= 0.01 + 0.03 * abs(expected_E - old_E)).all()
    old_E = found_E
  counts_E = workloads.choose(scores_TE[None] + old_E, 2)
  assert monitor.max_over_mean(counts_E)[0] < 1.1


def test_counts_of_parts_add_up_to_those_of_the_batch():
  scores_TE = jnp.asarray(next(workloads.stream("zipf 1", SIZES)).scores_LTE[0])
  old_E = jnp.linspace(-1, 1, 16)
  whole_EB = quantile.passing(old_E, scores_TE, 2)
  parts = [quantile.passing(old_E, part, 2) for part in jnp.split(scores_TE, 8)]
  np.testing.assert_array_equal(sum(parts), whole_EB)
  np.testing.assert_array_equal(
    quantile.passing(np.asarray(old_E), np.asarray(scores_TE), 2), whole_EB
  )
  assert (np.diff(whole_EB, axis=1) <= 0).all()


def test_an_expert_that_no_edge_reaches_moves_as_far_as_the_edges():
  scores_TE = np.zeros((64, 4), np.float32)
  scores_TE += np.array([30.0, 0.1, 0.0, -30.0], np.float32)[None]
  old_E = np.zeros(4, np.float32)
  found_E = from_counts(old_E, quantile.passing(old_E, scores_TE, 2), 64)
  assert np.ptp(found_E) == pytest.approx(2 * quantile.EDGES[-1], rel=1e-6)
  assert found_E[0] == found_E.min() and found_E[3] == found_E.max()


def from_counts(bias_E, above_EB, num_tokens):
  share_L1 = np.full((1, 1), 2 * num_tokens / len(bias_E), np.float32)
  return quantile.from_counts(bias_E[None], above_EB[None], share_L1)[0]


@pytest.mark.parametrize("name", ["auxiliary", "none"])
def test_where_a_loss_or_nothing_evens_the_bias_stays(name):
  rule = rules.RULES[name]
  old_LE, scores_TE = np.ones((2, 4), np.float32), np.zeros((8, 4), np.float32)
  measured = rule.measure(old_LE[0], scores_TE, 2)
  assert rule.move(rules.Step(old_LE, np.arange(8).reshape(2, 4), measured, 1.0)) is old_LE
  assert rule.uses_loss == (name == "auxiliary")
