"""The MoE layer as slow and obvious numpy and dense jax: who is kept is a loop, the rest a formula.

Knows the meaning of capacity (rows per source device and expert, heaviest first); must not know
plans, rows or exchanges.
"""

import jax
import jax.numpy as jnp
import numpy as np


def kept(experts_TK, weights_TK, num_experts: int, num_rows: int) -> np.ndarray:
  """Returns which of one device's assignments have room, bool [T, K]: the heaviest of each expert,
  the earlier one of equals.
  """
  experts, weights = np.asarray(experts_TK), np.asarray(weights_TK)
  result = np.zeros(experts.shape, bool)
  for expert in range(num_experts):
    mine = [(-weights[t, k], t, k) for t, k in np.argwhere(experts == expert)]
    for _, t, k in sorted(mine)[:num_rows]:
      result[t, k] = True
  return result


def spilled(experts_TK, weights_TK, ranking_TE, num_rows: int) -> np.ndarray:
  """Returns who serves each of one device's assignments, int [T, K], E for nobody.

  What has no room asks down its token's ranking, all tokens a rank at a time, of each token the
  heaviest without an expert; an expert takes the heaviest that ask. Where the ranking is -inf none
  is asked.
  """
  experts, weights, scores = map(np.asarray, (experts_TK, weights_TK, ranking_TE))
  num_experts = scores.shape[1]
  served = np.where(kept(experts, weights, num_experts, num_rows), experts, num_experts)
  ranking = np.argsort(-scores, axis=1, kind="stable")
  for rank in range(experts.shape[1], num_experts):
    asking = []
    for t in range(len(experts)):
      is_none = np.isneginf(scores[t, ranking[t, rank]])
      waits_K = (served[t] == num_experts) & ~is_none
      waiting = [(-weights[t, k], t, k) for k in np.flatnonzero(waits_K)]
      asking += [min(waiting)] if waiting else []
    for _, t, k in sorted(asking):
      expert = ranking[t, rank]
      if (served == expert).sum() < num_rows:
        served[t, k] = expert
  return served


def route(x_TD, kernel_DE, num_choices: int):
  """Returns (experts_TK, weights_TK): the largest of a softmax over all experts, renormalised."""
  probability_TE = jax.nn.softmax(x_TD @ kernel_DE, axis=-1)
  weights_TK, experts_TK = jax.lax.top_k(probability_TE, num_choices)
  return experts_TK, weights_TK / weights_TK.sum(-1, keepdims=True)


def layer(x_TD, kernel_DE, gate_EDF, up_EDF, down_EFD, kept_TK):
  """Returns y_TD: every expert computes every token, and the kept assignments are summed."""
  experts_TK, weights_TK = route(x_TD, kernel_DE, kept_TK.shape[1])
  num_experts = kernel_DE.shape[1]
  hidden_ETF = jax.nn.silu(jnp.einsum("td,edf->etf", x_TD, gate_EDF)) * jnp.einsum(
    "td,edf->etf", x_TD, up_EDF
  )
  y_ETD = jnp.einsum("etf,efd->etd", hidden_ETF, down_EFD)
  kept_weights_TK = jnp.where(kept_TK, weights_TK, 0.0)
  chosen_TKE = jax.nn.one_hot(experts_TK, num_experts) * kept_weights_TK[..., None]
  return jnp.einsum("tke,etd->td", chosen_TKE, y_ETD)
