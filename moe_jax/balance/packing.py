"""Which experts to hold twice, and which rank holds what, from the load alone: numpy, all layers at
once.

Replicas split their expert's tokens evenly; a rank's load is the sum over its slots. Slots lie rank
by rank: slot p is on rank p // (P / X). Two replicas of an expert never share a rank, where the
second would hold nothing that the first does not. Knows loads; must not know what moves or when.

Letters: X ranks, S slots of a rank, P = X * S.
"""

import functools
from collections.abc import Callable

import numpy as np

from moe_jax.balance import filling

_SWEEPS = 2
_CLOSE = 5e-4  # of the mean: what is this even is left alone
_LESS = 1 - 1e-9  # a gain below rounding is none
_LAST = 2**16 - 1  # sorts as a load of 0; the heaviest as 0
# How much of a mean rank a replica of a hot expert may fill, infinite for no bound. The smallest
# peak of a replica is not always the best: two of 0.6 do not fit on a rank that one of 0.95 would
# fill. Beside it the mean over the busiest rank that is good enough not to try.
_FILLS = ((0.95, 0.99), (np.inf, 0.99), (1.0, 0.98), (0.8, 0.97), (0.6, 0.97))
_LARGE = 0.5  # of a mean rank: a replica above it leaves no room for its like
_FEW = 4  # slots of a rank: with fewer there is little to even out what one row leaves
_LIGHT = 0.1  # of a mean rank: what is below evens out by exchanges, wherever it goes first
_SPLIT = 0.4  # of a mean rank: what is above is not split further for its own sake


