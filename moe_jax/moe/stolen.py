"""Dropless dispatch in which idle ranks take over what is too much for the busiest ones.

From the counts of the micro-batch all devices decide alike how many tokens of which expert each
rank serves (`balance.stealing`); the weights of at most H experts, the shadows, are sent to every
rank for this micro-batch, and their gradients are summed home by the transpose of that. A rank has
then e + H places for experts, and to `dropless`, which does all the rest, every place is an expert
of its own. What a token gets is what it gets without stealing.

Letters: A assignments, T x K; X ranks of `expert`; e experts of this device, H shadows.
"""

import jax
import jax.numpy as jnp

from moe_jax.balance import stealing
from moe_jax.moe import dropless
from moe_jax.moe.experts import Weights
from moe_jax.moe.plan import Plan, Setting
from moe_jax.moe.router import Routing, assignments_per_expert
from moe_jax.parallel.axes import EXPERT, TENSOR
from moe_jax.parallel.collectives import varying_like

send, back, compute = dropless.send, dropless.back, dropless.compute


def places(setting: Setting, num_shadows: int) -> Setting:
  """Returns the setting in which every place of every rank is an expert."""
  return setting._replace(num_experts=setting.num_experts + jax.lax.axis_size(EXPERT) * num_shadows)


def plan(
  setting: Setting,
  routing: Routing,
  logits_tE: jax.Array,
  num_shadows: int,
  price: stealing.Price | None = None,
) -> tuple[Plan, jax.Array]:
  """Returns the plan, for `places(setting)` in all further calls, and shadow_H.

  Args:
    setting: of the layer's own experts.
    num_shadows: H.
    price: as of `stealing.decide`.

  Communication: all-reduce over `expert` and `tensor` of E integers, and dropless' own.
  """
  num_ranks, num_experts = jax.lax.axis_size(EXPERT), setting.num_experts
  num_local = num_experts // num_ranks
  expert_A = routing.experts_TK.reshape(-1)
  assigned_E = assignments_per_expert(routing.experts_TK, num_experts)
  decision = stealing.decide(
    jax.lax.psum(assigned_E, (EXPERT, TENSOR)),
    stealing.held_once(num_experts, num_ranks),
    num_shadows,
    price,
  )
  sends_EX = stealing.even_sends(decision.quota_EX, assigned_E)
  rank_A = stealing.destinations(sends_EX, expert_A, _place_among_equals(expert_A, assigned_E))
  shadow_H = decision.shadow_H
  shadow_A = (expert_A[:, None] == shadow_H[None]).argmax(1).astype(jnp.int32)
  is_home_A = rank_A == expert_A // num_local
  place_A = jnp.where(is_home_A, expert_A % num_local, num_local + shadow_A)
  place_TK = (rank_A * (num_local + num_shadows) + place_A).reshape(routing.experts_TK.shape)
  inner = dropless.plan(
    places(setting, num_shadows), routing._replace(experts_TK=place_TK), logits_tE
  )
  return inner._replace(expert_TK=routing.experts_TK), shadow_H


def most_rounds(setting: Setting) -> int:
  """Returns the rounds of the worst plan, the same as dropless'."""
  return dropless.most_rounds(setting)


def with_shadows(weights: Weights, shadow_H: jax.Array) -> Weights:
  """Returns the weights of e + H places: this device's experts, then the shadows.

  Communication: all-reduce over `expert` of H experts' weights where there is a shadow; backward
  the same of their gradients.
  """
  num_local = weights.gate_eDf.shape[0]
  rank = jax.lax.axis_index(EXPERT)
  is_mine_H = shadow_H // num_local == rank
  local_H = jnp.where(is_mine_H, shadow_H % num_local, 0)

  def sent(weights):
    def one(weight):
      mine = weight[local_H] * is_mine_H[:, None, None].astype(weight.dtype)
      return varying_like(jax.lax.psum(mine, EXPERT), weight)

    return jax.tree.map(one, weights)

  def nothing(weights):
    shape = lambda weight: (shadow_H.size, *weight.shape[1:])
    return jax.tree.map(lambda w: varying_like(jnp.zeros(shape(w), w.dtype), w), weights)

  num_experts = num_local * jax.lax.axis_size(EXPERT)
  shadows = jax.lax.cond((shadow_H < num_experts).any(), sent, nothing, weights)
  return jax.tree.map(lambda w, s: jnp.concatenate([w, s]), weights, shadows)


def _place_among_equals(expert_A, assigned_E):
  """Returns each assignment's place among those of its expert, in the order of the tokens."""
  number_A = jnp.arange(expert_A.size, dtype=jnp.int32)
  sorted_expert_A, order_A = jax.lax.sort((expert_A, number_A), num_keys=2)
  first_E = jnp.cumsum(assigned_E, dtype=jnp.int32) - assigned_E
  place_A = number_A - first_E[sorted_expert_A]
  # Sorting by the entry's number undoes the first sort; a scatter would run row by row on CPU.
  return jax.lax.sort((order_A, place_A), num_keys=1)[1]
