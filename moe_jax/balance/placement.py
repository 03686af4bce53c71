"""When to move experts, and how few: the next placement from the present one, within a bound on
what moves, and only where it pays.

A slot *moves* when its rank did not hold the expert before: that is what has to be sent. Knows
loads and placements (`packing`); must not know models, devices or how weights travel.

Letters: X ranks, S slots of a rank, P = X * S.
"""

from typing import NamedTuple

import numpy as np

from moe_jax.balance import packing

# Exchanges on top of the present placement: (sweeps, pairs of ranks in each, None for all).
_EXCHANGES = ((1, 1), (4, 1), (16, 1), (2, None), (6, None))


class Cost(NamedTuple):
  """What a placement costs and earns, for `pays`.

  Attributes:
    slot_bytes: sent for a slot that moves: weights and optimizer state.
    link_bytes_per_s: into one rank.
    token_s: seconds of one token at one expert, forward and backward.
    horizon: micro-batches until the loads are looked at again.
  """

  slot_bytes: float
  link_bytes_per_s: float
  token_s: float
  horizon: int


class Change(NamedTuple):
  """A placement to go to.

  Attributes:
    expert_LP: the expert that each slot holds.
    moved_LP: the slots that are sent.
    gain_tokens: by how much the busiest ranks' loads shrink, summed over layers.
  """

  expert_LP: np.ndarray
  moved_LP: np.ndarray
  gain_tokens: float


def initial(num_layers: int, num_experts: int) -> np.ndarray:
  """Returns expert_LP with each expert once, neighbours on a rank."""
  return np.tile(np.arange(num_experts), (num_layers, 1))


def moved(before_LP: np.ndarray, after_LP: np.ndarray, num_ranks: int) -> np.ndarray:
  """Returns moved_LP, the slots of `after_LP` whose rank does not hold their expert yet."""
  before, after = (_by_rank(array, num_ranks) for array in (before_LP, after_LP))
  return ~(after[..., :, None] == before[..., None, :]).any(-1).reshape(after_LP.shape)


def busiest_moved(moved_LP: np.ndarray, num_ranks: int) -> int:
  """Returns how many slots the rank receives that receives most, over all layers."""
  return int(_by_rank(moved_LP, num_ranks).sum((0, 2)).max())


