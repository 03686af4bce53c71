"""The Mixture-of-Experts layer as three phases: dispatch, experts, combine.

Holds the layer's parameters and composes router, plan, exchange and experts. Knows this device's
tokens; must not know attention, layers before or after, or the pipeline.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.moe import capacity, dispatch, router
from moe_jax.moe.exchange import EXCHANGE
from moe_jax.moe.experts import swiglu
from moe_jax.parallel.axes import EXPERT, TENSOR
from moe_jax.parallel.parameters import parameter
from moe_jax.pipeline.saving import residual


class Experts(nnx.Module):
  """Parameters of all experts, SwiGLU: gate and up [E, D, F], down [E, F, D]."""

  def __init__(self, model: config.Model, rngs: nnx.Rngs):
    E, D, F = model.experts, model.d_model, model.expert_hidden
    self.gate = parameter(rngs, (E, D, F), ("experts", "model", "hidden"), fan_in=D)
    self.up = parameter(rngs, (E, D, F), ("experts", "model", "hidden"), fan_in=D)
    self.down = parameter(rngs, (E, F, D), ("experts", "hidden", "model"), fan_in=F)


class Router(nnx.Module):
  """Parameters of the router: kernel [D, E], float32 also in the computation."""

  def __init__(self, model: config.Model, rngs: nnx.Rngs):
    self.kernel = parameter(
      rngs, (model.d_model, model.experts), ("model", "all_experts"), fan_in=model.d_model,
      keep_float32=True,
    )  # fmt: skip


class Report(NamedTuple):
  """What one layer says of one micro-batch, not differentiated.

  Attributes:
    assigned_E: this device's assignments per expert before any drop, int32.
    counts: sent, kept, dropped, padded of this device, int32.
    losses: this device's share of each auxiliary loss, unweighted, float32.
  """

  assigned_E: jax.Array
  counts: dispatch.Counts
  losses: router.Losses


def moe(
  kernel: Router, experts: Experts, moe_config: config.Moe, num_choices: int, x_tD: jax.Array
) -> tuple[jax.Array, jax.Array, Report]:
  """Returns `y_tD`, this device's share of the weighted auxiliary loss, and the report.

  Communication: all-reduce of E integers over `expert` and `tensor`, and the exchange's, both ways.
  """
  num_experts = kernel.kernel.shape[1]
  exchange = EXCHANGE[moe_config.exchange]
  with jax.named_scope("dispatch"):
    routing, logits_tE = router.route(kernel.kernel[...], x_tD, num_choices)
    assigned_E = router.assignments_per_expert(routing.experts_TK, num_experts)
    losses = router.auxiliary_losses(
      logits_tE, jax.lax.psum(assigned_E, (EXPERT, TENSOR)), num_choices
    )
    num_rows = capacity.rows_per_expert(
      x_tD.shape[0], num_choices, num_experts, moe_config.capacity_factor
    )
    plan = capacity.plan(jax.lax.stop_gradient(routing), num_experts, num_rows)
    rows_RD = dispatch.tokens_to_rows(x_tD, plan)
    rows_eRD = residual(exchange.to_experts(rows_RD.reshape(num_experts, num_rows, -1)))
  with jax.named_scope("experts"):
    rows_eRD = swiglu(experts.gate[...], experts.up[...], experts.down[...], rows_eRD)
  with jax.named_scope("combine"):
    rows_ECD = residual(exchange.to_tokens(rows_eRD))
    y_tD = dispatch.rows_to_tokens(rows_ECD.reshape(rows_RD.shape), routing.weights_TK, plan)
  auxiliary_loss = (
    moe_config.load_balance_weight * losses.load_balance
    + moe_config.router_z_weight * losses.router_z
  )
  report = Report(assigned_E, dispatch.count(plan), jax.tree.map(jax.lax.stop_gradient, losses))
  return y_tD, auxiliary_loss.astype(jnp.float32), report
