"""The bandit on streams of step times: near the best fixed policy, never much worse than none."""

import numpy as np
import pytest

from moe_jax.balance.bandit import Bandit

NUM_STEPS = 1000


def run(true_s, expected_s, seed=0, noise=0.02, num_steps=NUM_STEPS):
  """Returns (mean step, policies chosen)."""
  random, bandit = np.random.default_rng(seed), Bandit(expected_s)
  total_s, chosen = 0.0, []
  for step in range(num_steps):
    name = bandit.choose()
    step_s = true_s(step)[name] * random.normal(1, noise)
    bandit.observe(name, step_s)
    total_s += step_s
    chosen.append(name)
  return total_s / num_steps, chosen


@pytest.mark.parametrize("seed", range(40))
def test_within_2_percent_of_the_best_and_1_of_none(seed):
  random = np.random.default_rng(seed)
  true_s = {"none": 1.0}
  for index in range(random.integers(1, 8)):
    better = seed % 4 and random.random() < 0.5
    true_s[f"policy {index}"] = random.uniform(0.4, 1.0) if better else random.uniform(1.0, 1.3)
  expected_s = {name: each * random.uniform(0.85, 1.15) for name, each in true_s.items()}
  mean_s, _ = run(lambda _: true_s, expected_s, seed)
  assert mean_s <= 1.02 * min(true_s.values())
  assert mean_s <= 1.01


def test_what_is_expected_to_be_worse_is_tried_on_credit_only():
  true_s = {"none": 1.0, "costly": 3.0}
  mean_s, chosen = run(lambda _: true_s, true_s)
  assert mean_s <= 1.01
  assert "costly" not in chosen[:300]


def test_a_policy_that_starts_to_pay_is_found():
  true_s = lambda step: {"none": 1.0, "placement": 1.2 if step < 200 else 0.5}
  _, chosen = run(true_s, {"none": 1.0, "placement": 1.2}, num_steps=2000)
  assert chosen[-500:].count("placement") >= 450


def test_an_expectation_that_was_wrong_costs_a_trial():
  true_s = {"none": 1.0, "promising": 2.0}
  mean_s, chosen = run(lambda _: true_s, {"none": 1.0, "promising": 0.2})
  assert 1 <= chosen.count("promising") <= 12
  assert mean_s <= 1.012


def test_the_baseline_must_be_a_policy():
  with pytest.raises(ValueError, match="baseline='none' is not one of spill"):
    Bandit({"spill": 1.0})
