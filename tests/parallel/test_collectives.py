"""What each wrapper brings where, on eight devices; what it sends is held by tests/contracts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.parallel import collectives, messages
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel.axes import ALL, DATA, EXPERT, STAGE, TENSOR

ON_AXIS = {
  DATA: config.Mesh(data=4, expert=2),
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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_several_together_are_gathered_and_summed_as_each_alone(dtype):
  """At other dimensions, one of them counted from the last; other shapes."""
  mesh, dimensions = mesh_lib.make(ON_AXIS[DATA]), (0, -1, 1)
  random = np.random.default_rng(0)
  # Small integers, whose sums are exact in any order and dtype.
  arrays = [
    jnp.asarray(random.integers(-8, 8, (4, *shape)), dtype) for shape in ((8, 3), (5, 4), (2, 8, 6))
  ]

  def gathered(*mine):
    mine = [each[0] for each in mine]
    joined = messages.joined(messages.send_together(mine, DATA), mine, dimensions)
    alone = [collectives.gather(x, DATA, d) for x, d in zip(mine, dimensions, strict=True)]
    return joined, alone

  def summed(*mine):
    mine = [each[0] for each in mine]
    together = messages.reduce_scatter_together(mine, DATA, dimensions)
    alone = [collectives.reduce_scatter(x, DATA, d) for x, d in zip(mine, dimensions, strict=True)]
    return together, alone

  for function in (gathered, summed):
    stacked = lambda *mine, f=function: jax.tree.map(lambda x: x[None], f(*mine))
    region = jax.shard_map(stacked, mesh=mesh, in_specs=P(DATA), out_specs=P(DATA))
    together, alone = jax.jit(region)(*arrays)
    for one, other in zip(together, alone, strict=True):
      assert one.dtype == other.dtype == dtype
      np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("mesh", [(4, 2), (2, 4), (8, 1), (1, 8)])
def test_few_are_gathered_in_one_message_bit_by_bit(mesh, x):
  """Arrays of different widths, NaN and infinity among them; gradients of floats are summed."""
  on = mesh_lib.make(config.Mesh(expert=mesh[0], tensor=mesh[1]))
  every = P((EXPERT, TENSOR))
  tree = {
    "a": jnp.asarray(x, jnp.bfloat16).at[3, 1].set(jnp.nan),
    "b": jnp.asarray(x.reshape(16, 2, 2)).at[5, 0, 0].set(-jnp.inf),
    "c": jnp.arange(16, dtype=jnp.int32)[:, None] - 7,
  }
  both = lambda tree: messages.gather_few(tree, TENSOR, EXPERT)
  region = lambda function: jax.jit(
    jax.shard_map(function, mesh=on, in_specs=every, out_specs=every)
  )
  found = region(both)(tree)
  for name, whole in tree.items():
    expected = np.tile(np.asarray(whole), (8, *[1] * (whole.ndim - 1)))
    as_float = lambda a: np.asarray(a).astype(np.float32)  # numpy knows no NaN of bfloat16
    np.testing.assert_array_equal(as_float(found[name]), as_float(expected))
    assert found[name].dtype == whole.dtype

  def weighed(b, c):
    scale = 1.0 + jax.lax.axis_index((EXPERT, TENSOR)).astype(jnp.float32)
    loss = lambda b: scale * jnp.sum(jnp.sin(both({"b": b, "c": c})["b"]))
    return jax.grad(loss)(b)

  b = jnp.asarray(x)
  gradient = region(lambda b: weighed(b, jnp.ones(b.shape, jnp.int32)))(b)
  np.testing.assert_allclose(gradient, 36 * np.cos(x), rtol=1e-6)  # 1 + 2 + ... + 8


def test_sums_of_few_numbers_are_exact_and_all_of_floats(x):
  """Integers whose sums floats do not reach, negative ones too, over all eight devices."""
  mesh = mesh_lib.make(config.Mesh(expert=4, tensor=2))
  every = (EXPERT, TENSOR)
  counts = jnp.asarray([[2**28 - 3 * n, -(2**27) + n, 4095, 4096, -1, n] for n in range(8)])
  tree = {"counts": counts.astype(jnp.int32), "losses": jnp.asarray(x[:8])}
  region = lambda function: jax.shard_map(function, mesh=mesh, in_specs=P(every), out_specs=P())
  found = jax.jit(region(lambda tree: messages.sum_few(tree, every)))(tree)
  np.testing.assert_array_equal(found["counts"][0], np.asarray(counts).sum(0))
  assert found["counts"].dtype == jnp.int32
  np.testing.assert_allclose(found["losses"][0], x[:8].sum(0), rtol=1e-6)
  sums = str(jax.make_jaxpr(region(lambda tree: messages.sum_few(tree, every)))(tree)).split("\n")
  sums = [line for line in sums if "psum" in line]
  assert len(sums) == 3 and all("f32" in line.split("=")[0] for line in sums)


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