def plan(
  load_LE: np.ndarray,
  num_slots: int,
  num_ranks: int,
  *,
  num_hosts: int = 1,
  num_groups: int = 1,
  sweeps: int = _SWEEPS,
) -> np.ndarray:
  """Returns expert_LP, the expert that each slot holds.

  With one host the packing is global. With several it is hierarchical: whole groups of experts go
  to hosts, so that a token whose router picks groups stays on few hosts; replicas stay on their
  expert's host.

  Args:
    load_LE: tokens expected at each expert, not negative.
    num_slots: P, of all ranks together, at least E.
    num_ranks: X.
    num_hosts: of X / num_hosts ranks each.
    num_groups: of E / num_groups neighbouring experts each.
    sweeps: of exchanges between ranks (`swap`) after a first packing; with 0 that is the greedy
      one, of one choice of replicas: the source's result where no rank would hold an expert twice.

  Raises:
    ValueError: the sizes do not divide, or there are more slots than distinct replicas.

  Source: DeepSeek-V3 (arXiv:2412.19437), section 3.4, and the README of deepseek-ai/EPLB, whose
  packing this is; parting replicas, exchanges, other numbers of replicas, and rows of experts of
  like load where none is hot, are added here.
  """
  load_LE = np.asarray(load_LE, np.float64)
  num_layers, num_experts = load_LE.shape
  _check(num_experts, num_slots, num_ranks, num_hosts, num_groups)
  group_load_LG = load_LE.reshape(num_layers, num_groups, -1).sum(-1)
  group_LG = _pack(
    group_load_LG, np.ones_like(group_load_LG, int), num_hosts, sweeps, filling.heaviest_first
  )
  size = num_experts // num_groups
  expert_LE = (group_LG[..., None] * size + np.arange(size)).reshape(num_layers * num_hosts, -1)
  layer = np.repeat(np.arange(num_layers), num_hosts)[:, None]
  load_he = load_LE[layer, expert_LE]  # rows are hosts of layers, e their experts
  ranks = num_ranks // num_hosts
  packed_hp = _best(load_he, num_slots // num_hosts, ranks, sweeps)
  return np.take_along_axis(expert_LE, packed_hp, 1).reshape(num_layers, num_slots)


def replicate(load_LE: np.ndarray, num_slots: int, num_ranks: int) -> np.ndarray:
  """Returns replicas_LE: how often each expert is held, at least once and at most on every rank, so
  that the load of the busiest replica is as low as it can be.

  Args:
    load_LE: tokens expected at each expert.
    num_slots: the sum of each row.
    num_ranks: X.
  """
  return _spread(load_LE, np.ones(load_LE.shape, np.int64), num_slots, num_ranks, np.inf)


def slot_loads(expert_LP: np.ndarray, load_LE: np.ndarray) -> np.ndarray:
  """Returns load_LP, the share of each slot in its expert's load, even among replicas."""
  each_LE = load_LE / np.maximum(replicas(expert_LP, load_LE.shape[1]), 1)
  return np.take_along_axis(each_LE, expert_LP, 1)


def rank_loads(expert_LP: np.ndarray, load_LE: np.ndarray, num_ranks: int) -> np.ndarray:
  """Returns load_LX, the load of each rank."""
  return slot_loads(expert_LP, load_LE).reshape(len(load_LE), num_ranks, -1).sum(-1)


def replicas(expert_LP: np.ndarray, num_experts: int) -> np.ndarray:
  """Returns replicas_LE, how many slots hold each expert."""
  num_layers = len(expert_LP)
  flat = expert_LP + np.arange(num_layers)[:, None] * num_experts
  return np.bincount(flat.ravel(), minlength=num_layers * num_experts).reshape(num_layers, -1)


def check(expert_LP: np.ndarray, num_experts: int, num_ranks: int) -> None:
  """Checks that every layer holds every expert, none of them twice on a rank.

  Raises:
    ValueError: it does not.
  """
  missing = np.argwhere(replicas(expert_LP, num_experts) == 0)
  if len(missing):
    layer, expert = missing[0]
    raise ValueError(
      f"no slot of layer {layer} holds expert {expert}, expected each of {num_experts} in at least"
      " one; make the placement with packing.plan"
    )
  sorted_LXS = np.sort(expert_LP.reshape(len(expert_LP), num_ranks, -1), -1)
  twice = np.argwhere(sorted_LXS[..., 1:] == sorted_LXS[..., :-1])
  if len(twice):
    layer, rank, slot = twice[0]
    raise ValueError(
      f"rank {rank} of layer {layer} holds expert {sorted_LXS[layer, rank, slot]} twice, expected"
      " replicas on different ranks; make the placement with packing.plan"
    )


def swap(
  expert_LP: np.ndarray,
  load_LP: np.ndarray,
  num_ranks: int,
  sweeps: int,
  pairs: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (expert_LP, load_LP) after exchanges of slots between ranks.

  A sweep pairs the busiest rank with the idlest, the second with the second idlest and so on; each
  pair exchanges those two slots that make it most even. No rank becomes busier than the busier of
  its pair was.

  Args:
    expert_LP: the expert in each slot.
    load_LP: the load of each slot.
    num_ranks: X.
    sweeps: at most; a layer that is even, or that a sweep does not change, is left alone.
    pairs: of ranks in a sweep, at most; by default all.
  """
  num_layers, num_rows = len(expert_LP), len(expert_LP) * num_ranks
  # Ranks are numbered through all layers and lie innermost: every operation runs along all of them.
  expert_SR, load_SR = (
    np.ascontiguousarray(a.reshape(num_rows, -1).T) for a in (expert_LP, load_LP)
  )
  expert, load, num_slots = expert_SR.reshape(-1), load_SR.reshape(-1), len(load_SR)
  num_pairs = min(num_ranks // 2, pairs or num_ranks)
  load_R = load_SR.sum(0)
  load_LX = load_R.reshape(num_layers, num_ranks)
  even_L, todo = load_LX.mean(1) * (1 + _CLOSE), np.arange(num_layers)
  buffer = np.empty((num_slots, num_slots, num_layers * num_pairs), np.float32)
  which_K1 = np.arange(num_slots**2, dtype=np.int32)[:, None]
  last_bits = 2 ** (num_slots**2 - 1).bit_length() - 1
  for _ in range(sweeps):
    todo = todo[load_LX[todo].max(1) > even_L[todo]]
    if not len(todo) or not num_pairs:
      break
    order_iX = np.argsort(load_LX[todo], axis=1, kind="stable") + (todo * num_ranks)[:, None]
    cold, hot = order_iX[:, :num_pairs].ravel(), order_iX[:, : -num_pairs - 1 : -1].ravel()
    half_gap = (load_R[hot] - load_R[cold]) / 2
    # How far off each exchange would be, in float32, its last bits replaced by which exchange it
    # is: so `min` finds it, where `argmin` is slow along a first axis.
    a_S1i = load_SR.take(hot, 1).astype(np.float32)[:, None]
    b_1Si = (load_SR.take(cold, 1) + half_gap).astype(np.float32)[None]
    off_SSi = np.subtract(a_S1i, b_1Si, out=buffer[:, :, : len(hot)])
    bits_Ki = off_SSi.view(np.int32).reshape(num_slots**2, -1)
    bits_Ki &= 2**31 - 1 - last_bits
    bits_Ki |= which_K1
    best = bits_Ki.min(0) & last_bits
    there, here = best // num_slots * num_rows + hot, best % num_slots * num_rows + cold
    moved = load[there] - load[here]
    # A gain, and none of the two already where the other was.
    good = np.flatnonzero(np.abs(moved - half_gap) < half_gap * _LESS)
    there, here, hot, cold, moved = (a[good] for a in (there, here, hot, cold, moved))
    clash = (expert_SR.take(cold, 1) == expert[there]).any(0)
    clash |= (expert_SR.take(hot, 1) == expert[here]).any(0)
    good = np.flatnonzero(~clash)
    there, here, hot, cold, moved = (a[good] for a in (there, here, hot, cold, moved))
    for array in (expert, load):
      array[there], array[here] = array[here], array[there]
    load_R[hot] -= moved
    load_R[cold] += moved
    changed_L = np.zeros(num_layers, bool)
    changed_L[hot // num_ranks] = True
    todo = np.flatnonzero(changed_L)
  return tuple(a.T.reshape(expert_LP.shape) for a in (expert_SR, load_SR))


def _spread(load_LE, replicas_LE, num_slots: int, num_ranks: int, split) -> np.ndarray:
  """Returns the replicas with what is left of the slots given to the busiest replica, one by one.

  Args:
    split: replicas above this load get none, while there are others.
  """
  replicas_LE = replicas_LE.copy()
  each_LE = load_LE / replicas_LE
  # Below every load and in this order: not to be split, and held by every rank already.
  each_LE = np.where(each_LE > split, -1.0, each_LE)
  each_LE[replicas_LE >= num_ranks] = -2.0
  left_L = num_slots - replicas_LE.sum(1)
  rows, busy = np.arange(len(load_LE)), each_LE
  for step in range(left_L.max(initial=0)):
    if step >= left_L.min():
      rows = np.flatnonzero(left_L > step)
      busy = each_LE[rows]
    busiest_i = busy.argmax(1)
    number_i = replicas_LE[rows, busiest_i] + 1
    replicas_LE[rows, busiest_i] = number_i
    each_LE[rows, busiest_i] = np.where(
      number_i < num_ranks, load_LE[rows, busiest_i] / number_i, -2.0
    )
  return replicas_LE


def _best(load_LE, num_slots: int, num_ranks: int, sweeps: int) -> np.ndarray:
  """Returns the packed items of the most even of several choices of replicas, for each layer."""
  if not sweeps:
    replicas_LE = replicate(load_LE, num_slots, num_ranks)
    return _pack(load_LE / replicas_LE, replicas_LE, num_ranks, sweeps, filling.heaviest_first)
  mean_L = load_LE.sum(1) / num_ranks
  packed_LP = np.empty((len(load_LE), num_slots), np.int64)
  # Where no replica need be large, another number of them changes little.
  is_small_L = _least_replicas(load_LE, _LARGE, num_ranks).sum(1) <= num_slots
  peak_L = np.full(len(load_LE), np.inf)
  if is_small_L.any():
    load_iE = load_LE[is_small_L]
    replicas_iE = replicate(load_iE, num_slots, num_ranks)
    each_iE = load_iE / replicas_iE
    if num_slots >= _FEW * num_ranks:
      # Rows begin less even, and a sweep costs less than the steps that they save.
      packed_iP = _pack(each_iE, replicas_iE, num_ranks, 2 * sweeps, filling.row_by_row)
      peak_L[is_small_L] = 0  # even enough
    else:
      packed_iP = _pack(each_iE, replicas_iE, num_ranks, sweeps, filling.heaviest_first)
      peak_L[is_small_L] = rank_loads(packed_iP, load_iE, num_ranks).max(1)
    packed_LP[is_small_L] = packed_iP
  begin = functools.partial(filling.heaviest_first, light=_LIGHT)
  for fill, good in _FILLS:
    least_LE = _least_replicas(load_LE, fill, num_ranks)
    tried = np.flatnonzero((peak_L * good > mean_L) & (least_LE.sum(1) <= num_slots))
    if not len(tried):
      continue
    load_iE, split_i1 = load_LE[tried], _SPLIT * mean_L[tried, None]
    split_i1 = split_i1 if np.isfinite(fill) else np.inf
    replicas_iE = _spread(load_iE, least_LE[tried], num_slots, num_ranks, split_i1)
    packed_iP = _pack(load_iE / replicas_iE, replicas_iE, num_ranks, sweeps, begin)
    peak_i = rank_loads(packed_iP, load_iE, num_ranks).max(1)
    better = peak_i < peak_L[tried]
    packed_LP[tried[better]], peak_L[tried[better]] = packed_iP[better], peak_i[better]
  return packed_LP


def _least_replicas(load_LE, fill: float, num_ranks: int) -> np.ndarray:
  """Returns replicas_LE, the fewest of which none exceeds `fill` of a mean rank, while there are
  ranks for them.
  """
  most_L1 = fill * np.maximum(load_LE.sum(1, keepdims=True) / num_ranks, 1e-300)
  return np.clip(np.ceil(load_LE / most_L1), 1, num_ranks).astype(np.int64)


def _pack(each_LE, replicas_LE, num_ranks: int, sweeps: int, begin: Callable) -> np.ndarray:
  """Returns item_LP, of E items, rank by rank; item e lies in replicas_LE of them.

  Args:
    begin: the first packing, before exchanges: an entry of `filling`.
  """
  item_LP = filling.items(replicas_LE)
  if item_LP.shape[1] == num_ranks:
    return item_LP
  load_LP = np.take_along_axis(each_LE, item_LP, 1)
  # On 16 bits numpy's stable sort is several times faster, and heavier is all that it has to tell.
  heaviest_L1 = np.maximum(load_LP.max(1, keepdims=True), 1e-300)
  order_LP = np.argsort((_LAST * (1 - load_LP / heaviest_L1)).astype(np.uint16), 1, kind="stable")
  item_LP = np.take_along_axis(item_LP, order_LP, 1)
  last = np.flatnonzero((np.take_along_axis(replicas_LE, item_LP, 1) > 1).any(0))
  packed_LP = begin(
    item_LP, np.take_along_axis(load_LP, order_LP, 1), num_ranks, last[-1] + 1 if len(last) else 0
  )
  filling.part(packed_LP, each_LE, num_ranks)
  load_LP = np.take_along_axis(each_LE, packed_LP, 1)
  if packed_LP.shape[1] < _FEW * num_ranks:
    return swap(packed_LP, load_LP, num_ranks, 2 * sweeps)[0]  # few to choose from, so cheap
  # Ranks near the mean gain least: without half of the pairs a sixth of the time is saved, and the
  # busiest rank is less than 0.001 of the mean busier.
  return swap(packed_LP, load_LP, num_ranks, sweeps, pairs=-(-num_ranks // 4))[0]


def _check(num_experts, num_slots, num_ranks, num_hosts, num_groups):
  for name, size, by_name, by in (
    ("num_experts", num_experts, "num_groups", num_groups),
    ("num_groups", num_groups, "num_hosts", num_hosts),
    ("num_ranks", num_ranks, "num_hosts", num_hosts),
    ("num_slots", num_slots, "num_ranks", num_ranks),
  ):
    if by < 1 or size % by:
      raise ValueError(
        f"{name}={size} is not divisible by {by_name}={by}; choose {by_name} from the divisors of"
        f" {size} or {name}={-(-size // max(by, 1)) * max(by, 1)}"
      )
  most = num_experts * num_ranks // num_hosts
  if not num_experts <= num_slots <= most:
    raise ValueError(
      f"num_slots={num_slots} cannot hold num_experts={num_experts} on num_ranks={num_ranks}, each"
      f" expert once and none twice on a rank; choose from {num_experts} to {most}"
    )
