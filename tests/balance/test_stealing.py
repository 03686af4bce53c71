"""The decision who serves whom: conservation, evenness, thrift, and one program for all counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.balance import packing, stealing

NUM_EXPERTS, NUM_RANKS, NUM_SHADOWS = 32, 8, 6


def holders(expert_P, num_experts, num_ranks):
  """Returns holds_EX, which ranks hold each expert, from the expert in each slot of a placement."""
  slots_XS = expert_P.reshape(num_ranks, -1)
  return jnp.asarray((slots_XS[None] == np.arange(num_experts)[:, None, None]).any(-1))


@functools.cache
def compiled(num_experts, num_ranks, num_shadows, price=None, is_replicated=True):
  """Returns the decision jitted; without replicas the holders are known when it is compiled."""
  if is_replicated:
    return jax.jit(functools.partial(stealing.decide, num_shadows=num_shadows, price=price))
  holds_EX = stealing.held_once(num_experts, num_ranks)
  return jax.jit(lambda counts_E: stealing.decide(counts_E, holds_EX, num_shadows, price))


def zipf(exponent, num_experts, num_tokens, seed=0):
  """Returns (share_E, counts_E) of a drawn micro-batch."""
  random = np.random.default_rng(seed)
  share_E = random.permutation(np.arange(1.0, num_experts + 1) ** -exponent)
  share_E /= share_E.sum()
  return share_E, random.multinomial(num_tokens, share_E).astype(np.int32)


def check(decision, counts_E, holds_EX, num_shadows):
  """Checks what every decision must hold; returns the ranks' tokens."""
  quota_EX, shadow_H = np.asarray(decision.quota_EX), np.asarray(decision.shadow_H)
  assert quota_EX.dtype == np.int32 and (quota_EX >= 0).all()
  np.testing.assert_array_equal(quota_EX.sum(1), counts_E)
  shadows = shadow_H[shadow_H < len(counts_E)]
  assert len(shadow_H) == num_shadows and len(set(shadows.tolist())) == len(shadows)
  elsewhere_E = (quota_EX * ~np.asarray(holds_EX)).sum(1)
  assert set(np.flatnonzero(elsewhere_E).tolist()) <= set(shadows.tolist())
  load_X = quota_EX.sum(0)
  assert load_X.max() == decision.peak <= decision.peak_before
  return load_X


LOADS = {
  "nothing": np.zeros(NUM_EXPERTS, np.int32),
  "one token": np.eye(NUM_EXPERTS, dtype=np.int32)[5],
  "one hot": 40_000 * np.eye(NUM_EXPERTS, dtype=np.int32)[5] + 7,
  "one rank": np.where(np.arange(NUM_EXPERTS) < 4, 9_999, 0).astype(np.int32),
  **{f"zipf {s}": zipf(s, NUM_EXPERTS, 65_536)[1] for s in (0.0, 0.5, 1.0, 1.5, 2.0)},
}


@pytest.mark.parametrize("load", LOADS)
def test_quotas_conserve_tokens_and_shadows_even_the_ranks(load):
  counts_E = LOADS[load]
  decision = compiled(NUM_EXPERTS, NUM_RANKS, NUM_SHADOWS, None, False)(counts_E)
  holds_EX = stealing.held_once(NUM_EXPERTS, NUM_RANKS)
  load_X = check(decision, counts_E, holds_EX, NUM_SHADOWS)
  assert decision.peak_before == counts_E.reshape(NUM_RANKS, -1).sum(1).max()
  assert load_X.max() <= np.ceil(counts_E.sum() / NUM_RANKS * 1.006)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize(("num_ranks", "num_experts"), [(8, 16), (64, 128)])
def test_with_placement_the_busiest_rank_has_at_most_2_percent_more(
  exponent, num_ranks, num_experts
):
  num_tokens, num_shadows = 4096 * num_ranks, 8
  for seed in range(8):
    share_E, counts_E = zipf(exponent, num_experts, num_tokens, seed)
    # The placement knows the shares, this micro-batch's counts it does not.
    expert_LP = packing.plan(share_E[None] * num_tokens, num_experts + num_ranks, num_ranks)
    holds_EX = holders(expert_LP[0], num_experts, num_ranks)
    decision = compiled(num_experts, num_ranks, num_shadows)(counts_E, holds_EX)
    load_X = check(decision, counts_E, holds_EX, num_shadows)
    assert load_X.max() <= 1.02 * load_X.mean()


