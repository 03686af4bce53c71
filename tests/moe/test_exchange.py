"""The float8 exchange: its error is what its docstring states, there, back and in gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.moe.exchange import EXCHANGE
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel.axes import EXPERT, TENSOR
from tests.moe import served
from tests.moe.test_dispatch import case

X, TENSORS, E, C, D = 4, 2, 8, 6, 64


@functools.cache
def program(name, direction):
  function = getattr(EXCHANGE[name], direction)
  mesh = mesh_lib.make(config.Mesh(expert=X, tensor=TENSORS))

  def run(rows, cotangent):
    y, vjp = jax.vjp(function, rows)
    return y, vjp(cotangent)[0]

  spec = P((EXPERT, TENSOR))
  return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec, spec), out_specs=(spec, spec)))


def rows(direction, seed):
  there, back = (E, C, D), (E // X, X * TENSORS * C, D)
  shapes = [there, back] if direction == "to_experts" else [back, there]
  random = np.random.default_rng(seed)
  # Rows of sizes far apart: each has its own scale.
  make = lambda a, b, d: (
    random.normal(size=(8 * a, b, d)) * 10.0 ** random.uniform(-6, 6, (8 * a, b, 1))
  )
  return [jnp.asarray(make(*shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("direction", ["to_experts", "to_tokens"])
def test_float8_rounds_each_row_by_its_own_scale(direction):
  x, cotangent = rows(direction, 0)
  exact = program("hierarchical", direction)(x, cotangent)
  found = program("hierarchical_float8", direction)(x, cotangent)
  for each, wanted in zip(found, exact, strict=True):
    each, wanted = np.asarray(each, np.float64), np.asarray(wanted, np.float64)
    error = np.linalg.norm(each - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert 0.02 < np.median(error) < 0.03
    assert error.max() <= 1 / 16


def test_float8_keeps_zeros_and_integers():
  zeros = jnp.zeros((8 * E, C, D))
  back = jnp.zeros((8 * (E // X), X * TENSORS * C, D))
  found, gradient = program("hierarchical_float8", "to_experts")(zeros, back)
  assert not found.any() and not gradient.any()
  mesh = mesh_lib.make(config.Mesh(expert=X, tensor=TENSORS))
  spec = P((EXPERT, TENSOR))
  integers = jnp.arange(8 * E * C * 3, dtype=jnp.int32).reshape(8 * E, C, 3)
  send = lambda name: jax.shard_map(
    EXCHANGE[name].to_experts, mesh=mesh, in_specs=spec, out_specs=spec
  )(integers)
  np.testing.assert_array_equal(send("hierarchical_float8"), send("hierarchical"))


@pytest.mark.parametrize("direction", ["to_experts", "to_tokens"])
def test_float8_keeps_rows_of_tiny_numbers_finite(direction):
  tiny = lambda x, largest: x / abs(x).max(-1, keepdims=True) * largest
  given = [
    tiny(x, 10.0 ** jnp.linspace(-37.5, -35, x.shape[1])[None, :, None]) for x in rows(direction, 0)
  ]
  exact = program("hierarchical", direction)(*given)
  found = program("hierarchical_float8", direction)(*given)
  for each, wanted in zip(found, exact, strict=True):
    assert np.isfinite(each).all() and np.asarray(each).any(-1).all()
    error = np.abs(np.asarray(each, np.float64) - np.asarray(wanted, np.float64))
    assert (error <= np.abs(wanted) / 16 + np.finfo(np.float32).tiny).all()


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_a_layer_over_float8_is_off_by_the_rounding_and_no_more(dispatch):
  given = case("zipf_1", 1)
  run = lambda exchange: served.program((4, 2), config.Moe(dispatch=dispatch, exchange=exchange))(
    *given
  )
  found, exact = run("hierarchical_float8"), run("hierarchical")
  np.testing.assert_array_equal(found.expert_TK, exact.expert_TK)
  for each, wanted in zip(jax.tree.leaves(found[:2]), jax.tree.leaves(exact[:2]), strict=True):
    error = np.linalg.norm(np.asarray(each) - wanted) / np.linalg.norm(wanted)
    assert 1e-3 < error < 0.08
