"""Few tokens: experts that nobody chose are left out, tokens that chose nobody get nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.moe import few_tokens, gathered, layer
from moe_jax.moe.experts import Stacked, Weights, swiglu
from moe_jax.moe.router import Routing
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel.axes import EXPERT, TENSOR
from tests.contracts import program
from tests.moe import served

E = served.NUM_EXPERTS
GATHERED = config.Moe(dispatch="gathered")


def sharded(region, mesh):
  """Returns `region` of tokens, choices, their weights, logits and experts, on a mesh."""
  sizes = config.Mesh(expert=mesh[0], tensor=mesh[1])
  weights_spec = Weights(P(EXPERT, None, None, TENSOR), P(EXPERT, TENSOR))
  return jax.shard_map(
    region,
    mesh=mesh_lib.make(sizes, jax.devices()[: sizes.num_devices]),
    in_specs=(*[served.EVERY] * 4, weights_spec),
    out_specs=served.EVERY,
  )


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


def stack_case(num_tokens, num_chose_e, width=8, num_hidden=6):
  """Returns a stack of three layers, the weights of the second, tokens, and who chose which expert:
  so many tokens each, any of them.
  """
  random = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  stack = Weights(normal(3, E, width, 2, num_hidden), normal(3, E, num_hidden, width))
  chose_eM = random.permuted(np.arange(num_tokens) < num_chose_e[:, None], axis=1)
  stacked = Stacked(stack, jnp.int32(1))
  return stacked, stacked.cut(), normal(num_tokens, width), chose_eM


def check_rows(found, expected):
  assert found.shape == expected.shape
  assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def every_row(weights, x_MD):
  return swiglu(weights, jnp.broadcast_to(x_MD, (E, *x_MD.shape)))


@pytest.mark.parametrize("num_tokens", [8, 256])
def test_experts_of_a_layer_are_read_out_of_the_stack(num_tokens):
  num_chose_e = np.arange(E) % 9  # nobody, few, more than few, all
  stacked, of_layer, x_MD, chose_eM = stack_case(num_tokens, num_chose_e)
  is_full = num_tokens == 256
  arrived = gathered._Arrived(x_MD, None, None, None if is_full else jnp.asarray(chose_eM))
  found, expected = gathered._products(stacked, arrived), every_row(of_layer, x_MD)
  if is_full:
    check_rows(found, expected)
  else:
    check_rows(found[chose_eM], expected[chose_eM])
    assert not found[num_chose_e == 0].any()


@pytest.mark.parametrize("sizes", [(64, 128), (6, 10)])  # whole tiles, and what is to be padded
@pytest.mark.parametrize("num_tokens", [3, 65])
@pytest.mark.parametrize("is_full", [False, True])
def test_kernels_interpreted_read_experts_out_of_the_stack(num_tokens, is_full, sizes):
  num_chose_e = np.arange(E) % 3  # some by nobody
  stacked, of_layer, x_MD, chose_eM = stack_case(num_tokens, num_chose_e, *sizes)
  chose_eM = np.ones_like(chose_eM) if is_full else chose_eM
  arrived = gathered._Arrived(x_MD, None, None, None if is_full else jnp.asarray(chose_eM))
  found = gathered._every_expert_by_kernels(stacked, arrived, interpret=True)
  expected = every_row(of_layer, x_MD)
  check_rows(found[chose_eM], expected[chose_eM])
  assert np.isfinite(found).all()


@pytest.mark.parametrize("sizes", [(64, 128), (6, 10)])
def test_choices_are_the_same_by_kernels_and_by_products(sizes):
  """Two tokens with two choices each, one expert chosen twice."""
  stacked, of_layer, x_MD, _ = stack_case(2, np.zeros(E), *sizes)
  experts_MK = jnp.array([[3, 9], [9, 14]], jnp.int32)
  chose_eM = (experts_MK[None] == jnp.arange(E)[:, None, None]).any(2)
  arrived = gathered._Arrived(x_MD, experts_MK, None, chose_eM)
  expected = every_row(of_layer, x_MD)[experts_MK.T, jnp.arange(2)]
  for found in (
    gathered._choices_by_kernels(stacked, experts_MK.T, arrived, interpret=True),
    gathered._choices_by_products(stacked, experts_MK.T, arrived),
  ):
    check_rows(found, expected)


@pytest.mark.parametrize("mesh", [(1, 1), (1, 8), (8, 1)])
@pytest.mark.parametrize("num_tokens", [8, 16, 256])
def test_what_serves_from_a_stack_is_what_serves_from_a_layer(mesh, num_tokens):
  """On one device 8 tokens make no more choices than there are experts."""
  given = served.case("even", num_tokens)
  is_real = np.arange(num_tokens)[:, None] % 4 != 1
  given = given._replace(experts_TK=jnp.where(jnp.asarray(is_real), given.experts_TK, E))

  def region(x_tD, experts_tK, weights_tK, logits_tE, weights):
    stack = jax.tree.map(lambda w: jnp.stack([jnp.full_like(w, jnp.nan), w]), weights)
    routing = Routing(experts_tK, weights_tK)
    return layer.serve(Stacked(stack, 1), GATHERED, routing, logits_tE, x_tD)[0]

  found = jax.jit(sharded(region, mesh))(*given[:-1])
  expected, _ = served.loop(*given)
  check_rows(np.asarray(found), np.asarray(expected))


def test_the_rule_is_of_tokens_and_of_bytes():
  assert few_tokens.is_cheaper(256, 512, 2)
  assert not few_tokens.is_cheaper(257, 512, 2)
  assert not few_tokens.is_cheaper(256, 2048, 2)


@pytest.mark.parametrize("mesh", [(1, 8), (2, 4), (8, 1)])
def test_it_sends_what_it_declares(mesh):
  X, tensor = mesh
  t, K, D, F = 3, served.NUM_CHOICES, 40, 16
  struct = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)

  def region(x_tD, experts_tK, weights_tK, logits_tE, weights):
    return layer.serve(weights, GATHERED, Routing(experts_tK, weights_tK), logits_tE, x_tD)[0]

  T = t * X * tensor
  given = (struct(T, D), struct(T, K, dtype=jnp.int32), struct(T, K), struct(T, E))
  weights = Weights(struct(E, D, 2, F), struct(E, F, D))
  run, on = sharded(region, mesh), mesh_lib.make(config.Mesh(expert=X, tensor=tensor))
  found = program.summary(program.collectives(run, *given, weights, mesh=on))
  sizes = {"X": X, "tensor": tensor, "t": t, "K": K, "D": D}
  phases = (gathered.send, gathered.back)
  declared = [each for phase in phases for each in program.declared(phase, **sizes)]
  assert found == sorted(each for each in declared if each[2])
