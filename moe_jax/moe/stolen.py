"""Dropless dispatch in which idle ranks take over what is too much for the busiest ones.

From the counts of the micro-batch all devices decide alike how many tokens of which expert each
rank serves (`balance.stealing`); the weights of at most H experts, the shadows, are sent to every
rank for this micro-batch, and their gradients are summed home by the transpose of that. A rank has
then e + H places for experts, and to `dropless`, which does all the rest, every place is an expert
of its own. What a token gets is what it gets without stealing.

Letters: A assignments, T x K; X ranks of `expert`; e experts of this device, H shadows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.balance import stealing
from moe_jax.moe import dropless
from moe_jax.moe.experts import Weights
from moe_jax.moe.plan import Plan, Setting
from moe_jax.moe.router import Routing, assignments_per_expert
from moe_jax.parallel.axes import EXPERT, TENSOR
from moe_jax.parallel.collectives import varying_like
from moe_jax.pipeline.saving import residual

most_rounds, compute = dropless.most_rounds, dropless.compute


class Places(NamedTuple):
  """Where rows lie, as dropless has it; and shadow_H, the experts whose weights are sent, E where
  there is none.
  """

  of_rows: Any
  shadow_H: jax.Array


def plan(setting: Setting, routing: Routing, logits_tE: jax.Array) -> Plan:
  """Returns the plan: every assignment served as the router chose, some by another rank.

  Args:
    setting: with the most shadows, and their price.
    routing: every assignment has an expert.

  Communication: all-reduce over `expert` and `tensor` of E integers; and dropless' own, of e + H
  experts a rank.
  """
  num_ranks, num_experts = jax.lax.axis_size(EXPERT), setting.num_experts
  num_local, num_shadows = num_experts // num_ranks, setting.num_shadows
  expert_A = routing.experts_TK.reshape(-1)
  assigned_E = assignments_per_expert(routing.experts_TK, num_experts)
  decision = stealing.decide(
    jax.lax.psum(assigned_E, (EXPERT, TENSOR)),
    stealing.held_once(num_experts, num_ranks),
    num_shadows,
    stealing.Price(shadow_s=setting.shadow_tokens, token_s=1.0),
  )
  sends_EX = stealing.even_sends(decision.quota_EX, assigned_E)
  rank_A = stealing.destinations(sends_EX, expert_A, _place_among_equals(expert_A, assigned_E))
  shadow_A = (expert_A[:, None] == decision.shadow_H[None]).argmax(1).astype(jnp.int32)
  is_home_A = rank_A == expert_A // num_local
  place_A = jnp.where(is_home_A, expert_A % num_local, num_local + shadow_A)
  place_TK = (rank_A * (num_local + num_shadows) + place_A).reshape(routing.experts_TK.shape)
  # To dropless every place of every rank is an expert.
  of_places = setting._replace(num_experts=num_ranks * (num_local + num_shadows))
  inner = dropless.plan(of_places, routing._replace(experts_TK=place_TK), logits_tE)
  stolen = jnp.sum(~is_home_A, dtype=jnp.int32)
  return inner._replace(
    expert_TK=routing.experts_TK,
    counts=inner.counts._replace(stolen=stolen),
    places=Places(inner.places, decision.shadow_H),
  )


def hold(weights: Weights, plan: Plan) -> Weights:
  """Returns the weights of e + H places: this device's experts, then the shadows, zeros where there
  is none.

  Communication: all-reduce over `expert` of the weights of as many experts as there are shadows;
  backward the same of their gradients.
  """
  shadow_H, num_local = plan.places.shadow_H, weights.gate_eDf.shape[0]
  num_experts = num_local * jax.lax.axis_size(EXPERT)
  is_mine_H = shadow_H // num_local == jax.lax.axis_index(EXPERT)
  local_H = jnp.where(is_mine_H, shadow_H % num_local, 0)

  def first(num_shadows, weight):
    nothing = jnp.zeros((shadow_H.size - num_shadows, *weight.shape[1:]), weight.dtype)
    nothing = varying_like(nothing, weight)
    if not num_shadows:
      return nothing
    is_mine = is_mine_H[:num_shadows, None, None].astype(weight.dtype)
    sent = jax.lax.psum(weight[local_H[:num_shadows]] * is_mine, EXPERT)
    return jnp.concatenate([varying_like(sent, weight), nothing])

  # Those that there are come first.
  branches = [
    functools.partial(jax.tree.map, functools.partial(first, number))
    for number in range(shadow_H.size + 1)
  ]
  num_shadows = jnp.sum(shadow_H < num_experts, dtype=jnp.int32)
  shadows = jax.lax.switch(num_shadows, branches, weights)
  return jax.tree.map(lambda w, s: jnp.concatenate([w, residual(s)]), weights, shadows)


def send(setting: Setting, x_tD: jax.Array, plan: Plan, round_id: jax.Array | int):
  """Returns what `dropless.send` does.

  Communication: its own.
  """
  return dropless.send(setting, x_tD, _of_rows(plan), round_id)


def back(
  setting: Setting,
  rows_RD: jax.Array,
  weights_TK: jax.Array,
  plan: Plan,
  round_id: jax.Array | int,
) -> jax.Array:
  """Returns what `dropless.back` does.

  Communication: its own.
  """
  return dropless.back(setting, rows_RD, weights_TK, _of_rows(plan), round_id)


def _of_rows(plan: Plan) -> Plan:
  return plan._replace(places=plan.places.of_rows)


def _place_among_equals(expert_A, assigned_E):
  """Returns each assignment's place among those of its expert, in the order of the tokens."""
  number_A = jnp.arange(expert_A.size, dtype=jnp.int32)
  sorted_expert_A, order_A = jax.lax.sort((expert_A, number_A), num_keys=2)
  first_E = jnp.cumsum(assigned_E, dtype=jnp.int32) - assigned_E
  place_A = number_A - first_E[sorted_expert_A]
  # Sorting by the entry's number undoes the first sort; a scatter would run row by row on CPU.
  return jax.lax.sort((order_A, place_A), num_keys=1)[1]
