"""Stealing carried out: values and every gradient as without it, and even ranks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config
from moe_jax.balance import stealing
from moe_jax.moe import plan as plans
from moe_jax.moe import rounds, stolen
from moe_jax.moe.exchange import EXCHANGE
from moe_jax.moe.router import Routing
from moe_jax.parallel import mesh as mesh_lib
from tests.moe import served

NUM_TOKENS, NUM_SHADOWS = 256, 3


def one_round(setting, given, plan, round_id):
  x_tD, weights_TK, weights = given
  rows = stolen.compute(weights, stolen.send(setting, x_tD, plan, round_id))
  return stolen.back(setting, rows, weights_TK, plan, round_id)


@functools.cache
def program(mesh, price=None):
  """Returns the jitted function of a Case's fields to y, gradients, rows of each rank, shadows."""
  sizes = config.Mesh(expert=mesh[0], tensor=mesh[1])

  def region(x_tD, experts_tK, weights_tK, logits_tE, weights):
    setting = plans.Setting(
      *experts_tK.shape, served.NUM_EXPERTS, 1.25, False, EXCHANGE["hierarchical"]
    )
    routing = Routing(experts_tK, weights_tK)
    plan, shadow_H = stolen.plan(
      setting, *jax.lax.stop_gradient((routing, logits_tE)), NUM_SHADOWS, price
    )
    weights = stolen.with_shadows(weights, shadow_H)
    inner = stolen.places(setting, NUM_SHADOWS)
    one = functools.partial(one_round, inner)
    y_tD = rounds.run(one, (x_tD, weights_tK, weights), plan, stolen.most_rounds(inner))
    rows = plan.places.arriving_Se.sum()[None]
    return y_tD, (rows, shadow_H[None], jax.tree.map(lambda count: count[None], plan.counts))

  every = served.EVERY
  sharded = jax.shard_map(
    region,
    mesh=mesh_lib.make(sizes, jax.devices()[: sizes.num_devices]),
    in_specs=(every, every, every, every, served._WEIGHTS_SPEC),
    out_specs=every,
  )

  def run(x_TD, experts_TK, weights_TK, logits_TE, weights, cotangent_TD):
    call = lambda x, w, weights: sharded(x, experts_TK, w, logits_TE, weights)
    y_TD, vjp, found = jax.vjp(call, x_TD, weights_TK, weights, has_aux=True)
    return y_TD, vjp(cotangent_TD), found

  return jax.jit(run)


@pytest.mark.parametrize("mesh", [(4, 2), (8, 1)])
@pytest.mark.parametrize("load", ["even", "zipf_1", "zipf_2", "one_hot", "all_to_one_device"])
def test_values_and_gradients_are_those_of_a_loop_over_experts(mesh, load):
  case = served.case(load, NUM_TOKENS, num_ranks=mesh[0])
  y_TD, gradients, (rows, shadow_H, counts) = program(mesh)(*case)
  served.check((y_TD, gradients), served.loop(*case))
  assert counts.dropped.sum() == 0 and counts.kept.sum() == counts.sent.sum()
  # Everybody decided alike, and a rank's tensor ranks see the same rows.
  assert (np.asarray(shadow_H) == np.asarray(shadow_H)[0]).all()
  rows_X = np.asarray(rows).reshape(mesh)[:, 0]
  assert rows_X.sum() == NUM_TOKENS * served.NUM_CHOICES
  # Quotas are met to a token for each source and expert that is split.
  slack = mesh[0] * mesh[1] * NUM_SHADOWS
  counts_E = jnp.bincount(case.experts_TK.ravel(), length=served.NUM_EXPERTS).astype(jnp.int32)
  holds_EX = stealing.held_once(served.NUM_EXPERTS, mesh[0])
  expected = stealing.decide(counts_E, holds_EX, NUM_SHADOWS)
  assert abs(rows_X.max() - int(expected.peak)) <= slack
  if load in ("zipf_2", "one_hot", "all_to_one_device"):
    assert int(expected.peak_before) >= 1.5 * rows_X.max()


def test_a_shadow_that_costs_more_than_it_saves_is_not_sent():
  case = served.case("zipf_2", NUM_TOKENS, num_ranks=4)
  price = stealing.Price(shadow_s=1.0, token_s=1e-6)
  y_TD, gradients, (_, shadow_H, _) = program((4, 2), price)(*case)
  assert (np.asarray(shadow_H) == served.NUM_EXPERTS).all()
  served.check((y_TD, gradients), served.loop(*case))
