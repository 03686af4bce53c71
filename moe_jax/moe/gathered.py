"""Dispatch for few tokens: all of them travel to every device, which computes its own experts.

No rows, no sorting, no rounds: a message to each device and one back, whatever the routing, where
the exchanges of the others send padded buffers. It pays while the experts' time is that of reading
their weights (`few_tokens.is_cheaper`). An expert that no token chose is not computed, and its
weights are not read, where that is likely.

Letters: X devices of `expert`; M tokens of all devices of `expert` and `tensor`; e experts of this
device; f this tensor rank's share of the hidden units.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe import plan as plans
from moe_jax.moe.experts import Weights, swiglu
from moe_jax.moe.plan import Plan, Setting
from moe_jax.moe.router import Routing
from moe_jax.parallel import collectives
from moe_jax.parallel.axes import EXPERT, TENSOR
from moe_jax.pipeline.saving import residual

# Below this many assignments an expert some experts are likely to have none: exp(-4) is 2%.
_FULL_LOAD = 4
# An expert that no more tokens than this chose multiplies only theirs.
_FEW = 4


class _Arrived(NamedTuple):
  """Every token, what it chose, and who chose each of this device's experts; None where surely all
  are chosen.
  """

  x_MD: jax.Array
  experts_MK: jax.Array
  weights_MK: jax.Array
  chose_eM: jax.Array | None


class _Made(NamedTuple):
  """What experts made of every token, and how it weighs them."""

  rows_eMD: jax.Array
  experts_MK: jax.Array
  weights_MK: jax.Array


def plan(setting: Setting, routing: Routing, ranking_tE: jax.Array) -> Plan:
  """Returns the plan: every assignment served as the router chose."""
  del ranking_tE
  num_rows = setting.num_experts * setting.num_tokens
  # What crosses the end of a layer's step is typed as different on all devices.
  nothing_TK = collectives.varying_like(
    jnp.zeros(routing.experts_TK.shape, bool), routing.experts_TK
  )
  return plans.make(setting, routing.experts_TK, nothing_TK, num_rows, 1, routing)


def most_rounds(setting: Setting) -> int:
  """Returns 1: all tokens travel at once."""
  del setting
  return 1


def send(setting: Setting, x_tD: jax.Array, plan: Plan, round_id: jax.Array | int) -> _Arrived:
  """Returns the tokens of all devices, their choices and those choices' weights.

  Communication: all-gather over `tensor`, (tensor - 1) * t * (D + 2 * K) elements; then all-to-all
  over `expert`, (X - 1) * tensor * t * (D + 2 * K) elements, each of four bytes as two of two.
  """
  del round_id
  x_MD, experts_MK, weights_MK = collectives.gather_few((x_tD, *plan.places), TENSOR, EXPERT)
  is_full = experts_MK.size >= _FULL_LOAD * setting.num_experts
  chose_eM = None if is_full else _serves(setting, experts_MK).any(1).T
  return _Arrived(x_MD, experts_MK, weights_MK, chose_eM)


def compute(weights: Weights, plan: Plan, arrived: _Arrived) -> _Made:
  """Returns this tensor rank's partial sums; zero for an expert that nobody chose."""
  del plan
  return compute_layer(jax.tree.map(lambda w: w[None], weights), 0, arrived)


def compute_layer(stack: Weights, layer: jax.Array | int, arrived: _Arrived) -> _Made:
  """Returns what `compute` makes of the weights of one layer, read out of the stack of all layers.

  Args:
    stack: weights of this device's experts of several layers, leaves [L, e, ...].
    layer: which of them.
  """
  if arrived.chose_eM is None:
    x_eMD = jnp.broadcast_to(arrived.x_MD[None], (stack.down_efD.shape[1], *arrived.x_MD.shape))
    rows_eMD = swiglu(jax.tree.map(lambda w: w[layer], stack), x_eMD)
  else:
    rows_eMD = _chosen(stack, layer, arrived.x_MD, arrived.chose_eM)
  return _Made(rows_eMD, arrived.experts_MK, arrived.weights_MK)


def _chosen(stack: Weights, layer: jax.Array | int, x_MD: jax.Array, chose_eM: jax.Array):
  """Returns `rows_eMD`, of each expert the tokens that chose it; others are zero, or what it makes.

  An expert that nobody chose is skipped. Where few chose it, only their rows are multiplied: beside
  reading the weights, products with every token are no longer free on a processor.
  """
  zeros_MD = collectives.varying_like(jnp.zeros_like(x_MD), x_MD)
  num_few = min(_FEW, x_MD.shape[0])
  # Those who chose come first; behind them stand others, whose rows nobody will weigh.
  _, first_eP = jax.lax.top_k(chose_eM.astype(jnp.int32), num_few)
  count_e = jnp.sum(chose_eM, 1, dtype=jnp.int32)

  def expert(_, e):
    def run(x_mD):
      weights = jax.tree.map(lambda w: w[layer, e][None], stack)
      return swiglu(weights, x_mD[None])[0]

    few = lambda: zeros_MD.at[first_eP[e]].set(run(x_MD[first_eP[e]]), unique_indices=True)
    how = jnp.where(count_e[e] > num_few, 2, jnp.minimum(count_e[e], 1))
    return None, jax.lax.switch(how, [lambda: zeros_MD, few, lambda: run(x_MD)])

  return jax.lax.scan(expert, None, jnp.arange(chose_eM.shape[0], dtype=jnp.int32))[1]


def back(
  setting: Setting,
  made: _Made,
  weights_TK: jax.Array,
  plan: Plan,
  round_id: jax.Array | int,
) -> jax.Array:
  """Returns `y_tD`, the weighted sum of what each token's experts made of it.

  Communication: all-to-all over `expert`, (X - 1) * tensor * t * D elements; reduce-scatter over
  `tensor`, (tensor - 1) * t * D elements.
  """
  del plan, round_id
  serves_MKe = _serves(setting, made.experts_MK).astype(weights_TK.dtype)
  weight_Me = jnp.einsum("mk,mke->me", _there(weights_TK, made.weights_MK), serves_MKe)
  rows_eMD = residual(made.rows_eMD)
  y_MD = jnp.einsum("me,emd->md", weight_Me, rows_eMD.astype(weights_TK.dtype))
  return collectives.reduce_scatter_few(y_MD, TENSOR, EXPERT).astype(rows_eMD.dtype)


@jax.custom_vjp
def _there(weights_TK: jax.Array, weights_MK: jax.Array) -> jax.Array:
  """Returns `weights_MK`, which are `weights_TK` of all devices and came with the tokens; what the
  gradient asks of them goes home to `weights_TK`.
  """
  del weights_TK
  return weights_MK


def _there_backward(_, d_MK):
  return collectives.reduce_scatter_few(d_MK, TENSOR, EXPERT), jnp.zeros_like(d_MK)


_there.defvjp(lambda weights_TK, weights_MK: (weights_MK, None), _there_backward)


def _serves(setting: Setting, experts_MK):
  """Returns [M, K, e]: whether the assignment is of this device's expert; nobody's is of none."""
  num_experts = setting.num_experts // jax.lax.axis_size(EXPERT)
  mine_e = jax.lax.axis_index(EXPERT) * num_experts + jnp.arange(num_experts, dtype=jnp.int32)
  return experts_MK[..., None] == mine_e[None, None, :]
