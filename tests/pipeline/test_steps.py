"""A layer cut where it communicates and multiplies: the same function, and what each step costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.parallel import collectives
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel.axes import ALL, EXPERT, TENSOR
from moe_jax.pipeline import steps

ROWS, WIDTH, HIDDEN = 16, 8, 32

FOUR = config.Mesh(expert=2, tensor=2)


def layer(weights, shared, x_bd, inputs):
  h_bD = collectives.gather(x_bd, TENSOR, 1)
  left, right = h_bD @ weights["left"], h_bD @ weights["right"]  # of one operand
  y_bd = collectives.reduce_scatter((left * right) @ weights["back"], TENSOR, 1)
  rows = collectives.exchange(y_bd.reshape(jax.lax.axis_size(EXPERT), -1, y_bd.shape[1]), EXPERT)
  count = jnp.sum(rows > 0, dtype=jnp.int32)
  small = jax.lax.psum(jnp.sum(rows), EXPERT)  # cuts nothing
  y_bd = x_bd + rows.reshape(y_bd.shape) * (shared["gain"] + inputs)[None]
  return y_bd, jnp.sum(y_bd) + collectives.varying(small), {"count": count}


def run(mesh_sizes, function):
  """Returns what `function(layer arguments)` makes inside a region on the mesh."""
  mesh = mesh_lib.make(mesh_sizes, jax.devices()[: mesh_sizes.num_devices])
  random = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  weights = {name: normal(WIDTH, HIDDEN) for name in ("left", "right")}
  weights["back"] = normal(HIDDEN, WIDTH)
  specs = {"left": P(None, TENSOR), "right": P(None, TENSOR), "back": P(TENSOR)}

  def region(weights, gain, x_bd, inputs):
    arguments = collectives.varying((weights, {"gain": gain}, x_bd, inputs))
    return jax.tree.map(lambda leaf: leaf[None], function(*arguments))

  program = jax.shard_map(
    region, mesh=mesh, in_specs=(specs, P(TENSOR), P(EXPERT, TENSOR), P(TENSOR)), out_specs=P(ALL)
  )
  return jax.jit(program)(weights, normal(WIDTH), normal(ROWS, WIDTH), normal(WIDTH))


def in_steps(*arguments):
  carry = arguments[2]
  for step in steps.cut(layer, arguments):
    carry = step.run(arguments[0], arguments[1], carry, arguments[3])
  return carry


def test_the_steps_one_after_another_are_the_layer():
  sizes = config.Mesh(expert=2, tensor=2)
  found, expected = run(sizes, in_steps), run(sizes, layer)
  for leaf, same in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(leaf, same)


def steps_of(layer, sizes=FOUR):
  """Returns the steps of a layer on a mesh."""
  found = []

  def keep(*arguments):
    found.extend(steps.cut(layer, arguments))
    return collectives.varying(jnp.zeros(()))

  run(sizes, keep)
  return found


def test_each_collective_and_each_group_of_products_is_a_step():
  cut = steps_of(layer)
  b, d, f = ROWS // 2, WIDTH // 2, HIDDEN // 2
  gather, products, back, scatter, exchange = cut
  assert (gather.inside_bytes, gather.between_bytes) == (b * d * 4, 0)
  assert products.flops == 2 * 2 * b * WIDTH * f and back.flops == 2 * b * f * WIDTH
  for silent in (products, back):
    assert (silent.inside_bytes, silent.between_bytes) == (0, 0)
  assert (scatter.inside_bytes, scatter.between_bytes) == (b * WIDTH * 4 / 2, 0)
  assert (exchange.inside_bytes, exchange.between_bytes) == (0, b * d * 4 / 2)
  # (weights, shared) in the order of their leaves: back, left, right, gain.
  assert [step.uses for step in cut] == [(), (1, 2), (0,), (), (3,)]


@pytest.mark.parametrize("sizes", [config.Mesh(), config.Mesh(stage=2)])
def test_a_layer_that_sends_nothing_is_one_step(sizes):
  found = steps_of(layer, sizes)
  assert len(found) == 1 and found[0].uses == (0, 1, 2, 3)


@jax.custom_vjp
def rounded(x_bd):
  return collectives.exchange(x_bd.astype(jnp.bfloat16), EXPERT).astype(x_bd.dtype)


rounded.defvjp(lambda x_bd: (rounded(x_bd), None), lambda _, g_bd: (g_bd,))


def test_a_collective_in_a_called_function_cuts_and_one_in_a_loop_does_not():
  def calling(weights, shared, x_bd, inputs):
    h_bf = jax.jit(lambda x_bd: collectives.gather(x_bd, TENSOR, 1))(x_bd) @ weights["left"]
    y_bd = collectives.reduce_scatter(h_bf @ weights["back"], TENSOR, 1)
    y_bd = jax.checkpoint(rounded)(y_bd)
    again = lambda y_bd, _: (collectives.exchange(y_bd, EXPERT), None)
    y_bd, _ = jax.lax.scan(again, y_bd, None, length=3)
    return y_bd, jnp.sum(y_bd), {}

  found = steps_of(calling)
  b, d = ROWS // 2, WIDTH // 2
  gather, _, _, scatter, exchange = found
  assert (gather.inside_bytes, gather.between_bytes) == (b * d * 4, 0)
  assert (scatter.inside_bytes, scatter.between_bytes) == (b * WIDTH * 4 / 2, 0)
  assert (exchange.inside_bytes, exchange.between_bytes) == (0, b * d * 2 / 2)


def test_a_collective_in_a_choice_by_platform_cuts_and_one_in_a_choice_by_data_does_not():
  def calling(weights, shared, x_bd, inputs):
    h_bf = collectives.gather(x_bd, TENSOR, 1) @ weights["left"]
    y_bd = collectives.reduce_scatter(h_bf @ weights["back"], TENSOR, 1)
    exchange = lambda y_bd: collectives.exchange(y_bd, EXPERT)
    y_bd = jax.lax.platform_dependent(y_bd, cuda=lambda y_bd: 2 * y_bd, default=exchange)
    y_bd = jax.lax.cond(jnp.sum(y_bd) > 0, exchange, lambda y_bd: y_bd, y_bd)
    return y_bd, jnp.sum(y_bd), {}

  found = steps_of(calling)
  b, d = ROWS // 2, WIDTH // 2
  assert [step.between_bytes for step in found] == [0, 0, 0, 0, b * d * 4 / 2]


def test_a_kernel_counts_what_it_says_of_itself():
  def kernel(x_ref, y_ref):  # its product is that of one program of a grid
    y_ref[...] = x_ref[...] @ x_ref[...].T @ x_ref[...]

  def calling(weights, shared, x_bd, inputs):
    x_bD = collectives.gather(x_bd, TENSOR, 1)
    varies = jax.typeof(x_bD).manual_axis_type
    y_bD = pl.pallas_call(
      kernel,
      out_shape=jax.ShapeDtypeStruct(x_bD.shape, x_bD.dtype, manual_axis_type=varies),
      cost_estimate=pl.CostEstimate(flops=1_000_000, transcendentals=0, bytes_accessed=0),
    )(x_bD)
    return collectives.reduce_scatter(y_bD, TENSOR, 1), jnp.sum(y_bD), {}

  found = steps_of(calling)
  assert sum(step.flops for step in found) == 1_000_000
