"""What each wrapper brings where, on eight devices; what it sends is held by tests/contracts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.parallel import collectives
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel.axes import ALL, EXPERT, STAGE, TENSOR

ON_AXIS = {
  STAGE: config.Mesh(stage=4, expert=2),
  EXPERT: config.Mesh(expert=4, tensor=2),
  TENSOR: config.Mesh(tensor=4, stage=2),
}


def run(axis, function, x, out_specs):
  mesh = mesh_lib.make(ON_AXIS[axis])
  return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P(axis), out_specs=out_specs))(x)


@pytest.fixture
def x():
  return np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)


@pytest.mark.parametrize("axis", ALL)
def test_gather_and_reduce_scatter_undo_each_other_four_times_over(axis, x):
  both = lambda x: collectives.reduce_scatter(collectives.gather(x, axis, 1), axis, 1)
  np.testing.assert_allclose(run(axis, both, x, P(axis)), 4 * x, rtol=1e-6)
  joined = run(axis, lambda x: collectives.gather(x, axis, 1), x, P(axis))
  expected = np.concatenate(np.split(x, 4), axis=1)
  np.testing.assert_array_equal(joined, np.tile(expected, (4, 1)))


@pytest.mark.parametrize("axis", ALL)
def test_exchange_swaps_sender_and_row(axis, x):
  found = run(axis, lambda x: collectives.exchange(x, axis), x, P(axis))
  np.testing.assert_array_equal(found, x.reshape(4, 4, 4).swapaxes(0, 1).reshape(16, 4))


@pytest.mark.parametrize("by", [1, -1])
@pytest.mark.parametrize("axis", ALL)
def test_shift_moves_a_tree_along_the_ring(axis, by, x):
  found = run(axis, lambda x: collectives.shift({"a": x, "b": 2 * x}, axis, by), x, P(axis))
  expected = np.roll(x.reshape(4, 4, 4), by, axis=0).reshape(16, 4)
  np.testing.assert_array_equal(found["a"], expected)
  np.testing.assert_array_equal(found["b"], 2 * expected)


@pytest.mark.parametrize("axis", ALL)
def test_broadcast_takes_one_device_and_ignores_what_is_not_finite_elsewhere(axis, x):
  x[:8] = np.nan
  found = run(axis, lambda x: collectives.broadcast_from(x, axis, 2), x, P())
  np.testing.assert_array_equal(found, x[8:12])


def test_varying_keeps_values_and_leaves_gradients_unsummed():
  mesh = mesh_lib.make(config.Mesh(expert=2, tensor=2, stage=2))

  def region(w, x):
    cast = collectives.varying({"w": w})["w"]
    gradient = jax.grad(lambda w: (w * x).sum())(cast)
    assert set(jax.typeof(gradient).manual_axis_type.varying) == set(ALL)
    zeros = collectives.zeros_like({"w": w})["w"]
    return gradient[None], (cast + zeros)[None]

  x = np.arange(8, dtype=np.float32)
  call = jax.shard_map(region, mesh=mesh, in_specs=(P(), P(ALL)), out_specs=P(ALL))
  gradients, values = jax.jit(call)(jnp.float32(3.0), x)
  np.testing.assert_array_equal(gradients, x)  # each device its own share
  np.testing.assert_array_equal(values, np.full(8, 3.0))


def test_varying_like_does_nothing_outside_a_region():
  tree = {"a": jnp.ones(3)}
  assert collectives.varying_like(tree, jnp.ones(2))["a"] is tree["a"]
