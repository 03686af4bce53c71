"""The Mixture-of-Experts layer as three phases: dispatch, experts, combine.

Holds the layer's parameters and composes router, dispatch and experts. Knows this device's tokens;
must not know how a dispatch works, attention, layers before or after, or the pipeline.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.balance.rules import RULES
from moe_jax.moe import plan as plans
from moe_jax.moe import rounds, router
from moe_jax.moe.dispatch import DISPATCH, Dispatch
from moe_jax.moe.exchange import EXCHANGE
from moe_jax.moe.experts import Stacked, Weights
from moe_jax.moe.plan import Plan
from moe_jax.parallel import collectives
from moe_jax.parallel.axes import TOKENS
from moe_jax.parallel.parameters import offset, parameter
from moe_jax.pipeline.saving import residual


class Experts(nnx.Module):
  """Parameters of all experts, SwiGLU: gate and up [E, D, 2, F], down [E, F, D]."""

  def __init__(self, model: config.Model, rngs: nnx.Rngs):
    E, D, F = model.experts, model.d_model, model.expert_hidden
    axes = ("experts", "model", "gate_up", "hidden")
    self.gate_up = parameter(rngs, (E, D, 2, F), axes, fan_in=D)
    self.down = parameter(rngs, (E, F, D), ("experts", "hidden", "model"), fan_in=F)


class Router(nnx.Module):
  """Parameters of the router, float32 also in the computation: kernel [D, E], and where the model
  has one the bias [E], which the choice of experts alone sees and no gradient reaches.
  """

  def __init__(self, model: config.Model, rngs: nnx.Rngs):
    self.kernel = parameter(
      rngs, (model.d_model, model.experts), ("model", "all_experts"), fan_in=model.d_model,
      keep_float32=True,
    )  # fmt: skip
    if model.router_bias:
      self.bias = offset((model.experts,), ("all_experts",))

  def choice_bias(self) -> jax.Array | None:
    """Returns the bias [E], or None where the model has none."""
    return self.bias[...] if hasattr(self, "bias") else None


class Report(NamedTuple):
  """What one layer says of one micro-batch, not differentiated.

  Attributes:
    assigned_E: this device's assignments per expert before any drop, int32.
    counts: of this device, but for `rounds`: those the first device alone counts, so that the sum
      over devices is their number; of copies, which may take unlike many, it is the first one's.
    measured: what the run's way to even the router asks of this device's tokens (balance.rules).
  """

  assigned_E: jax.Array
  counts: plans.Counts
  measured: Any


def moe(
  kernel: Router,
  experts: Experts,
  moe_config: config.Moe,
  num_choices: int,
  x_tD: jax.Array,
  normalize_choices: bool = True,
  stacked: Stacked | None = None,
) -> tuple[jax.Array, router.Statistics, Report]:
  """Returns `y_tD`, what `auxiliary_loss` asks of the layer, and the report.

  Args:
    stacked: where the same experts' weights lie in a stack, as `serve` takes it.

  Communication: the dispatch's, both ways.
  """
  rule = RULES[moe_config.router_balance]
  with jax.named_scope("dispatch"):
    limit = router.limit_to_hosts(moe_config.expert_ranks_per_host, moe_config.hosts_per_token)
    bias_E = kernel.choice_bias()
    routing, logits_tE = router.route(
      kernel.kernel[...], x_tD, num_choices, normalize_choices, limit, bias_E
    )
    ranking_tE = router.ranking(logits_tE, num_choices, limit, bias_E)
  weights = Weights(experts.gate_up[...], experts.down[...])
  y_tD, plan = serve(weights, moe_config, routing, ranking_tE, x_tD, stacked)
  # Statistics come last: no token waits for them.
  with jax.named_scope("dispatch"):
    assigned_E = router.assignments_per_expert(routing.experts_TK, logits_tE.shape[1])
    statistics = router.statistics(logits_tE, assigned_E)
    measured = rule.measure(*jax.lax.stop_gradient((bias_E, logits_tE)), num_choices)
  is_first = jax.lax.axis_index(TOKENS) == 0
  counts = plan.counts._replace(rounds=jnp.where(is_first, plan.num_rounds, 0))
  return y_tD, statistics, Report(assigned_E, counts, measured)


def auxiliary_loss(
  moe_config: config.Moe, statistics: router.Statistics
) -> tuple[jax.Array, router.Losses]:
  """Returns this device's share of the weighted auxiliary loss of n layers, a scalar, and of each
  loss of each layer, unweighted and not differentiated.

  Args:
    moe_config: with the weights.
    statistics: of each layer, leaves [n, ...].

  Communication: all-to-all over `data`, (data - 1) * n * E elements; then all-to-all over `expert`,
  (X - 1) * n * E elements; then all-to-all over `tensor`, (tensor - 1) * n * E elements.
  """
  losses = router.auxiliary_losses(statistics)
  total = moe_config.router_z_weight * losses.router_z.sum()
  if RULES[moe_config.router_balance].uses_loss:
    total += moe_config.load_balance_weight * losses.load_balance.sum()
  return total.astype(jnp.float32), jax.lax.stop_gradient(losses)


def serve(
  weights: Weights | Stacked,
  moe_config: config.Moe,
  routing: router.Routing,
  ranking_tE: jax.Array,
  x_tD: jax.Array,
  stacked: Stacked | None = None,
) -> tuple[jax.Array, Plan]:
  """Returns `y_tD`, what the experts make of tokens that are routed already, and the plan.

  Args:
    weights: of this device's experts; only dispatch entries that serve take those in a stack.
    routing: differentiated by its weights.
    ranking_tE: by which experts that were not chosen are ranked; not differentiated.
    stacked: where the same weights lie in a stack, not differentiated; of dispatch entries of
      `READ_IN_STACK`.

  Communication: the dispatch's, both ways, in each round.
  """
  entry = DISPATCH[moe_config.dispatch]
  setting = plans.Setting(
    *routing.experts_TK.shape,
    ranking_tE.shape[1],
    moe_config.capacity_factor,
    moe_config.spill,
    EXCHANGE[moe_config.exchange],
    moe_config.expert_ranks_per_host,
    moe_config.hosts_per_token,
    num_shadows=moe_config.shadows,
    shadow_tokens=moe_config.shadow_tokens,
  )
  with jax.named_scope("dispatch"):
    plan = entry.plan(setting, *jax.lax.stop_gradient((routing, ranking_tE)))
    # Where a layer is cut into steps, barriers type all that passes them as different on all
    # devices; what comes later must not count on more.
    plan = jax.tree.map(residual, collectives.varying_like(plan, x_tD))
    plan = plan._replace(stacked=stacked)
  one_round = functools.partial(_one_round, entry, setting)
  given = (x_tD, routing.weights_TK, weights)
  return rounds.run(one_round, given, plan, entry.most_rounds(setting)), plan


def _one_round(entry: Dispatch, setting: plans.Setting, given, plan: Plan, round_id):
  x_tD, weights_TK, weights = given
  with jax.named_scope("dispatch"):
    arrived = jax.tree.map(residual, entry.send(setting, x_tD, plan, round_id))
  with jax.named_scope("experts"):
    rows = entry.compute(weights, plan, arrived)
  with jax.named_scope("combine"):
    return entry.back(setting, rows, weights_TK, plan, round_id)
