"""Which experts serve which token, with what weight, and what uneven choices cost in the loss.

Computed in float32 whatever the model's dtype: a rounded logit flips a choice. Knows this device's
tokens; must not know how tokens travel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.parallel.axes import EXPERT, TENSOR


class Routing(NamedTuple):
  """The choice for this device's T tokens.

  Attributes:
    experts_TK: the K chosen experts of each token, best first, int32.
    weights_TK: their weights, summing to 1 over K, float32.
  """

  experts_TK: jax.Array
  weights_TK: jax.Array


class Losses(NamedTuple):
  """This device's share of the two auxiliary losses; the sum over devices is the micro-batch's."""

  load_balance: jax.Array
  router_z: jax.Array


def route(kernel_DE: jax.Array, x_tD: jax.Array, num_choices: int) -> tuple[Routing, jax.Array]:
  """Returns the routing of tokens and the router's logits `logits_tE`.

  Softmax over all experts, then the `num_choices` largest, renormalised.

  Source: Mixtral (arXiv:2401.04088), section 2.1; renormalising a softmax over all experts equals
  the softmax over the chosen logits that it states.
  """
  logits_tE = jnp.einsum(
    "td,de->te", x_tD.astype(jnp.float32), kernel_DE, precision=jax.lax.Precision.HIGHEST
  )
  chosen_tK, experts_tK = jax.lax.top_k(logits_tE, num_choices)
  return Routing(experts_tK.astype(jnp.int32), jax.nn.softmax(chosen_tK, axis=-1)), logits_tE


def assignments_per_expert(experts_tK: jax.Array, num_experts: int) -> jax.Array:
  """Returns how many of this device's assignments each expert was chosen for, int32 [E]."""
  is_expert_tKE = jax.nn.one_hot(experts_tK, num_experts, dtype=jnp.int32)
  return is_expert_tKE.sum((0, 1), dtype=jnp.int32)


def auxiliary_losses(logits_tE: jax.Array, assigned_E: jax.Array, num_choices: int) -> Losses:
  """Returns this device's share of the load-balancing loss and the router z-loss.

  The statistics are those of the whole micro-batch, so every mesh computes the same loss. Only the
  integer counts need the other devices: the probabilities enter linearly, so each device
  contributes its own and the sum over devices is exact.

  Args:
    logits_tE: router logits of this device's tokens.
    assigned_E: assignments of the whole micro-batch per expert, int32.

  Source: load balance, Switch Transformers (arXiv:2101.03961), equation 4, over K choices; z-loss,
  ST-MoE (arXiv:2202.08906), equation 5.
  """
  num_tokens, num_experts = logits_tE.shape
  num_tokens *= jax.lax.axis_size(EXPERT) * jax.lax.axis_size(TENSOR)
  fraction_E = assigned_E.astype(jnp.float32) / (num_tokens * num_choices)
  probability_E = jax.nn.softmax(logits_tE, axis=-1).sum(0) / num_tokens
  log_sum_t = jax.nn.logsumexp(logits_tE, axis=-1)
  return Losses(
    load_balance=num_experts * jnp.sum(fraction_E * probability_E),
    router_z=jnp.sum(log_sum_t**2) / num_tokens,
  )
