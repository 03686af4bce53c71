"""Stealing carried out: values and every gradient as without it, even ranks, declared messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.balance import stealing
from moe_jax.moe import dropless, layer
from moe_jax.moe.exchange import EXCHANGE
from moe_jax.moe.router import Routing
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel.axes import EXPERT, TENSOR
from tests.contracts import program as contracts
from tests.moe import served

NUM_TOKENS, NUM_SHADOWS = 256, 3


@functools.cache
def program(mesh, shadow_tokens=0.0):
  """Returns the jitted function of a Case's fields to y, gradients, rows of each rank, shadows."""
  sizes = config.Mesh(expert=mesh[0], tensor=mesh[1])
  moe_config = config.Moe(dispatch="stealing", shadows=NUM_SHADOWS, shadow_tokens=shadow_tokens)

  def region(x_tD, experts_tK, weights_tK, logits_tE, weights):
    y_tD, plan = layer.serve(weights, moe_config, Routing(experts_tK, weights_tK), logits_tE, x_tD)
    rows = plan.places.of_rows.arriving_Se.sum()[None]
    counts = jax.tree.map(lambda count: count[None], plan.counts)
    return y_tD, (rows, plan.places.shadow_H[None], counts)

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


def decided(case, num_ranks, price):
  counts_E = jnp.bincount(case.experts_TK.ravel(), length=served.NUM_EXPERTS).astype(jnp.int32)
  holds_EX = stealing.held_once(served.NUM_EXPERTS, num_ranks)
  return stealing.decide(counts_E, holds_EX, NUM_SHADOWS, price)


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
  expected = decided(case, mesh[0], stealing.Price(0.0, 1.0))
  assert abs(rows_X.max() - int(expected.peak)) <= slack
  home_EX = stealing.held_once(served.NUM_EXPERTS, mesh[0])
  quota_EX = np.asarray(expected.quota_EX)
  assert abs(int(counts.stolen.sum()) - quota_EX[~home_EX].sum()) <= slack
  if load in ("zipf_2", "one_hot", "all_to_one_device"):
    assert int(expected.peak_before) >= 1.5 * rows_X.max()
    assert counts.stolen.sum() > 0
  if load == "even":
    assert counts.stolen.sum() == 0


def test_a_shadow_that_costs_more_than_it_saves_is_not_sent():
  case = served.case("zipf_2", NUM_TOKENS, num_ranks=4)
  y_TD, gradients, (_, shadow_H, counts) = program((4, 2), 1e6)(*case)
  assert (np.asarray(shadow_H) == served.NUM_EXPERTS).all()
  assert counts.stolen.sum() == 0
  served.check((y_TD, gradients), served.loop(*case))


@pytest.mark.parametrize("mesh", [(4, 2), (8, 1)])
def test_messages_are_those_declared(mesh):
  """Forward: dropless' own, one sum of counts, and in every round the shadows where there are any;
  the backward pass sends them again and sums their gradients.
  """
  sizes = config.Mesh(expert=mesh[0], tensor=mesh[1])
  on = mesh_lib.make(sizes, jax.devices()[: sizes.num_devices])
  moe_config = config.Moe(dispatch="stealing", shadows=NUM_SHADOWS, capacity_factor=1.0)
  X, tensor, E, D, F = *mesh, served.NUM_EXPERTS, served.WIDTH, served.NUM_HIDDEN
  given = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), served.case("even", NUM_TOKENS)
  )

  def call(x_tD, experts_tK, weights_tK, logits_tE, weights):
    return layer.serve(weights, moe_config, Routing(experts_tK, weights_tK), logits_tE, x_tD)[0]

  every = P((EXPERT, TENSOR))
  sharded = jax.shard_map(
    call, mesh=on, in_specs=(*[every] * 4, served._WEIGHTS_SPEC), out_specs=every
  )

  def both(x_TD, experts_TK, weights_TK, logits_TE, weights):
    forward = lambda weights: sharded(x_TD, experts_TK, weights_TK, logits_TE, weights)
    y_TD, vjp = jax.vjp(forward, weights)
    return vjp(y_TD)

  found = contracts.collectives(sharded, *given[:5], mesh=on)
  declared = lambda way, **s: [
    each for each in contracts.declared(way, X=X, tensor=tensor, **s) if each[2]
  ]
  hierarchical, n = EXCHANGE["hierarchical"], X * tensor
  rows = dropless.rows_per_rank(NUM_TOKENS // n, served.NUM_CHOICES, X, 1.0)
  sizes_sent = declared(hierarchical.to_experts, E=X, C=1, D=E // X + NUM_SHADOWS + 1)
  there = declared(hierarchical.to_experts, E=X, C=rows, D=D)
  back = declared(hierarchical.to_tokens, E=X, C=rows, D=D)
  both_axes, around = f"{EXPERT}+{TENSOR}", 2 * (n - 1) / n
  counts = [("all-reduce", both_axes, around * E)]
  # Gate, up and down of one shadow in one message, in a loop that turns for each.
  of_shadow = 3 * D * F // tensor
  sent = [("all-reduce", EXPERT, 2 * (X - 1) / X * of_shadow)]
  is_shadow = lambda c: c.kind == "all-reduce" and c.shape == (of_shadow,)
  at = lambda depth, shadows: contracts.summary(
    [c for c in found if c.num_loops == depth and is_shadow(c) == shadows]
  )
  assert at(0, False) == sorted([*sizes_sent, *there, *back, *counts])
  assert at(1, True) == sent
  assert at(1, False) == sorted([*there, *back])  # each further round
  assert at(2, True) == sent

  there_and_back = [c for c in contracts.collectives(both, *given[:5], mesh=on) if is_shadow(c)]
  # There; there again, and back. Of a further round nothing is kept, so its backward pass runs it
  # once more.
  assert [sum(c.num_loops == depth for c in there_and_back) for depth in (1, 2)] == [3, 4]
