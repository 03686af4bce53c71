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
from moe_jax.moe import dropless, grouped
from moe_jax.moe.experts import Weights
from moe_jax.moe.plan import Plan, Setting
from moe_jax.moe.router import Routing, assignments_per_expert
from moe_jax.parallel.axes import EXPERT, TENSOR
from moe_jax.parallel.collectives import varying_like
from moe_jax.pipeline.saving import residual

most_rounds = dropless.most_rounds


class Places(NamedTuple):
  """Where rows lie, and what is sent besides them.

  Attributes:
    of_rows: as dropless has it, of e + H experts a rank: this device's, then the shadows.
    shadow_H: the experts whose weights are sent, E where there is none.
    shadows: these weights, leaves [H, ...], zeros where there is none; None until `hold`.
  """

  of_rows: Any
  shadow_H: jax.Array
  shadows: Weights | None = None


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
  everywhere_E = jax.lax.psum(assigned_E, (EXPERT, TENSOR))
  decision = stealing.decide(
    everywhere_E,
    stealing.held_once(num_experts, num_ranks),
    num_shadows,
    stealing.Price(shadow_s=setting.shadow_tokens, token_s=1.0),
  )
  home_A = expert_A // num_local

  def shared():
    sends_EX = stealing.even_sends(decision.quota_EX, assigned_E)
    rank_A = stealing.destinations(sends_EX, expert_A, _place_among_equals(expert_A, assigned_E))
    shadow_A = (expert_A[:, None] == decision.shadow_H[None]).argmax(1).astype(jnp.int32)
    return rank_A, jnp.where(rank_A == home_A, expert_A % num_local, num_local + shadow_A)

  # Where nothing is stolen, which is most of an even run, nothing is sorted for it either.
  is_stealing = (decision.shadow_H < num_experts).any()
  rank_A, place_A = jax.lax.cond(is_stealing, shared, lambda: (home_A, expert_A % num_local))
  is_home_A = rank_A == home_A
  place_TK = (rank_A * (num_local + num_shadows) + place_A).reshape(routing.experts_TK.shape)
  # To dropless every place of every rank is an expert.
  of_places = setting._replace(num_experts=num_ranks * (num_local + num_shadows))
  inner = dropless.plan(of_places, routing._replace(experts_TK=place_TK), logits_tE)
  stolen = jnp.sum(~is_home_A, dtype=jnp.int32)
  return inner._replace(
    expert_TK=routing.experts_TK,
    counts=inner.counts._replace(stolen=stolen),
    places=Places(inner.places, decision.shadow_H),
    assigned_E=everywhere_E,
  )


def hold(weights: Weights, plan: Plan) -> Plan:
  """Returns the plan with the shadows' weights, on every rank.

  Communication: all-reduce over `expert` of the weights of as many experts as there are shadows.
  """
  shadows = _sent(weights, plan.places.shadow_H)
  return plan._replace(places=plan.places._replace(shadows=shadows))


def _num_shadows(weights, shadow_H) -> jax.Array:
  num_experts = weights.gate_eDf.shape[0] * jax.lax.axis_size(EXPERT)
  return jnp.sum(shadow_H < num_experts, dtype=jnp.int32)


def _sent(weights, shadow_H) -> Weights:
  """Returns the weights of the shadows on every rank."""
  num_local = weights.gate_eDf.shape[0]
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
  return jax.lax.switch(_num_shadows(weights, shadow_H), branches, weights)


def compute(weights: Weights, plan: Plan, arrived: dropless.Arrived) -> jax.Array:
  """Returns this tensor rank's partial sums `rows_RD`.

  On a device that no shadow's rows reach, the shadows' weights are not touched: a stack of all
  places would be copied in every micro-batch, and its gradient taken apart.

  Communication: backward, if there are shadows, all-reduce over `expert` of their gradients; in
  every round, of which even ranks have one.
  """
  weights = varying_like(weights, arrived.rows_RD)
  _, shadow_H, shadows = plan.places
  return _compute(weights, shadow_H, shadows, arrived.rows_RD, arrived.groups)


@jax.custom_vjp
def _compute(weights, shadow_H, shadows, rows_RD, groups):
  return _forward(weights, shadow_H, shadows, rows_RD, groups)[0]


def _forward(weights, shadow_H, shadows, rows_RD, groups):
  y_RD, gate_NJf, up_NJf = jax.lax.cond(
    _has_shadow_rows(weights, groups),
    lambda: grouped.forward(_joined(weights, shadows), rows_RD, groups),
    lambda: grouped.forward(weights, rows_RD, _at_home(weights, groups)),
  )
  given = (weights, shadow_H, shadows, rows_RD, groups)
  return y_RD, (*given, residual(gate_NJf), residual(up_NJf))


def _backward(saved, gradient_RD):
  weights, shadow_H, shadows, rows_RD, groups, *hidden = saved
  num_local = weights.gate_eDf.shape[0]

  def of_all():
    joined = _joined(weights, shadows)
    gradients, dx_RD = grouped.backward(joined, rows_RD, groups, *hidden, gradient_RD)
    of_home = jax.tree.map(lambda d: d[:num_local], gradients)
    return of_home, jax.tree.map(lambda d: d[num_local:], gradients), dx_RD

  def of_home():
    at_home = _at_home(weights, groups)
    return grouped.backward(weights, rows_RD, at_home, *hidden, gradient_RD)

  def of_home_and_nothing():
    nothing = jax.tree.map(lambda s: varying_like(jnp.zeros(s.shape, s.dtype), rows_RD), shadows)
    gradients, dx_RD = of_home()
    return gradients, nothing, dx_RD

  def with_shadows():
    home, of_shadows, dx_RD = jax.lax.cond(
      _has_shadow_rows(weights, groups), of_all, of_home_and_nothing
    )
    (sent_home,) = jax.linear_transpose(lambda w: _sent(w, shadow_H), weights)(of_shadows)
    return jax.tree.map(jnp.add, home, sent_home), dx_RD

  gradients, dx_RD = jax.lax.cond(_num_shadows(weights, shadow_H) > 0, with_shadows, of_home)
  return gradients, None, None, dx_RD, None


_compute.defvjp(_forward, _backward)


def _has_shadow_rows(weights: Weights, groups) -> jax.Array:
  return groups.blocks_e[weights.gate_eDf.shape[0] :].sum() > 0


def _joined(weights: Weights, shadows: Weights) -> Weights:
  return jax.tree.map(lambda *parts: jnp.concatenate(parts), weights, shadows)


def _at_home(weights: Weights, groups):
  """Returns the groups of this device's own experts; those of shadows are the last."""
  num_local = weights.gate_eDf.shape[0]
  return groups._replace(first_e=groups.first_e[:num_local], blocks_e=groups.blocks_e[:num_local])


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
