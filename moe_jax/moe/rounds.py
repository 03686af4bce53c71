"""The sum over the rounds of a dispatch: the first always, further ones only where rows are left.

How many further rounds there are, the devices find out together while the program runs. Autodiff
does not go backwards through such a loop, and would keep what every round saved; here the backward
pass is a loop of its own that computes a round again and takes its gradient, so memory is that of
one round whatever their number. Knows a round as a function; must not know what it does.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.moe.plan import Plan
from moe_jax.parallel import collectives

Tree = Any

# Names in a compiled program, whose text cannot say how often it turns, the loop; and going back
# the choice round it whether there is anything to do, of which the first branch holds the loop.
SCOPE = "further_rounds"


def run(one_round: Callable, given: Tree, plan: Plan, most_rounds: int) -> jax.Array:
  """Returns the sum of `one_round(given, plan, round_id)` over the rounds of the plan.

  Args:
    one_round: holds no traced array; what is differentiated comes in `given`.
    given: a tree of floats.
    plan: its `num_rounds` is the same on all devices that a round talks to.
    most_rounds: of any plan; with 1 there is no loop in the program.
  """
  y = one_round(given, plan, 0)
  # The gradient of what is the same on several devices is summed over them: out here, for not all
  # of them run the loop equally often.
  given = collectives.varying_like(given, y)
  return y if most_rounds == 1 else _add_further(one_round, y, given, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_further(one_round, y, given, plan):
  more = lambda round_id: one_round(given, plan, round_id)
  return _sum_further(more, y, plan.num_rounds)


def _forward(one_round, y, given, plan):
  return _add_further(one_round, y, given, plan), (given, plan)


def _backward(one_round, saved, gradient):
  given, plan = saved

  def more(round_id):
    _, vjp = jax.vjp(lambda given: one_round(given, plan, round_id), given)
    return vjp(gradient)[0]

  nothing = jax.tree.map(
    lambda leaf: collectives.varying_like(jnp.zeros(leaf.shape, leaf.dtype), leaf), given
  )
  further = lambda: _sum_further(more, nothing, plan.num_rounds)
  # Mostly there are none: without a branch sums in float32 would be made, and copied, for nothing.
  with jax.named_scope(SCOPE):
    of_given = jax.lax.cond(plan.num_rounds <= 1, lambda: nothing, further)
  return gradient, of_given, None


_add_further.defvjp(_forward, _backward)


def _sum_further(more, start, num_rounds):
  """Returns `start` plus `more(round_id)` of rounds 1 and up, summed in float32."""

  def add(state):
    round_id, total = state
    total = jax.tree.map(lambda t, m: t + m.astype(t.dtype), total, more(round_id))
    return round_id + 1, total

  total = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), start)
  with jax.named_scope(SCOPE):
    _, total = jax.lax.while_loop(lambda state: state[0] < num_rounds, add, (jnp.int32(1), total))
  return jax.tree.map(lambda t, leaf: t.astype(leaf.dtype), total, start)
