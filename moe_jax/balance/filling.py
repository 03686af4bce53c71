"""Items onto ranks in one pass, the heaviest first, as `packing` begins: numpy, all layers at once.

An item is what a slot holds; where it is held several times, it lies in as many places of
`item_LP`. Knows items and loads; must not know what they are, or what follows.

Letters: X ranks, S slots of a rank, P = X * S.
"""

import numpy as np

_FULL = 1.01  # of a mean rank: it gets the lightest items last, one by one


def items(replicas_LE):
  """Returns item_LP: every item once, in order, then the further replicas."""
  num_layers, num_items = replicas_LE.shape
  first_LE = np.broadcast_to(np.arange(num_items), replicas_LE.shape)
  further = np.repeat(first_LE.ravel(), replicas_LE.ravel() - 1).reshape(num_layers, -1)
  return np.concatenate([first_LE, further], 1)


def heaviest_first(
  item_LP, load_LP, num_ranks: int, num_replicated: int, light: float = 0.0
) -> np.ndarray:
  """Returns the items rank by rank: one after the other goes to the idlest rank with room that does
  not hold it yet; where all with room do, to the idlest of those.

  Args:
    item_LP, load_LP: items and their loads, the heaviest first.
    num_replicated: from this place on there are no items with replicas.
    light: of a mean rank. Items without replicas below it go at once to all ranks not above the
      mean, the heaviest to the idlest: a few steps in the place of one an item.
  """
  num_layers, num_places = item_LP.shape
  num_slots, layer_L = num_places // num_ranks, np.arange(num_layers)
  # Everything of a step is a row of its own, and ranks are numbered through all layers: a step is a
  # handful of numpy calls, whose overhead is all that it costs.
  item_PL, load_PL = np.ascontiguousarray(item_LP.T), np.ascontiguousarray(load_LP.T)
  rank_PL, first_L = np.empty_like(item_PL), layer_L * num_ranks
  load_LX = np.zeros((num_layers, num_ranks))
  load, room = load_LX.reshape(-1), np.full(num_layers * num_ranks, num_slots)
  if_full = np.array([np.inf, *[0.0] * num_slots])
  is_there_LEX = np.zeros((num_layers, item_LP.max() + 1, num_ranks), bool)
  twice = 2 * load_LP.sum() + 1  # more than any rank can have, and less than being full
  first = 0
  if load_PL[:num_ranks].min() > 0:
    # The heaviest find the ranks idle, and go to one after the other.
    first, rank_X1 = num_ranks, np.arange(num_ranks)[:, None]
    is_there_LEX[layer_L, item_PL[:first], rank_X1] = True
    rank_PL[:first] = rank_X1 + first_L
    load_LX[:] = load_PL[:first].T
    room -= 1
  mean_L1 = load_LP.sum(1, keepdims=True) / num_ranks
  heavy = np.flatnonzero((load_LP >= light * mean_L1).any(0))
  done = max(first, num_replicated, heavy[-1] + 1 if len(heavy) else 0)
  for i in range(first, done):
    rank_L = rank_PL[i]
    if i < num_replicated:
      there_LX = is_there_LEX[layer_L, item_PL[i]]
      rank_L[:] = (load_LX + twice * there_LX).argmin(1)
      is_there_LEX[layer_L, item_PL[i], rank_L] = True
    else:
      load_LX.argmin(1, out=rank_L)
    rank_L += first_L
    room_L = room[rank_L] - 1
    room[rank_L] = room_L
    load[rank_L] += load_PL[i] + if_full[room_L]
  while done < num_places:
    part = slice(done, done + max(1, (load_LX < _FULL * mean_L1).sum(1).min()))
    rank_iL = rank_PL[part]
    rank_iL[:] = load_LX.argsort(1, kind="stable")[:, : len(rank_iL)].T + first_L
    room_iL = room[rank_iL] - 1
    room[rank_iL] = room_iL
    load[rank_iL] += load_PL[part] + if_full[room_iL]
    done = part.stop
  # A stable sort by rank leaves each rank's items in the order in which they came; numpy's is ten
  # times faster on 16 bits.
  rank_LP = (rank_PL - first_L).astype(np.min_scalar_type(num_ranks)).T
  order_LP = np.argsort(rank_LP, axis=1, kind="stable")
  return np.take_along_axis(item_LP, order_LP, 1)


def row_by_row(item_LP, load_LP, num_ranks: int, num_replicated: int) -> np.ndarray:
  """Returns the items rank by rank, one of each row of X to each rank: the heaviest of a row to the
  idlest rank and so on. Even where a row's loads are alike, and far fewer steps than one an item.

  Args:
    item_LP, load_LP, num_replicated: as of `heaviest_first`.
  """
  shape = (len(item_LP), -1, num_ranks)
  # Rows first and ranks numbered through all layers: a row is put where it belongs at once.
  item_SLX, load_SLX = (
    np.ascontiguousarray(a.reshape(shape).swapaxes(0, 1)) for a in (item_LP, load_LP)
  )
  first_L1 = np.arange(len(item_LP))[:, None] * num_ranks
  packed_SLX, load_LX = item_SLX.copy(), load_SLX[0].copy()
  twice = 2 * load_LP.sum() + 1  # more than any rank can have
  for s in range(1, len(item_SLX)):
    idle_LX = load_LX
    if s * num_ranks < num_replicated:
      # Of a row only replicas of its first can be in a row before: they follow each other.
      idle_LX = load_LX + twice * (packed_SLX[:s] == item_SLX[s][:, :1]).any(0)
    rank_LX = idle_LX.argsort(1, kind="stable") + first_L1
    packed_SLX[s].reshape(-1)[rank_LX] = item_SLX[s]
    load_LX.reshape(-1)[rank_LX] += load_SLX[s]
  return packed_SLX.reshape(len(packed_SLX), -1).T.reshape(item_LP.shape)


def part(packed_LP, each_LE, num_ranks: int) -> None:
  """Exchanges slots, in place, until no rank holds an item twice; such are few."""
  packed_LXS = packed_LP.reshape(len(packed_LP), num_ranks, -1)
  sorted_LXS = np.sort(packed_LXS, -1)
  for layer in np.flatnonzero((sorted_LXS[..., 1:] == sorted_LXS[..., :-1]).any((1, 2))):
    held_XS, each_E = packed_LXS[layer], each_LE[layer]
    while True:
      again = [
        (x, s)
        for x, row in enumerate(held_XS.tolist())
        for s, item in enumerate(row)
        if item in row[:s]
      ]
      if not again:
        break
      x, s = again[0]
      legal_XS = ~(held_XS == held_XS[x, s]).any(1, keepdims=True)
      legal_XS = legal_XS & ~np.isin(held_XS, held_XS[x])
      off_XS = np.where(legal_XS, np.abs(each_E[held_XS] - each_E[held_XS[x, s]]), np.inf)
      there = np.unravel_index(off_XS.argmin(), off_XS.shape)
      held_XS[x, s], held_XS[there] = held_XS[there], held_XS[x, s]