def align(
  before_LP: np.ndarray, after_LP: np.ndarray, num_ranks: int, *, num_hosts: int = 1
) -> np.ndarray:
  """Returns `after_LP` with hosts, ranks and slots renamed so that little moves.

  Ranks are alike, so what a plan gives to one may go to another: hosts first, then the ranks of a
  host, the largest overlap first. What stays on a rank stays in its slot.

  Args:
    before_LP: the present placement.
    after_LP: the planned one.
  """
  num_layers = len(before_LP)
  layer = np.arange(num_layers)[:, None]
  hosts = after_LP.reshape(num_layers, num_hosts, -1)
  name_LH = _match(before_LP.reshape(num_layers, num_hosts, -1), hosts)
  hosts = hosts[layer, name_LH]
  rows = lambda array: array.reshape(num_layers * num_hosts, num_ranks // num_hosts, -1)
  ranks = rows(hosts)
  name_hx = _match(rows(before_LP), ranks)
  after_LXS = ranks[np.arange(len(ranks))[:, None], name_hx].reshape(num_layers, num_ranks, -1)
  before_LXS = _by_rank(before_LP, num_ranks)
  same_LXSS = before_LXS[..., :, None] == after_LXS[..., None, :]
  # Stable sorts put what goes and what comes first, in order: the n-th comes where the n-th went.
  goes, comes = (np.argsort(same_LXSS.any(axis), -1, kind="stable") for axis in (-1, -2))
  num_moved = (~same_LXSS.any(-1)).sum(-1, keepdims=True)
  is_moved = np.arange(before_LXS.shape[-1]) < num_moved
  placed = before_LXS.copy()
  incoming = np.take_along_axis(after_LXS, comes, -1)
  outgoing = np.take_along_axis(before_LXS, goes, -1)
  np.put_along_axis(placed, goes, np.where(is_moved, incoming, outgoing), -1)
  return placed.reshape(after_LP.shape)


def rebalance(
  before_LP: np.ndarray,
  load_LE: np.ndarray,
  num_ranks: int,
  *,
  num_hosts: int = 1,
  num_groups: int = 1,
  most_moved: int | None = None,
) -> Change:
  """Returns the placement that evens `load_LE` best while at most `most_moved` slots move.

  Each layer may stay, exchange a few slots, or follow a plan made afresh; those that gain most for
  each slot moved come first.

  Args:
    before_LP: the present placement.
    load_LE: tokens expected at each expert.
    num_ranks: X.
    num_hosts, num_groups: as of `packing.plan`; with several hosts experts stay on theirs but where
      the plan is made afresh.
    most_moved: slots, over all layers; None for any number.
  """
  num_slots = before_LP.shape[1]
  fresh_LP = packing.plan(load_LE, num_slots, num_ranks, num_hosts=num_hosts, num_groups=num_groups)
  choices = [align(before_LP, fresh_LP, num_ranks, num_hosts=num_hosts)]
  if num_hosts == 1:
    slot_load_LP = packing.slot_loads(before_LP, load_LE)
    choices += [
      packing.swap(before_LP, slot_load_LP, num_ranks, sweeps, pairs)[0]
      for sweeps, pairs in _EXCHANGES
    ]
  peak = lambda expert_LP: packing.rank_loads(expert_LP, load_LE, num_ranks).max(1)
  moved_NLP = np.stack([moved(before_LP, after_LP, num_ranks) for after_LP in choices])
  gain_NL = peak(before_LP) - np.stack([peak(after_LP) for after_LP in choices])
  chosen_L = _choose(gain_NL, moved_NLP.sum(-1), np.inf if most_moved is None else most_moved)
  rows = np.arange(len(before_LP))
  goes = chosen_L >= 0
  after_LP = np.where(goes[:, None], np.stack(choices)[chosen_L, rows], before_LP)
  return Change(
    after_LP,
    moved_NLP[chosen_L, rows] & goes[:, None],
    float(gain_NL[chosen_L, rows][goes].sum()),
  )


def pays(change: Change, num_ranks: int, cost: Cost, num_rounds: int | None = None) -> bool:
  """Returns whether the change earns more until the horizon than it costs.

  It earns the time that the busiest rank of each layer gets shorter, in every micro-batch; it costs
  the time until the rank that receives most has received all, as if nothing hid it.

  Args:
    num_rounds: how many slots' time the exchange takes; by default those of that rank, as if none
      had to wait for others.
  """
  gain_s = change.gain_tokens * cost.token_s * cost.horizon
  if num_rounds is None:
    num_rounds = busiest_moved(change.moved_LP, num_ranks)
  return gain_s > num_rounds * cost.slot_bytes / cost.link_bytes_per_s


def _choose(gain_NL, moves_NL, most_moved):
  """Returns the choice of each layer, -1 to stay, the best gain for each slot moved first."""
  chosen_L, spent_L = np.full(gain_NL.shape[1], -1), np.zeros(gain_NL.shape[1])
  gained_L = np.zeros(gain_NL.shape[1])
  rate_NL = gain_NL / np.maximum(moves_NL, 1)
  for n, layer in np.argwhere(gain_NL > 0)[np.argsort(-rate_NL[gain_NL > 0], kind="stable")]:
    spent = spent_L.sum() - spent_L[layer] + moves_NL[n, layer]
    if gain_NL[n, layer] > gained_L[layer] and spent <= most_moved:
      chosen_L[layer], spent_L[layer] = n, moves_NL[n, layer]
      gained_L[layer] = gain_NL[n, layer]
  return chosen_L


def _match(before_LAi, after_LAi):
  """Returns name_LA: which part of `after` becomes part a, the pairs that share most first."""
  num_layers, num_parts, _ = before_LAi.shape
  num_experts = max(before_LAi.max(), after_LAi.max()) + 1
  layer, part = np.arange(num_layers)[:, None, None], np.arange(num_parts)[:, None]

  def has(array):
    has_LAE = np.zeros((num_layers, num_parts, num_experts), np.float32)
    has_LAE[layer, part, array] = 1
    return has_LAE

  shared_LAA = has(before_LAi) @ has(after_LAi).swapaxes(1, 2)
  name_LA, rows = np.zeros((num_layers, num_parts), np.int64), np.arange(num_layers)
  for _ in range(num_parts):
    here, there = np.divmod(shared_LAA.reshape(num_layers, -1).argmax(1), num_parts)
    name_LA[rows, here] = there
    shared_LAA[rows, here], shared_LAA[rows, :, there] = -1, -1
  return name_LA


def _by_rank(array_LP, num_ranks):
  return array_LP.reshape(len(array_LP), num_ranks, -1)
