"""The two moves between tokens and rows: values and gradients against a dense formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe import rows
from tests.moe.test_capacity import plan_of, routed

TOLERANCE = 1e-6  # relative L2, float32: sums of a few terms


def case(seed, C, skew=1.0, T=24, K=2, E=6, D=5):
  routing, logits_TE = routed(seed, T, K, E, skew)
  layout = plan_of((T, K, E, C), routing, logits_TE).places
  random = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  # One where row r of the send buffer holds assignment (t, k).
  row_RTK = jnp.asarray(np.arange(E * C)[:, None, None] == np.asarray(layout.row_TK), jnp.float32)
  return layout, row_RTK, routing.weights_TK, normal(T, D), normal(E * C, D)


@pytest.mark.parametrize(("C", "drops"), [(3, True), (24, False)])
def test_tokens_to_rows_equals_the_dense_formula(C, drops):
  layout, row_RTK, _, x_TD, cotangent_RD = case(0, C)
  assert bool((~layout.placed_TK).any()) == drops
  found, vjp = jax.vjp(lambda x: rows.tokens_to_rows(x, layout), x_TD)
  expected, expected_vjp = jax.vjp(lambda x: jnp.einsum("rtk,td->rd", row_RTK, x), x_TD)
  check(found, expected)
  check(vjp(cotangent_RD)[0], expected_vjp(cotangent_RD)[0])


@pytest.mark.parametrize(("C", "drops"), [(3, True), (24, False)])
def test_rows_to_tokens_equals_the_dense_formula(C, drops):
  layout, row_RTK, weights_TK, cotangent_TD, rows_RD = case(1, C)
  assert bool((~layout.placed_TK).any()) == drops
  production = lambda rows_RD, weights: rows.rows_to_tokens(rows_RD, weights, layout)
  formula = lambda rows_RD, weights: jnp.einsum("rtk,rd,tk->td", row_RTK, rows_RD, weights)
  found, vjp = jax.vjp(production, rows_RD, weights_TK)
  expected, expected_vjp = jax.vjp(formula, rows_RD, weights_TK)
  check(found, expected)
  for each, expected_each in zip(vjp(cotangent_TD), expected_vjp(cotangent_TD), strict=True):
    check(each, expected_each)


def test_bfloat16_rows_are_summed_in_float32():
  layout, _, weights_TK, _, rows_RD = case(2, 24)
  half_RD = rows_RD.astype(jnp.bfloat16)
  found = rows.rows_to_tokens(half_RD, weights_TK, layout)
  expected = rows.rows_to_tokens(half_RD.astype(jnp.float32), weights_TK, layout)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))


def check(found, expected):
  assert np.linalg.norm(found - expected) <= TOLERANCE * np.linalg.norm(expected)
