"""The router: choices, weights, and auxiliary losses whose shares sum to the micro-batch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.moe import router
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel.axes import TOKENS
from tests.moe import dense


def arrays(num_tokens=64, width=8, num_experts=6):
  random = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  return normal(num_tokens, width), normal(width, num_experts)


def test_route_is_the_renormalised_softmax_over_all_experts():
  x_TD, kernel_DE = arrays()
  routing, logits_TE = router.route(kernel_DE, x_TD, 3)
  experts_TK, weights_TK = dense.route(x_TD, kernel_DE, 3)
  np.testing.assert_array_equal(routing.experts_TK, experts_TK)
  np.testing.assert_allclose(routing.weights_TK, weights_TK, rtol=1e-5)
  np.testing.assert_allclose(logits_TE, x_TD @ kernel_DE, rtol=1e-5, atol=1e-6)
  assert (np.diff(routing.weights_TK, axis=1) <= 0).all()  # best first


def test_weights_that_are_not_renormalised_are_those_of_the_softmax_over_all_experts():
  x_TD, kernel_DE = arrays()
  routing, logits_TE = router.route(kernel_DE, x_TD, 3, normalize_choices=False)
  renormalised, _ = router.route(kernel_DE, x_TD, 3)
  np.testing.assert_array_equal(routing.experts_TK, renormalised.experts_TK)
  probability_TE = np.exp(np.asarray(logits_TE, np.float64))
  probability_TE /= probability_TE.sum(1, keepdims=True)
  expected = np.take_along_axis(probability_TE, np.asarray(routing.experts_TK), 1)
  np.testing.assert_allclose(routing.weights_TK, expected, rtol=1e-5)
  assert routing.weights_TK.sum(1).max() < 1


def test_bfloat16_activations_are_routed_in_float32():
  x_TD, kernel_DE = arrays()
  half = x_TD.astype(jnp.bfloat16)
  routing, logits_TE = router.route(kernel_DE, half, 2)
  assert logits_TE.dtype == routing.weights_TK.dtype == jnp.float32
  expected = np.asarray(half, np.float64) @ np.asarray(kernel_DE, np.float64)
  np.testing.assert_allclose(logits_TE, expected, rtol=1e-5, atol=1e-5)


def test_assignments_are_counted():
  experts_TK = np.random.default_rng(0).integers(0, 6, (20, 2)).astype(np.int32)
  found = router.assignments_per_expert(jnp.asarray(experts_TK), 6)
  np.testing.assert_array_equal(found, np.bincount(experts_TK.reshape(-1), minlength=6))


def test_losses_of_the_shares_sum_to_those_of_the_micro_batch():
  x_TD, kernel_DE = arrays()
  K, E = 2, kernel_DE.shape[1]

  def losses(x_tD):
    routing, logits_tE = router.route(kernel_DE, x_tD, K)
    assigned_E = router.assignments_per_expert(routing.experts_TK, E)
    share = router.auxiliary_losses(router.statistics(logits_tE, assigned_E))
    return jax.tree.map(lambda leaf: leaf[None], share)

  mesh = mesh_lib.make(config.Mesh(expert=4, tensor=2))
  every = P(TOKENS)
  shares = jax.jit(jax.shard_map(losses, mesh=mesh, in_specs=every, out_specs=every))(x_TD)
  logits_TE = np.asarray(x_TD, np.float64) @ np.asarray(kernel_DE, np.float64)
  probability_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(1, keepdims=True)
  chosen = np.argsort(-logits_TE, axis=1)[:, :K]
  fraction_E = np.bincount(chosen.reshape(-1), minlength=E) / chosen.size
  np.testing.assert_allclose(
    shares.load_balance.sum(), E * (fraction_E * probability_TE.mean(0)).sum(), rtol=1e-5
  )
  z = (np.log(np.exp(logits_TE).sum(1)) ** 2).mean()
  np.testing.assert_allclose(shares.router_z.sum(), z, rtol=1e-5)
  assert np.ptp(shares.router_z) > 0  # they are shares, not eight copies


@pytest.mark.parametrize("groups_per_token", [1, 2, 3])
def test_limited_choices_are_the_best_of_the_best_groups(groups_per_token):
  x_TD, kernel_DE = arrays(num_experts=12)
  limit, K = router.Limit(3, groups_per_token), 4
  routing, logits_TE = router.route(kernel_DE, x_TD, K, limit=limit)
  free, free_logits_TE = router.route(kernel_DE, x_TD, K)
  np.testing.assert_array_equal(logits_TE, free_logits_TE)  # the losses see all experts
  probability_TE = np.asarray(jax.nn.softmax(logits_TE, -1))
  of_each = -(-K // groups_per_token)
  for t, probability_E in enumerate(probability_TE):
    groups = probability_E.reshape(3, 4)
    scores = np.sort(groups, axis=1)[:, -of_each:].sum(1)
    allowed = set(np.argsort(-scores)[:groups_per_token])
    ranked = [e for e in np.argsort(-probability_E) if e // 4 in allowed]
    np.testing.assert_array_equal(routing.experts_TK[t], ranked[:K])
  np.testing.assert_allclose(routing.weights_TK.sum(1), 1, rtol=1e-6)
  is_free = (np.asarray(routing.experts_TK) == np.asarray(free.experts_TK)).all()
  assert is_free == (groups_per_token == 3)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_bias_changes_the_choice_and_no_weight(normalize):
  x_TD, kernel_DE = arrays()
  bias_E, K = jnp.array([2.0, -1.0, 0.0, 0.5, 0.0, -3.0]), 3
  routing, logits_TE = router.route(kernel_DE, x_TD, K, normalize, bias_E=bias_E)
  np.testing.assert_array_equal(logits_TE, router.route(kernel_DE, x_TD, K)[1])
  biased_TE = np.asarray(logits_TE) + np.asarray(bias_E)[None]
  np.testing.assert_array_equal(routing.experts_TK, np.argsort(-biased_TE, 1)[:, :K])
  assert (np.asarray(routing.experts_TK) != np.argsort(-np.asarray(logits_TE), 1)[:, :K]).any()
  probability_TE = np.exp(np.asarray(logits_TE, np.float64))
  probability_TE /= probability_TE.sum(1, keepdims=True)
  expected_TK = np.take_along_axis(probability_TE, np.asarray(routing.experts_TK), 1)
  if normalize:
    expected_TK /= expected_TK.sum(1, keepdims=True)
  np.testing.assert_allclose(routing.weights_TK, expected_TK, rtol=1e-5)


def test_no_gradient_reaches_the_bias():
  x_TD, kernel_DE = arrays()
  squares = lambda kernel_DE, bias_E: (
    router.route(kernel_DE, x_TD, 3, bias_E=bias_E)[0].weights_TK ** 2
  ).sum()
  of_kernel, of_bias = jax.grad(squares, (0, 1))(kernel_DE, jnp.linspace(-1, 1, 6))
  assert np.abs(of_kernel).max() > 0 and not of_bias.any()


def test_limited_choices_go_by_the_bias_too():
  x_TD, kernel_DE = arrays(num_experts=12)
  limit, K = router.Limit(3, 1), 2
  bias_E = jnp.where(jnp.arange(12) // 4 == 1, 50.0, 0.0)
  routing, logits_TE = router.route(kernel_DE, x_TD, K, limit=limit, bias_E=bias_E)
  # All go to the favoured group, and there to the best of its experts.
  group_TE = np.asarray(logits_TE)[:, 4:8]
  np.testing.assert_array_equal(routing.experts_TK, 4 + np.argsort(-group_TE, 1)[:, :K])


@pytest.mark.parametrize("limit", [None, router.Limit(3, 1)])
def test_the_ranking_begins_with_the_choices(limit):
  x_TD, kernel_DE = arrays(num_experts=12)
  bias_E, K = jnp.linspace(-2, 2, 12), 3
  routing, logits_TE = router.route(kernel_DE, x_TD, K, limit=limit, bias_E=bias_E)
  ranking_TE = router.ranking(logits_TE, K, limit, bias_E)
  np.testing.assert_array_equal(jax.lax.top_k(ranking_TE, K)[1], routing.experts_TK)
