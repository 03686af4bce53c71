"""A layer as two halves side by side: the same function, and exchanges beside products."""

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.parallel import collectives
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel.axes import ALL, EXPERT
from moe_jax.pipeline import paired, steps
from moe_jax.pipeline.functions import Functions, Halves

ROWS, WIDTH, HIDDEN = 32, 8, 4096
INSIDE = ()


def layer(weights, shared, x_bd, inputs_bd):
  sent_bh = (x_bd + inputs_bd) @ weights["out"]
  rows = collectives.exchange(sent_bh.reshape(jax.lax.axis_size(EXPERT), -1, HIDDEN), EXPERT)
  y_bd = jnp.tanh(rows.reshape(-1, HIDDEN) @ weights["back"]) * shared["gain"][None]
  return y_bd, jnp.sum(y_bd**2), {"count": jnp.sum(y_bd > 0, dtype=jnp.int32)}


def split(tree):
  halves = [jnp.split(leaf, 2) for leaf in jax.tree.leaves(tree)]
  return tuple(
    jax.tree.unflatten(jax.tree.structure(tree), half) for half in zip(*halves, strict=True)
  )


def merge(one, other):
  return one[0] + other[0], jax.tree.map(jnp.add, one[1], other[1])


HALVES = Halves(split, lambda one, other: jnp.concatenate([one, other]), merge)
FUNCTIONS = Functions(None, layer, None, None, None, halves=HALVES, inside=INSIDE)


def run(function):
  """Returns what `function(layer arguments)` makes inside a region of two devices."""
  mesh = mesh_lib.make(config.Mesh(expert=2), jax.devices()[:2])
  random = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  weights = {"out": normal(WIDTH, HIDDEN), "back": normal(HIDDEN, WIDTH) / HIDDEN}

  def region(weights, gain, x_bd, inputs_bd):
    arguments = collectives.varying((weights, {"gain": gain}, x_bd, inputs_bd))
    return jax.tree.map(lambda leaf: leaf[None], function(*arguments))

  program = jax.shard_map(
    region, mesh=mesh, in_specs=(P(), P(), P(EXPERT), P(EXPERT)), out_specs=P(ALL)
  )
  return jax.jit(program)(weights, normal(WIDTH), normal(ROWS, WIDTH), normal(ROWS, WIDTH))


def in_steps(*arguments):
  weights, shared, x, inputs = arguments
  carry = split(x)
  for step in paired.steps(FUNCTIONS, (weights, shared, carry, inputs)):
    carry = step.run(weights, shared, carry, inputs)
  return carry


def in_halves(weights, shared, x, inputs):
  (y, *found), (more_y, *more_found) = (layer(weights, shared, *h) for h in split((x, inputs)))
  return (y, more_y), *merge(found, more_found)


def test_the_steps_are_the_layer_of_either_half():
  found, expected = run(in_steps), run(in_halves)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_gradients_pass_through_the_steps():
  def gradient(function):
    loss = lambda given: sum(map(jnp.sum, jax.tree.leaves(function(*given)[:2])))
    return lambda *arguments: jax.grad(loss)(arguments)

  found, expected = run(gradient(in_steps)), run(gradient(in_halves))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), found, expected)


@pytest.fixture(scope="module")
def pairs():
  """The steps of the layer's half, and those of the pair."""
  found = []

  def look(weights, shared, x, inputs):
    half = split((x, inputs))[0]
    found.append(steps.cut(layer, (weights, shared, *half), inside=INSIDE))
    found.append(paired.steps(FUNCTIONS, (weights, shared, split(x), inputs)))
    return x

  run(look)
  return found[:2]


def test_all_is_done_twice(pairs):
  single, pair = pairs
  for name in ("flops", "made_bytes", "between_bytes", "num_equations"):
    assert sum(getattr(s, name) for s in pair) == 2 * sum(getattr(s, name) for s in single)
  assert {leaf for s in pair for leaf in s.uses} == {leaf for s in single for leaf in s.uses}


def test_while_one_half_exchanges_the_other_multiplies(pairs):
  single, pair = pairs
  exchanges = [s for s in pair if s.between_bytes]
  each = max(s.between_bytes for s in single)
  assert [s.between_bytes for s in exchanges] == [each, each]  # never both on the link at once
  assert all(s.flops for s in exchanges)


def test_the_first_half_is_through_before_the_second_sends_last():
  """So the next layer begins with it, beside that."""
  found = []

  def look(*arguments):
    jaxpr = jax.make_jaxpr(in_steps)(*arguments).jaxpr
    found.extend(num_exchanges_before(jaxpr, y) for y in jaxpr.outvars[:2])
    return arguments[2]

  run(look)
  assert found[:2] == [1, 2]


def num_exchanges_before(jaxpr, result):
  """Returns on how many exchanges a result waits."""
  wanted, number = {result}, 0
  for eqn in reversed(jaxpr.eqns):
    if wanted.isdisjoint(eqn.outvars):
      continue
    wanted.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
    number += steps.is_collective(eqn)
  return number
