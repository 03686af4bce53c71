"""Which experts serve which token, with what weight, and what uneven choices cost in the loss.

Computed in float32 whatever the model's dtype: a rounded logit flips a choice. Knows this device's
tokens; must not know how tokens travel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.parallel import collectives
from moe_jax.parallel.axes import EXPERT, TOKENS
from moe_jax.pipeline.saving import residual


class Routing(NamedTuple):
  """The choice for this device's T tokens.

  Attributes:
    experts_TK: the K chosen experts of each token, best first, int32.
    weights_TK: their weights, float32; over K they sum to 1, or less where `route` says so.
  """

  experts_TK: jax.Array
  weights_TK: jax.Array


class Limit(NamedTuple):
  """Each token's experts come from `groups_per_token` of `num_groups` equal groups, experts that
  follow each other: those of a host.
  """

  num_groups: int
  groups_per_token: int


class Statistics(NamedTuple):
  """What the auxiliary losses ask of this device's tokens, float32; summed over devices, it is of
  the micro-batch.

  Attributes:
    assigned_E: assignments of each expert, whole numbers; no gradient goes through them.
    probability_E: share of each expert in the mean probability.
    router_z: share of the mean square of the logits' log-sum.
  """

  assigned_E: jax.Array
  probability_E: jax.Array
  router_z: jax.Array


class Losses(NamedTuple):
  """This device's share of the two auxiliary losses; the sum over devices is the micro-batch's."""

  load_balance: jax.Array
  router_z: jax.Array


def route(
  kernel_DE: jax.Array,
  x_tD: jax.Array,
  num_choices: int,
  normalize_choices: bool = True,
  limit: Limit | None = None,
  bias_E: jax.Array | None = None,
) -> tuple[Routing, jax.Array]:
  """Returns the routing of tokens and the router's logits `logits_tE`.

  Softmax over all experts, then the `num_choices` largest, renormalised.

  Args:
    normalize_choices: whether they are renormalised, so that a token's weights sum to 1.
    limit: on the groups that a token's experts come from.
    bias_E: added to the logits for the choice alone: weights come from the logits without it, and
      no gradient reaches it.

  Returns:
    Chosen experts by falling biased logit, and the logits before limit and bias.

  Source: Mixtral (arXiv:2401.04088), section 2.1; renormalising a softmax over all experts equals
  the softmax over the chosen logits that it states. The bias: DeepSeek-V3 (arXiv:2412.19437),
  section 2.1.2, there on sigmoid scores; on logits it reaches rare experts as well as popular ones.
  """
  logits_tE = residual(
    jnp.einsum(
      "td,de->te", x_tD.astype(jnp.float32), kernel_DE, precision=jax.lax.Precision.HIGHEST
    )
  )
  ranking_tE = ranking(logits_tE, num_choices, limit, bias_E)
  chosen_tK, experts_tK = jax.lax.top_k(ranking_tE, num_choices)
  if bias_E is not None:
    chosen_tK = jnp.take_along_axis(logits_tE, experts_tK, 1)
  weights_tK = _WEIGHTS[normalize_choices](chosen_tK, logits_tE)
  return Routing(experts_tK.astype(jnp.int32), weights_tK), logits_tE


def ranking(
  logits_tE: jax.Array, num_choices: int, limit: Limit | None, bias_E: jax.Array | None
) -> jax.Array:
  """Returns `scores_tE` of which a token chooses the largest; arguments as of `route`."""
  if bias_E is not None:
    logits_tE = logits_tE + jax.lax.stop_gradient(bias_E)[None]
  return logits_tE if limit is None else limited(logits_tE, num_choices, limit)


def limit_to_hosts(ranks_per_host: int, hosts_per_token: int) -> Limit | None:
  """Returns the limit that a deployment sets, inside the region; None where `hosts_per_token` is 0.

  Args:
    ranks_per_host: consecutive ranks of `expert` that share a host, and so experts.
  """
  if not hosts_per_token:
    return None
  return Limit(jax.lax.axis_size(EXPERT) // ranks_per_host, hosts_per_token)


def limited(logits_tE: jax.Array, num_choices: int, limit: Limit) -> jax.Array:
  """Returns the logits, -inf in groups from which the token may not choose.

  A group counts by the probabilities of its best experts, as many as a token takes of each of its
  groups; those with the largest sums are allowed.

  Source: DeepSeek-V3 (arXiv:2412.19437), section 2.1.2, node-limited routing.
  """
  num_tokens, num_experts = logits_tE.shape
  of_each = min(-(-num_choices // limit.groups_per_token), num_experts // limit.num_groups)
  probability_tge = jax.nn.softmax(logits_tE).reshape(num_tokens, limit.num_groups, -1)
  score_tg = jax.lax.top_k(jax.lax.stop_gradient(probability_tge), of_each)[0].sum(-1)
  _, groups_tm = jax.lax.top_k(score_tg, limit.groups_per_token)
  group_E = jnp.arange(num_experts) // (num_experts // limit.num_groups)
  is_allowed_tE = (groups_tm[:, :, None] == group_E[None, None, :]).any(1)
  return jnp.where(is_allowed_tE, logits_tE, -jnp.inf)


def _among_chosen(chosen_tK, logits_tE):
  del logits_tE
  return jax.nn.softmax(chosen_tK, axis=-1)


def _among_all(chosen_tK, logits_tE):
  return jnp.exp(chosen_tK - jax.nn.logsumexp(logits_tE, axis=-1, keepdims=True))


_WEIGHTS = {True: _among_chosen, False: _among_all}


def assignments_per_expert(experts_tK: jax.Array, num_experts: int) -> jax.Array:
  """Returns how many of this device's assignments each expert was chosen for, int32 [E]."""
  is_expert_tKE = jax.nn.one_hot(experts_tK, num_experts, dtype=jnp.int32)
  return is_expert_tKE.sum((0, 1), dtype=jnp.int32)


