"""The MoE layer on meshes, loads and exchanges: values, gradients, counts and auxiliary losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.moe import capacity
from moe_jax.moe import layer as moe_layer
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel import parameters
from moe_jax.parallel.axes import TOKENS
from tests.moe import dense

TOLERANCE = 1e-5  # relative L2, float32
MODEL = config.Model(d_model=12, experts=8, experts_per_token=2, expert_hidden=16)
NUM_TOKENS = 128
MESHES = [(1, 1), (2, 4), (8, 1), (1, 8), (4, 2)]
LOADS = ["even", "zipf", "one_hot", "an_empty_expert"]
DROPPING, ROOMY = 0.75, 4.0  # capacity factors; 4 = experts / experts_per_token
EVERY = P(TOKENS)


def arrays(load):
  """Returns (x_TD, kernel_DE, gate_EDF, up_EDF, down_EFD); the load comes from a constant input."""
  random = np.random.default_rng(0)
  D, E, F = MODEL.d_model, MODEL.experts, MODEL.expert_hidden
  normal = lambda *shape, std=1.0: random.normal(0, std, shape).astype(np.float32)
  x_TD, kernel_DE = normal(NUM_TOKENS, D), normal(D, E, std=0.5)
  x_TD[:, 0] = 1.0
  kernel_DE[0] = {
    "even": np.zeros(E),
    "zipf": -2 * np.log1p(np.arange(E)),
    "one_hot": np.where(np.arange(E) == 3, 6.0, 0.0),
    "an_empty_expert": np.where(np.arange(E) == 5, -50.0, 0.0),
  }[load]
  stds = (D**-0.5, D**-0.5, F**-0.5)
  shapes = ((E, D, F), (E, D, F), (E, F, D))
  return x_TD, kernel_DE, *(normal(*s, std=std) for s, std in zip(shapes, stds, strict=True))


def run(mesh, moe_config, weights, cotangent_TD):
  """Returns (y_TD, auxiliary loss, Report of each device, gradients of x and all weights)."""
  sizes = config.Mesh(expert=mesh[0], tensor=mesh[1])
  on = mesh_lib.make(sizes, jax.devices()[: sizes.num_devices])
  make = lambda module: nnx.split(nnx.eval_shape(lambda: module(MODEL, nnx.Rngs(0))))
  (router_graph, router), (experts_graph, experts) = make(moe_layer.Router), make(moe_layer.Experts)
  x_TD, kernel, gate, up, down = map(jnp.asarray, weights)
  fill = lambda state, values: jax.tree.unflatten(jax.tree.structure(state), values)
  # An nnx.State is flattened by name: down, gate_up.
  router, experts = fill(router, [kernel]), fill(experts, [down, jnp.stack([gate, up], 2)])

  def region(x_tD, router, experts):
    y_tD, statistics, report = moe_layer.moe(
      nnx.merge(router_graph, router), nnx.merge(experts_graph, experts),
      *(moe_config, MODEL.experts_per_token, x_tD),
    )  # fmt: skip
    of_one_layer = jax.tree.map(lambda leaf: leaf[None], statistics)
    auxiliary, _ = moe_layer.auxiliary_loss(moe_config, of_one_layer)
    # Device by device along a new axis.
    report = jax.tree.map(lambda leaf: leaf[None], report)
    return y_tD, auxiliary[None], report

  sharded = jax.shard_map(
    region, mesh=on,
    in_specs=(EVERY, parameters.specs(router), parameters.specs(experts)), out_specs=EVERY,
  )  # fmt: skip

  def loss(*trees):
    y_TD, auxiliary, report = sharded(*trees)
    return (y_TD * cotangent_TD).sum() + auxiliary.sum(), (y_TD, auxiliary.sum(), report)

  gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
  (_, (y_TD, auxiliary, report)), (gx, grouter, gexperts) = gradient(x_TD, router, experts)
  gdown, ggate_up = jax.tree.leaves(gexperts)
  ggate, gup = ggate_up.swapaxes(0, 2).swapaxes(1, 2)
  return y_TD, auxiliary, report, (gx, *jax.tree.leaves(grouter), ggate, gup, gdown)


def expect(mesh, moe_config, weights, cotangent_TD):
  """Returns the same from the dense formula, and what each device keeps, bool [devices, t, K]."""
  x_TD, kernel_DE = weights[:2]
  E, K, num_devices = MODEL.experts, MODEL.experts_per_token, mesh[0] * mesh[1]
  experts_TK, weights_TK = dense.route(x_TD, kernel_DE, K)
  here = NUM_TOKENS // num_devices
  num_rows = capacity.rows_per_expert(here, K, E, moe_config.capacity_factor)
  shares = (x.reshape(num_devices, here, K) for x in (experts_TK, weights_TK))
  kept = np.stack([dense.kept(*share, E, num_rows) for share in zip(*shares, strict=True)])
  counts_E = np.bincount(np.asarray(experts_TK).reshape(-1), minlength=E)

  def loss(x_TD, kernel_DE, *experts):
    y_TD = dense.layer(x_TD, kernel_DE, *experts, kept.reshape(NUM_TOKENS, K))
    logits_TE = x_TD @ kernel_DE
    fraction_E = jnp.asarray(counts_E / (NUM_TOKENS * K), jnp.float32)
    balance = E * jnp.sum(fraction_E * jax.nn.softmax(logits_TE, -1).mean(0))
    z = jnp.mean(jax.nn.logsumexp(logits_TE, -1) ** 2)
    auxiliary = moe_config.load_balance_weight * balance + moe_config.router_z_weight * z
    return (y_TD * cotangent_TD).sum() + auxiliary, (y_TD, auxiliary)

  gradient = jax.jit(jax.value_and_grad(loss, tuple(range(5)), has_aux=True))
  (_, (y_TD, auxiliary)), gradients = gradient(*weights)
  return y_TD, auxiliary, gradients, kept, counts_E, num_rows


CASES = [
  *((mesh, "zipf", factor, "hierarchical") for mesh in MESHES for factor in (DROPPING, ROOMY)),
  *(((2, 4), load, DROPPING, "hierarchical") for load in LOADS if load != "zipf"),
  *(((4, 2), "an_empty_expert", factor, "flat") for factor in (DROPPING, ROOMY)),
  ((2, 4), "zipf", DROPPING, "flat"),
]


@pytest.mark.parametrize(("mesh", "load", "factor", "exchange"), CASES)
def test_layer_equals_the_dense_formula(mesh, load, factor, exchange):
  moe_config = config.Moe(capacity_factor=factor, exchange=exchange)
  weights = arrays(load)
  cotangent_TD = np.random.default_rng(1).normal(size=weights[0].shape).astype(np.float32)
  y_TD, auxiliary, report, gradients = run(mesh, moe_config, weights, cotangent_TD)
  expected_TD, expected_auxiliary, expected, kept, counts_E, num_rows = expect(
    mesh, moe_config, weights, cotangent_TD
  )
  check("y", y_TD, expected_TD)
  check("auxiliary", auxiliary, expected_auxiliary)
  for name, each, expected_each in zip(
    ("x", "router", "gate", "up", "down"), gradients, expected, strict=True
  ):
    check(name, each, expected_each)

  counts = report.counts
  np.testing.assert_array_equal(counts.kept, kept.sum((1, 2)))
  np.testing.assert_array_equal(counts.sent, counts.kept + counts.spilled + counts.dropped)
  assert counts.rounds.sum() == 1 and counts.spilled.sum() == 0
  np.testing.assert_array_equal(counts.padded, num_rows * MODEL.experts - counts.kept)
  assert counts.sent.sum() == NUM_TOKENS * MODEL.experts_per_token
  assert (counts.dropped.sum() > 0) == (factor == DROPPING)
  np.testing.assert_array_equal(report.assigned_E.sum(0), counts_E)


@pytest.mark.parametrize(("mesh", "dispatch"), [((4, 2), "dropless"), ((2, 4), "dense")])
def test_layer_that_drops_nothing_equals_the_dense_formula(mesh, dispatch):
  weights = arrays("zipf")
  cotangent_TD = np.random.default_rng(1).normal(size=weights[0].shape).astype(np.float32)
  moe_config = config.Moe(dispatch=dispatch, capacity_factor=1.0)
  y_TD, auxiliary, report, gradients = run(mesh, moe_config, weights, cotangent_TD)
  roomy = config.Moe(capacity_factor=ROOMY)
  expected_TD, expected_auxiliary, expected, kept, counts_E, _ = expect(
    mesh, roomy, weights, cotangent_TD
  )
  assert kept.all()
  found = (y_TD, auxiliary, *gradients)
  for name, each, expected_each in zip(
    ("y", "auxiliary", "x", "router", "gate", "up", "down"),
    *(found, (expected_TD, expected_auxiliary, *expected)),
    strict=True,
  ):
    check(name, each, expected_each)
  assert report.counts.dropped.sum() == 0
  assert (report.counts.rounds.sum() > 1) == (dispatch == "dropless")
  np.testing.assert_array_equal(report.counts.rounds[1:], 0)  # counted on the first device
  np.testing.assert_array_equal(report.assigned_E.sum(0), counts_E)


@pytest.mark.parametrize("mesh", [(2, 4), (4, 2)])
def test_exchanges_give_equal_results(mesh):
  weights = arrays("zipf")
  cotangent_TD = np.random.default_rng(1).normal(size=weights[0].shape).astype(np.float32)
  results = [
    run(mesh, config.Moe(capacity_factor=DROPPING, exchange=name), weights, cotangent_TD)
    for name in ("hierarchical", "flat")  # float8 rounds: tests/moe/test_exchange.py
  ]
  first = jax.tree.leaves(results[0])
  for other in results[1:]:
    for a, b in zip(first, jax.tree.leaves(other), strict=True):
      assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(a)


def check(name, found, expected):
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  assert found.shape == expected.shape
  assert np.linalg.norm(found - expected) <= TOLERANCE * np.linalg.norm(expected), name


def test_routing_limited_to_hosts_reaches_the_layer():
  """4 ranks of `expert`, 2 on a host: whatever carries the rows serves the limited choice."""
  limit = {"expert_ranks_per_host": 2, "hosts_per_token": 1}
  weights = arrays("zipf")
  cotangent_TD = np.ones(weights[0].shape, np.float32)
  y_of = lambda **fields: run((4, 1), config.Moe(**fields), weights, cotangent_TD)[0]
  limited_TD = y_of(dispatch="two_level", capacity_factor=2.0, **limit)
  check("y", limited_TD, y_of(dispatch="dense", **limit))
  with pytest.raises(AssertionError):
    check("y", limited_TD, y_of(dispatch="dense"))
