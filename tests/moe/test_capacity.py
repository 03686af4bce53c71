"""Plans of capacity: who is kept, who spills to whom, conservation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import config
from moe_jax.moe import capacity, router
from moe_jax.moe.exchange import EXCHANGE
from moe_jax.moe.plan import Setting
from moe_jax.moe.router import Routing
from moe_jax.parallel.axes import EXPERT
from tests.moe import dense


def routed(seed, num_tokens, num_choices, num_experts, skew=0.0):
  """Returns a routing whose higher experts are rarer as `skew` rises, and its logits."""
  random = np.random.default_rng(seed)
  logits = random.normal(size=(num_tokens, num_experts)) - skew * np.log1p(np.arange(num_experts))
  experts = np.argsort(-logits, axis=1)[:, :num_choices].astype(np.int32)
  weights = random.dirichlet(np.ones(num_choices), num_tokens).astype(np.float32)
  return Routing(jnp.asarray(experts), jnp.asarray(weights)), jnp.asarray(logits, jnp.float32)


# (tokens, choices, experts, rows an expert): roomy, tight, one row, one choice, all experts chosen.
SIZES = [(12, 2, 6, 12), (12, 2, 6, 3), (9, 3, 4, 1), (8, 1, 5, 2), (6, 3, 3, 4), (16, 2, 6, 6)]
SKEWS = [0.0, 1.0, 5.0]


@functools.cache
def planner(sizes, spill=False):
  T, K, E, C = sizes
  factor = (C - 0.5) * E / (T * K)
  setting = Setting(T, K, E, factor, spill, EXCHANGE["hierarchical"])
  plan = lambda routing, logits_TE, _: capacity.plan(setting, routing, logits_TE)
  # A plan asks how many ranks there are, and nothing of them.
  of_ranks = jax.vmap(plan, (None, None, 0), axis_name=EXPERT)
  ranks = jnp.arange(num_ranks(E))
  return jax.jit(lambda *given: jax.tree.map(lambda x: x[0], of_ranks(*given, ranks)))


def num_ranks(E):
  return 2 if E % 2 == 0 else 1


def plan_of(sizes, routing, logits_TE, spill=False):
  return planner(sizes, spill)(routing, logits_TE)


def check_layout(plan, sizes):
  """The two directions agree, each row lies with its expert, and the counts are those of rows."""
  T, K, E, C = sizes
  counts, (row_TK, assignment_R) = plan.counts, map(np.asarray, plan.places)
  expert_TK = np.asarray(plan.expert_TK)
  expert_Xe = np.arange(E).reshape(num_ranks(E), -1)
  expert_R = np.repeat(expert_Xe[:, None], C, axis=1).reshape(-1)
  assert counts.sent == T * K == counts.kept + counts.spilled + counts.dropped
  assert counts.padded == E * C - counts.kept - counts.spilled
  np.testing.assert_array_equal(row_TK < E * C, expert_TK < E)
  for t, k in np.argwhere(expert_TK < E):
    assert assignment_R[row_TK[t, k]] == t * K + k
    assert expert_R[row_TK[t, k]] == expert_TK[t, k]
  filled_XCe = (assignment_R < T * K).reshape(num_ranks(E), C, -1)
  filled_EC = filled_XCe.swapaxes(1, 2).reshape(E, C)
  assert filled_EC.sum() == (expert_TK < E).sum()
  assert (np.diff(filled_EC.astype(int), axis=1) <= 0).all()  # filled rows come first


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(SIZES), st.sampled_from(SKEWS))
def test_plan_keeps_the_heaviest_and_loses_nothing_in_silence(seed, sizes, skew):
  T, K, E, C = sizes
  routing, logits_TE = routed(seed, T, K, E, skew)
  plan = plan_of(sizes, routing, logits_TE)
  kept_TK = dense.kept(routing.experts_TK, routing.weights_TK, E, C)
  np.testing.assert_array_equal(plan.expert_TK, np.where(kept_TK, routing.experts_TK, E))
  assert (plan.counts.kept, plan.counts.spilled) == (kept_TK.sum(), 0)
  check_layout(plan, sizes)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(SIZES), st.sampled_from(SKEWS))
def test_spill_goes_to_the_next_expert_with_room(seed, sizes, skew):
  T, K, E, C = sizes
  routing, logits_TE = routed(seed, T, K, E, skew)
  plan = plan_of(sizes, routing, logits_TE, spill=True)
  expected_TK = dense.spilled(routing.experts_TK, routing.weights_TK, logits_TE, C)
  np.testing.assert_array_equal(plan.expert_TK, expected_TK)
  kept_TK = dense.kept(routing.experts_TK, routing.weights_TK, E, C)
  assert plan.counts.kept == kept_TK.sum()
  assert plan.counts.spilled == ((expected_TK < E) & ~kept_TK).sum()
  check_layout(plan, sizes)
  # What is dropped found every expert full, or serving another assignment of the token.
  used_E = np.bincount(expected_TK.reshape(-1), minlength=E + 1)[:E]
  for t, k in np.argwhere(expected_TK == E):
    others = {int(e) for e in routing.experts_TK[t]} | {int(e) for e in expected_TK[t]}
    assert all(used_E[e] == C for e in range(E) if e not in others), (t, k)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(12, 2, 6, 3), (16, 2, 6, 6)]))
def test_spill_stays_on_the_hosts_that_a_token_is_limited_to(seed, sizes):
  T, K, E, C = sizes
  routing, logits_TE = routed(seed, T, K, E, skew=2.0)
  ranking_TE = router.ranking(logits_TE, K, router.Limit(2, 1), None)
  _, experts_TK = jax.lax.top_k(ranking_TE, K)
  routing = routing._replace(experts_TK=experts_TK.astype(jnp.int32))
  plan = plan_of(sizes, routing, ranking_TE, spill=True)
  check_layout(plan, sizes)
  expert_TK = np.asarray(plan.expert_TK)
  assert (expert_TK // (E // 2) == np.asarray(experts_TK) // (E // 2))[expert_TK < E].all()
  expected_TK = dense.spilled(routing.experts_TK, routing.weights_TK, ranking_TE, C)
  np.testing.assert_array_equal(expert_TK, expected_TK)


def test_spill_serves_all_where_there_is_room():
  sizes = (12, 2, 6, 6)
  routing, logits_TE = routed(0, *sizes[:3], skew=5.0)
  assert plan_of(sizes, routing, logits_TE).counts.dropped > 0
  counts = plan_of(sizes, routing, logits_TE, spill=True).counts
  assert counts.spilled > 0 and counts.dropped == 0


def test_equal_weights_drop_something_and_keep_the_earlier():
  routing = Routing(jnp.zeros((5, 1), jnp.int32), jnp.ones((5, 1), jnp.float32))
  plan = plan_of((5, 1, 2, 3), routing, jnp.zeros((5, 2)))
  np.testing.assert_array_equal(plan.expert_TK[:, 0], [0, 0, 0, 2, 2])


def test_no_plan_makes_an_array_of_tokens_times_experts_times_rows():
  sizes = (64, 2, 16, 10)
  routing, logits_TE = routed(0, *sizes[:3])
  lowered = planner(sizes, True).lower(routing, logits_TE)
  largest = max(int(np.prod(shape)) for shape in tensor_shapes(lowered.as_text()))
  assert largest <= 64 * 2 * 16  # assignments x experts, the one-hot that is counted


def tensor_shapes(text):
  """Yields the dimensions of each tensor type in the program's text."""
  for piece in text.split("tensor<")[1:]:
    yield [int(d) for d in piece[: piece.index(">")].split("x")[:-1] if d.isdigit()]