def statistics(logits_tE: jax.Array, assigned_E: jax.Array) -> Statistics:
  """Returns the statistics of this device's tokens.

  Args:
    logits_tE: router logits.
    assigned_E: assignments per expert.
  """
  num_tokens = logits_tE.shape[0] * jax.lax.axis_size(TOKENS)
  log_sum_t = jax.nn.logsumexp(logits_tE, axis=-1)
  probability_E = jax.nn.softmax(logits_tE, axis=-1).sum(0) / num_tokens
  return Statistics(
    assigned_E=jax.lax.stop_gradient(assigned_E.astype(jnp.float32)),
    # XLA:GPU would make one kernel of these sums and of what joins them to the others, which it
    # cannot compile for some sizes.
    probability_E=jax.lax.optimization_barrier(probability_E),
    router_z=jnp.sum(log_sum_t**2) / num_tokens,
  )


def joined(one: Statistics, other: Statistics) -> Statistics:
  """Returns the statistics of tokens from those of two halves of them."""
  mean = lambda name: (getattr(one, name) + getattr(other, name)) / 2
  return Statistics(one.assigned_E + other.assigned_E, mean("probability_E"), mean("router_z"))


def auxiliary_losses(found: Statistics) -> Losses:
  """Returns this device's share of the load-balancing loss and the router z-loss, of one layer or
  of several in one message: leaves of `found` may have dimensions before their own.

  The statistics are those of the whole micro-batch, so every mesh computes the same loss. Only the
  counts need the other devices: the probabilities enter linearly, so each device contributes its
  own and the sum over devices is exact.

  Communication: for n layers all-to-all over `data`, (data - 1) * n * E elements; then all-to-all
  over `expert`, (X - 1) * n * E elements; then all-to-all over `tensor`, (tensor - 1) * n * E
  elements.

  Source: load balance, Switch Transformers (arXiv:2101.03961), equation 4, over K choices; z-loss,
  ST-MoE (arXiv:2202.08906), equation 5.
  """
  assigned_nE = jax.lax.stop_gradient(found.assigned_E).astype(jnp.int32)
  assigned_nE = collectives.sum_small(assigned_nE, TOKENS).astype(jnp.float32)
  num_experts = assigned_nE.shape[-1]
  fraction_nE = assigned_nE / assigned_nE.sum(-1, keepdims=True)
  return Losses(
    load_balance=num_experts * jnp.sum(fraction_nE * found.probability_E, -1),
    router_z=found.router_z,
  )
