"""Dispatch for few tokens: all of them travel to every device, which computes its own experts.

No rows, no sorting, no rounds: a message to each device and one back, whatever the routing, where
the exchanges of the others send padded buffers. It pays while the experts' time is that of reading
their weights (`few_tokens.is_cheaper`). The weights of an expert that no token chose are not read,
where that is likely: a loop passes it over, and kernels, which serve on GPUs, multiply another in
its place, or where choices are few those alone.

Letters: X devices of `expert`; M tokens of all devices of `expert` and `tensor`; e experts of this
device; f this tensor rank's share of the hidden units.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe import few_tokens, grouped_kernels
from moe_jax.moe import plan as plans
from moe_jax.moe.experts import Stacked, Weights, swiglu
from moe_jax.moe.plan import Plan, Setting
from moe_jax.moe.router import Routing
from moe_jax.parallel import collectives, messages
from moe_jax.parallel.axes import EXPERT, TENSOR
from moe_jax.pipeline.saving import residual

# An expert that no more tokens than this chose multiplies only theirs.
_FEW = 4


class _Arrived(NamedTuple):
  """Every token and what it chose, and where that is not mostly all, who chose each of this
  device's experts, else None.
  """

  x_MD: jax.Array
  experts_MK: jax.Array
  weights_MK: jax.Array
  chose_eM: jax.Array | None


class _Made(NamedTuple):
  """What was made of every token, and how it weighs that.

  Attributes:
    rows_iMD: of every token by expert i of this device, or by its i-th choice.
    serves_MKi: whether that is what a choice asked for.
    weights_MK: of the choices.
  """

  rows_iMD: jax.Array
  serves_MKi: jax.Array
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
  x_MD, experts_MK, weights_MK = messages.gather_few((x_tD, *plan.places), TENSOR, EXPERT)
  is_full = experts_MK.size >= few_tokens.FULL_LOAD * setting.num_experts
  num_mine = setting.num_experts // jax.lax.axis_size(EXPERT)
  chose_eM = None if is_full else _serves(num_mine, experts_MK).any(1).T
  return _Arrived(x_MD, experts_MK, weights_MK, chose_eM)


def compute(weights: Weights | Stacked, plan: Plan, arrived: _Arrived) -> _Made:
  """Returns this tensor rank's partial sums; zero for an expert that nobody chose.

  Weights in a stack are not differentiated.
  """
  del plan
  if isinstance(weights, Weights):
    stacked = Stacked(jax.tree.map(lambda w: w[None], weights), 0)
    rows_eMD = _products(stacked, arrived)
  elif arrived.experts_MK.size <= weights.num_experts:
    return _compute_choices(weights, arrived)
  else:
    stacked = weights
    rows_eMD = jax.lax.platform_dependent(
      stacked, arrived, cuda=_every_expert_by_kernels, default=_products
    )
  return _Made(rows_eMD, _serves(stacked.num_experts, arrived.experts_MK), arrived.weights_MK)


def _compute_choices(stacked: Stacked, arrived: _Arrived) -> _Made:
  """Returns rows of choices alone, which are no more than the experts of this device."""
  num_experts, num_choices = stacked.num_experts, arrived.experts_MK.shape[1]
  place_MK = arrived.experts_MK - jax.lax.axis_index(EXPERT) * num_experts
  is_mine_MK = (place_MK >= 0) & (place_MK < num_experts)
  rows_KMD = jax.lax.platform_dependent(
    stacked, jnp.where(is_mine_MK, place_MK, 0).T, arrived,
    cuda=_choices_by_kernels, default=_choices_by_products,
  )  # fmt: skip
  serves_MKK = is_mine_MK[..., None] & jnp.eye(num_choices, dtype=bool)[None]
  return _Made(rows_KMD, serves_MKK, arrived.weights_MK)


def _choices_by_kernels(stacked: Stacked, place_KM, arrived: _Arrived, interpret=False):
  x_MD = arrived.x_MD
  x_A1D = jnp.broadcast_to(x_MD, (*place_KM.shape, x_MD.shape[1])).reshape(-1, 1, x_MD.shape[1])
  rows_A1D = _kernels(stacked, x_A1D, place_KM.reshape(-1), interpret)
  return rows_A1D.reshape(*place_KM.shape, -1)


def _choices_by_products(stacked: Stacked, place_KM, arrived: _Arrived):
  token_M = jnp.arange(place_KM.shape[1], dtype=jnp.int32)
  return _products(stacked, arrived)[place_KM, token_M]


def _every_expert_by_kernels(stacked: Stacked, arrived: _Arrived, interpret=False) -> jax.Array:
  """Returns `rows_eMD`, of every token by every expert that anyone chose; others are finite."""
  expert_e = jnp.arange(stacked.num_experts, dtype=jnp.int32)
  if arrived.chose_eM is not None:
    # To branch takes as long as to read an expert: in place of one that nobody chose another is
    # multiplied, which is on the chip already.
    is_chosen_e = arrived.chose_eM.any(1)
    expert_e = jnp.where(is_chosen_e, expert_e, jnp.argmax(is_chosen_e).astype(jnp.int32))
  x_eMD = jnp.broadcast_to(arrived.x_MD, (stacked.num_experts, *arrived.x_MD.shape))
  return _kernels(stacked, x_eMD, expert_e, interpret)


def _kernels(stacked: Stacked, x_iRD: jax.Array, expert_i: jax.Array, interpret) -> jax.Array:
  """Returns `rows_iRD`, the rows of each i by its expert."""
  tile, (groups, R, D) = grouped_kernels.TILE, x_iRD.shape
  blocks, nowhere = -(-R // tile), 2 * groups * R
  row_iR = jnp.arange(groups * R, dtype=jnp.int32).reshape(groups, R)
  row_NJ = jnp.pad(row_iR, ((0, 0), (0, blocks * tile - R)), constant_values=nowhere)
  y_RD, _ = grouped_kernels.forward(
    stacked, x_iRD.reshape(-1, D), row_NJ.reshape(-1, tile), jnp.repeat(expert_i, blocks),
    jnp.array([0, groups * blocks], jnp.int32), interpret=interpret,
  )  # fmt: skip
  return y_RD.reshape(groups, R, D)


def _products(stacked: Stacked, arrived: _Arrived) -> jax.Array:
  """Returns `rows_eMD`, of every token by every expert, as far as anyone asks for them."""
  x_MD = arrived.x_MD
  if arrived.chose_eM is not None:
    return _chosen(stacked, x_MD, arrived.chose_eM)
  return swiglu(stacked.cut(), jnp.broadcast_to(x_MD, (stacked.num_experts, *x_MD.shape)))


def _chosen(stacked: Stacked, x_MD: jax.Array, chose_eM: jax.Array):
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
      weights = jax.tree.map(lambda w: w[stacked.layer, e][None], stacked.stack)
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
  del setting, plan, round_id
  serves_MKi = made.serves_MKi.astype(weights_TK.dtype)
  weight_Mi = jnp.einsum("mk,mki->mi", _there(weights_TK, made.weights_MK), serves_MKi)
  rows_iMD = residual(made.rows_iMD)
  y_MD = jnp.einsum("mi,imd->md", weight_Mi, rows_iMD.astype(weights_TK.dtype))
  return messages.reduce_scatter_few(y_MD, TENSOR, EXPERT).astype(rows_iMD.dtype)


@jax.custom_vjp
def _there(weights_TK: jax.Array, weights_MK: jax.Array) -> jax.Array:
  """Returns `weights_MK`, which are `weights_TK` of all devices and came with the tokens; what the
  gradient asks of them goes home to `weights_TK`.
  """
  del weights_TK
  return weights_MK


def _there_backward(_, d_MK):
  return messages.reduce_scatter_few(d_MK, TENSOR, EXPERT), jnp.zeros_like(d_MK)


_there.defvjp(lambda weights_TK, weights_MK: (weights_MK, None), _there_backward)


def _serves(num_mine: int, experts_MK):
  """Returns [M, K, e]: whether the assignment is of this device's expert; nobody's is of none."""
  mine_e = jax.lax.axis_index(EXPERT) * num_mine + jnp.arange(num_mine, dtype=jnp.int32)
  return experts_MK[..., None] == mine_e[None, None, :]
