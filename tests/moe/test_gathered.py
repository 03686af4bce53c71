"""Few tokens: experts that nobody chose are left out, tokens that chose nobody get nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.moe import few_tokens, gathered, layer
from moe_jax.moe.experts import Weights, swiglu
from moe_jax.moe.router import Routing
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel.axes import EXPERT, TENSOR
from tests.contracts import program
from tests.moe import served

E = served.NUM_EXPERTS
GATHERED = config.Moe(dispatch="gathered")


@pytest.mark.parametrize("mesh", [(1, 8), (2, 4), (8, 1)])
@pytest.mark.parametrize("load", served.LOADS)
def test_few_tokens_reach_their_experts(mesh, load):
  given = served.case(load, 8)  # one on each device: 16 assignments of 16 experts
  found = served.program(mesh, GATHERED)(*given)
  served.check(found[:2], served.loop(*given))


@pytest.mark.parametrize("num_tokens", [8, 256])
def test_what_chose_nobody_gets_nothing(num_tokens):
  given = served.case("even", num_tokens)
  is_real = np.arange(num_tokens)[:, None] % 4 == 1
  given = given._replace(experts_TK=jnp.where(jnp.asarray(is_real), given.experts_TK, E))
  found = served.program((2, 4), GATHERED)(*given)
  served.check(found[:2], served.loop(*given))
  assert not np.asarray(found.y_TD)[~is_real[:, 0]].any()


@pytest.mark.parametrize("num_tokens", [8, 256])
def test_experts_of_a_layer_are_read_out_of_the_stack(num_tokens):
  random = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  stack = Weights(normal(3, E, 8, 2, 6), normal(3, E, 6, 8))
  num_chose_e = np.arange(E) % 9  # nobody, few, more than few, all
  chose_eM = random.permuted(np.arange(num_tokens) < num_chose_e[:, None], axis=1)
  is_full = num_tokens == 256
  x_MD = normal(num_tokens, 8)
  arrived = gathered._Arrived(x_MD, None, None, None if is_full else jnp.asarray(chose_eM))
  found = gathered.compute_layer(stack, jnp.int32(1), arrived).rows_eMD
  of_layer = jax.tree.map(lambda w: w[1], stack)
  np.testing.assert_array_equal(found, gathered.compute(of_layer, None, arrived).rows_eMD)
  expected = swiglu(of_layer, jnp.broadcast_to(x_MD, (E, num_tokens, 8)))
  if is_full:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  else:
    np.testing.assert_allclose(found[chose_eM], expected[chose_eM], rtol=1e-5, atol=1e-5)
    assert not found[num_chose_e == 0].any()


def test_the_rule_is_of_tokens_and_of_bytes():
  assert few_tokens.is_cheaper(256, 512, 2)
  assert not few_tokens.is_cheaper(257, 512, 2)
  assert not few_tokens.is_cheaper(256, 2048, 2)


@pytest.mark.parametrize("mesh", [(1, 8), (2, 4), (8, 1)])
def test_it_sends_what_it_declares(mesh):
  X, tensor = mesh
  t, K, D, F = 3, served.NUM_CHOICES, 40, 16
  on = mesh_lib.make(config.Mesh(expert=X, tensor=tensor))
  struct = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)

  def region(experts_tK, weights_tK, logits_tE, x_tD, weights):
    return layer.serve(weights, GATHERED, Routing(experts_tK, weights_tK), logits_tE, x_tD)[0]

  weights_spec = Weights(P(EXPERT, None, None, TENSOR), P(EXPERT, TENSOR))
  run = jax.shard_map(
    region, mesh=on, in_specs=(*[served.EVERY] * 4, weights_spec), out_specs=served.EVERY
  )
  T = t * X * tensor
  given = (struct(T, K, dtype=jnp.int32), struct(T, K), struct(T, E), struct(T, D))
  weights = Weights(struct(E, D, 2, F), struct(E, F, D))
  found = program.summary(program.collectives(run, *given, weights, mesh=on))
  sizes = {"X": X, "tensor": tensor, "t": t, "K": K, "D": D}
  phases = (gathered.send, gathered.back)
  declared = [each for phase in phases for each in program.declared(phase, **sizes)]
  assert found == sorted(each for each in declared if each[2])