def test_spilling_needs_the_dispatch_that_overflows():
  with pytest.raises(ValueError, match=r"moe\.spill=True needs moe\.dispatch=capacity, got dropl"):
    config.Moe(dispatch="dropless", spill=True)


@pytest.mark.parametrize(
  ("tokens", "choices", "experts", "factor", "rows"),
  [
    (256, 2, 16, 1.25, 40),
    (8, 2, 8, 4.0, 8),
    (8, 2, 8, 100.0, 8),
    (4, 1, 16, 1.0, 1),
    (10, 2, 8, 1.0, 3),
  ],
)
def test_rows_per_expert(tokens, choices, experts, factor, rows):
  assert capacity.rows_per_expert(tokens, choices, experts, factor) == rows


def test_what_a_biased_choice_spills_goes_to_no_expert_that_its_token_has():
  sizes = (64, 2, 6, 30)
  random = np.random.default_rng(0)
  x_TD, kernel_DE = (
    jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((64, 8), (8, 6))
  )
  bias_E = jnp.array([9.0, 1.5, 0.0, 0.0, 0.0, 0.0])
  routing, logits_TE = router.route(kernel_DE, x_TD, 2, bias_E=bias_E)

  def twice(scores_TE):
    expert_TK = np.asarray(plan_of(sizes, routing, scores_TE, spill=True).expert_TK)
    return (expert_TK[:, 0] == expert_TK[:, 1]) & (expert_TK[:, 0] < 6)

  assert not twice(router.ranking(logits_TE, 2, None, bias_E)).any()
  assert twice(logits_TE).any()  # the logits alone rank some choices among what was not chosen