def test_replicas_share_unevenly_where_that_evens_the_ranks():
  # Experts 0 and 1 on their own ranks, 2 on both: it fills up what 0 leaves.
  holds_EX = np.array([[True, False], [False, True], [True, True]])
  decision = compiled(3, 2, 1)(np.array([100, 700, 1000], np.int32), jnp.asarray(holds_EX))
  assert (np.asarray(decision.shadow_H) == 3).all()
  np.testing.assert_allclose(decision.quota_EX.sum(0), [900, 900], atol=20)


def test_shadows_are_no_more_than_it_takes():
  counts_E = np.full(NUM_EXPERTS, 100, np.int32)
  counts_E[3] = 900
  decision = compiled(NUM_EXPERTS, NUM_RANKS, NUM_SHADOWS, None, False)(counts_E)
  assert sorted(np.asarray(decision.shadow_H).tolist())[:2] == [3, NUM_EXPERTS]
  even = np.full(NUM_EXPERTS, 100, np.int32)
  decision = compiled(NUM_EXPERTS, NUM_RANKS, NUM_SHADOWS, None, False)(even)
  assert (np.asarray(decision.shadow_H) == NUM_EXPERTS).all()


@pytest.mark.parametrize(("shadow_s", "num_shadows"), [(0.0, 2), (0.5, 2), (0.9, 1), (2.5, 0)])
def test_a_shadow_has_to_save_what_it_costs(shadow_s, num_shadows):
  # Two ranks have 2,900 and 1,400 tokens, the mean is 687.5. The first shadow saves 1,500 tokens,
  # the second what is then left above the mean.
  counts_E = np.full((NUM_RANKS, NUM_EXPERTS // NUM_RANKS), 50, np.int32)
  counts_E[1, 0], counts_E[5, 2] = 2_750, 1_250
  counts_E = counts_E.reshape(-1)
  price = stealing.Price(shadow_s=shadow_s, token_s=1e-3)
  decision = compiled(NUM_EXPERTS, NUM_RANKS, NUM_SHADOWS, price, False)(counts_E)
  check(decision, counts_E, stealing.held_once(NUM_EXPERTS, NUM_RANKS), NUM_SHADOWS)
  assert (np.asarray(decision.shadow_H) < NUM_EXPERTS).sum() == num_shadows
  assert decision.peak_before == 2900
  assert decision.peak == {2: 688, 1: 1400, 0: 2900}[num_shadows]


def test_even_sends_conserve_and_come_near_the_quotas():
  random = np.random.default_rng(0)
  counts_SE = np.stack(
    [random.multinomial(4096, zipf(1.5, NUM_EXPERTS, 1)[0]) for _ in range(NUM_RANKS)]
  ).astype(np.int32)
  holds_EX = stealing.held_once(NUM_EXPERTS, NUM_RANKS)
  quota_EX = stealing.decide(jnp.asarray(counts_SE.sum(0)), holds_EX, NUM_SHADOWS).quota_EX
  sends_SEX = np.stack([stealing.even_sends(quota_EX, jnp.asarray(each)) for each in counts_SE])
  assert (sends_SEX >= 0).all()
  np.testing.assert_array_equal(sends_SEX.sum(2), counts_SE)
  assert np.abs(sends_SEX.sum(0) - quota_EX).max() <= NUM_RANKS
  to_rank_SX = sends_SEX.sum(1)
  assert to_rank_SX.max() <= 1.1 * to_rank_SX.mean()


def test_destinations_follow_the_sends():
  sends_EX = jnp.array([[2, 0, 1], [0, 3, 0]], jnp.int32)
  expert_A = jnp.array([0, 1, 0, 1, 0, 1], jnp.int32)
  place_A = jnp.array([0, 0, 1, 1, 2, 2], jnp.int32)
  assert stealing.destinations(sends_EX, expert_A, place_A).tolist() == [0, 1, 0, 1, 2, 1]


def test_other_counts_compile_nothing():
  decide = compiled(NUM_EXPERTS, NUM_RANKS, NUM_SHADOWS, None, False)
  for counts_E in LOADS.values():
    decide(counts_E)
  assert decide._cache_size() == 1
