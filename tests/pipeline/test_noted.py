"""Results taken out of a function and put back: the same values, and only the rest computed."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.pipeline import noted


def _run(weights, x):
  """Two exponentials, the second of which reads the first; a third that nothing else needs."""
  first = jnp.exp(weights["a"] * x)
  second = jnp.exp(first + weights["b"])
  return {"second": second, "sine": jnp.sin(first)}, jnp.exp(x)


def _is_exp(eqn):
  return eqn.primitive.name == "exp"


WEIGHTS, X = {"a": jnp.float32(0.5), "b": jnp.float32(-1.0)}, jnp.arange(3, dtype=jnp.float32)


def test_results_come_out_in_the_order_in_which_they_are_made():
  out, results = noted.take(_run, _is_exp)(WEIGHTS, X)
  jax.tree.map(np.testing.assert_array_equal, out, _run(WEIGHTS, X))
  first = jnp.exp(0.5 * X)
  for found, expected in zip(results, (first, jnp.exp(first - 1), jnp.exp(X)), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_given_results_are_not_computed_again():
  _, results = noted.take(_run, _is_exp)(WEIGHTS, X)
  given = noted.put(_run, _is_exp, results)
  jax.tree.map(np.testing.assert_array_equal, given(WEIGHTS, X), _run(WEIGHTS, X))
  left = [eqn.primitive.name for eqn in jax.make_jaxpr(given)(WEIGHTS, X).eqns]
  assert left == ["sin"]


def test_what_only_led_to_another_result_is_not_read():
  def run(x):
    return jnp.sin(jnp.exp(jnp.exp(x)))

  assert noted.is_read(run, (X,), _is_exp) == [False, True]
  _, (_, second) = noted.take(run, _is_exp)(X)
  found = noted.put(run, _is_exp, [None, second])(X)
  np.testing.assert_array_equal(found, run(X))


def test_a_result_that_is_returned_is_read():
  assert noted.is_read(jnp.exp, (X,), _is_exp) == [True]
