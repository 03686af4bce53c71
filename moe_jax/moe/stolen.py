"""Dropless dispatch in which idle ranks take over what is too much for the busiest ones.

From the counts of the micro-batch all devices decide alike how many tokens of which expert each
rank serves (`balance.stealing`); the weights of at most H experts, the shadows, are sent to every
rank where they are multiplied, and their gradients are summed home by the transpose of that. A rank
has then e + H places for experts, and to `dropless`, which does all the rest, every place is an
expert of its own. What a token gets is what it gets without stealing.

Shadows are sent before anything is multiplied, and their gradients when everything is: sent one by
one in between, the rank that holds an expert and those that multiply it would wait for each other
in turn. Where nothing is stolen, another branch runs, in which nothing is kept or written for it.

Letters: A assignments, T x K; X ranks of `expert`; e experts of this device, H shadows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from moe_jax.balance import stealing
from moe_jax.moe import dropless, grouped, order
from moe_jax.moe.experts import Weights
from moe_jax.moe.plan import Plan, Setting
from moe_jax.moe.router import Routing, assignments_per_expert
from moe_jax.parallel.axes import EXPERT, TENSOR
from moe_jax.parallel.collectives import varying_like
from moe_jax.pipeline.buffers import put
from moe_jax.pipeline.saving import residual

most_rounds = dropless.most_rounds

# Name in a compiled program, whose text cannot say which runs or how often, the branches and in one
# of them the loops over shadows.
BRANCH_SCOPE, LOOP_SCOPE = "if_stolen", "shadows"


class Places(NamedTuple):
  """Where rows lie, and whose weights are sent besides them.

  Attributes:
    of_rows: as dropless has it, of e + H experts a rank: this device's, then the shadows.
    shadow_H: the experts whose weights are sent, E where there is none; those that are come first.
  """

  of_rows: Any
  shadow_H: jax.Array


def plan(setting: Setting, routing: Routing, ranking_tE: jax.Array) -> Plan:
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
  everywhere_E = varying_like(jax.lax.psum(assigned_E, (EXPERT, TENSOR)), assigned_E)
  price = stealing.Price(shadow_s=setting.shadow_tokens, token_s=1.0)
  home_A, own_A = jnp.divmod(expert_A, num_local)

  def shared():
    held_EX = stealing.held_once(num_experts, num_ranks)
    decision = stealing.decide(everywhere_E, held_EX, num_shadows, price)
    sends_EX = stealing.even_sends(decision.quota_EX, assigned_E)
    rank_A = stealing.destinations(sends_EX, expert_A, _place_among_equals(expert_A, assigned_E))
    is_home_A = rank_A == home_A
    shadow_A = (expert_A[:, None] == decision.shadow_H[None]).argmax(1).astype(jnp.int32)
    place_A = jnp.where(is_home_A, own_A, num_local + shadow_A)
    return decision.shadow_H, rank_A, place_A, jnp.sum(~is_home_A, dtype=jnp.int32)

  def alone():
    nothing_H = varying_like(jnp.full(num_shadows, num_experts, jnp.int32), everywhere_E)
    return nothing_H, home_A, own_A, varying_like(jnp.zeros((), jnp.int32), home_A)

  # Nothing is decided or sorted where nothing can be saved, which is most of an even run.
  load_X = everywhere_E.reshape(num_ranks, num_local).sum(1, dtype=jnp.int32)
  with jax.named_scope(BRANCH_SCOPE):
    shadow_H, rank_A, place_A, stolen = jax.lax.cond(stealing.may_pay(load_X, price), shared, alone)
  place_TK = (rank_A * (num_local + num_shadows) + place_A).reshape(routing.experts_TK.shape)
  # To dropless every place of every rank is an expert.
  of_places = setting._replace(num_experts=num_ranks * (num_local + num_shadows))
  inner = dropless.plan(of_places, routing._replace(experts_TK=place_TK), ranking_tE)
  return inner._replace(
    expert_TK=routing.experts_TK,
    tally=inner.tally._replace(stolen=stolen),
    places=Places(inner.places, shadow_H),
  )


def compute(weights: Weights, plan: Plan, arrived: dropless.Arrived) -> jax.Array:
  """Returns this tensor rank's partial sums `rows_RD`.

  Communication: for each shadow all-reduce over `expert` of its weights, forward and again
  backward, and backward of its gradients; in every round, of which even ranks have one.
  """
  weights = varying_like(weights, arrived.rows_RD)
  return _compute(weights, plan.places.shadow_H, arrived.rows_RD, arrived.groups)


@jax.custom_vjp
def _compute(weights, shadow_H, rows_RD, groups):
  return _forward(weights, shadow_H, rows_RD, groups)[0]


def _forward(weights, shadow_H, rows_RD, groups):
  shadows = _Shadows(weights, shadow_H)
  y_RD, gate_up_NJ2f = shadows.if_any(
    lambda: grouped.forward(shadows.joined(), rows_RD, groups),
    lambda: grouped.forward(weights, rows_RD, groups),
  )
  return y_RD, (weights, shadow_H, rows_RD, groups, residual(gate_up_NJ2f))


def _backward(saved, gradient_RD):
  weights, shadow_H, rows_RD, groups, gate_up_NJ2f = saved
  shadows = _Shadows(weights, shadow_H)

  def of_all():
    gradients, dx_RD = grouped.backward(
      shadows.joined(), rows_RD, groups, gate_up_NJ2f, gradient_RD
    )
    return shadows.home(gradients), dx_RD

  def of_own():
    return grouped.backward(weights, rows_RD, groups, gate_up_NJ2f, gradient_RD)

  dweights, dx_RD = shadows.if_any(of_all, of_own)
  return jax.tree.map(lambda d, w: d.astype(w.dtype), dweights, weights), None, dx_RD, None


_compute.defvjp(_forward, _backward)


class _Shadows:
  """The shadows of this micro-batch: fetches their weights, and sends their gradients home."""

  def __init__(self, weights: Weights, shadow_H: jax.Array):
    self.weights, self.shadow_H = weights, shadow_H
    self.num_local = len(weights.down_efD)
    num_experts = self.num_local * jax.lax.axis_size(EXPERT)
    self.number = jnp.sum(shadow_H < num_experts, dtype=jnp.int32)

  def if_any(self, shared, alone):
    """Returns what `shared` does where there are shadows, and what `alone` does where there are
    none.
    """
    with jax.named_scope(BRANCH_SCOPE):
      return jax.lax.cond(self.number > 0, shared, alone)

  def each(self, one, state):
    """Returns the state after `one(h, state)` of every shadow."""
    with jax.named_scope(LOOP_SCOPE):
      return jax.lax.fori_loop(0, self.number, one, state)

  def joined(self) -> Weights:
    """Returns the weights of this device's experts and of the shadows, [e + H, ...]."""

    def fetch(h, joined):
      place, is_mine = self._holder(h)
      mine = jax.tree.map(lambda w: jnp.where(is_mine, w[place], 0), self.weights)
      add = lambda all_e, w: put(all_e, self.num_local + h, w[None])
      return jax.tree.map(add, joined, _summed(mine))

    behind = lambda w: ((0, self.shadow_H.size), *[(0, 0)] * (w.ndim - 1))
    with_room = jax.tree.map(lambda w: jnp.pad(w, behind(w)), self.weights)
    return self.each(fetch, with_room)

  def home(self, gradients: Weights) -> Weights:
    """Returns the gradients of this device's experts, of all ranks' sums `gradients` [e + H, ...]
    for what `joined` returned.
    """

    def send(h, home):
      place, is_mine = self._holder(h)
      sent = jax.tree.map(
        lambda d, w: d[self.num_local + h].astype(w.dtype), gradients, self.weights
      )
      add = lambda home_e, d: home_e.at[place].add(jnp.where(is_mine, d, 0).astype(home_e.dtype))
      return jax.tree.map(add, home, _summed(sent))

    own = jax.tree.map(lambda d: d[: self.num_local], gradients)
    return self.each(send, own)

  def _holder(self, h):
    """Returns the place of the h-th among this device's experts, and whether it is one of them."""
    rank, place = jnp.divmod(self.shadow_H[h], self.num_local)
    return place, rank == jax.lax.axis_index(EXPERT)


def _summed(one: Weights) -> Weights:
  """Returns the sums over `expert` of one expert's matrices, which travel as one message: apart,
  each takes gloo as long as all.
  """
  flat, upright = ravel_pytree(one)
  return upright(varying_like(jax.lax.psum(flat, EXPERT), flat))


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
  _, place_A = order.by_key(expert_A)
  first_E = jnp.cumsum(assigned_E, dtype=jnp.int32) - assigned_E
  return place_A - first_E[expert_A]
