"""When experts move in a run, and where to: looks at a window of loads every so many steps.

All of it on the host, in numpy, from what the devices have reported anyway, while they compute the
next step; every process decides alike, and a resumed run as one never stopped. Knows loads,
placements and prices; must not know leaves, shardings or how experts travel (`migration`).
"""

import time
from typing import NamedTuple

import numpy as np

from moe_jax import config
from moe_jax.balance import monitor, packing, placement, price
from moe_jax.plan.hardware import CHIPS
from moe_jax.train import migration

_NUM_PLANS = 4  # of which each moves at most half of what the one before does


class Placed(NamedTuple):
  """What a checkpoint keeps of it.

  Attributes:
    expert_LP: the expert at each slot; layers and experts in logical order.
    tokens_LE: assigned to each expert since the last look.
    num_steps: that these are of.
  """

  expert_LP: np.ndarray
  tokens_LE: np.ndarray
  num_steps: int


class Look(NamedTuple):
  """What a look at the loads came to.

  Attributes:
    moves: what to exchange; None where experts stay.
    num_slots: experts that move, or would.
    moved_bytes: of all of them together, 0 where they stay.
    gain_tokens: that the busiest ranks of a stage need not serve until the next look.
    cost_tokens: that a rank could serve in the time of the exchange.
    before_L, after_L: the busiest rank over the mean under the window's load, as it was and as it
      would be.
    plan_s: seconds that the look took.
  """

  moves: migration.Moves | None
  num_slots: int
  moved_bytes: int
  gain_tokens: float
  cost_tokens: float
  before_L: np.ndarray
  after_L: np.ndarray
  plan_s: float

  def figures(self) -> dict:
    """Returns what the line of its step in the metrics file says of it."""
    return {
      "moved_experts": self.num_slots if self.moves is not None else 0,
      "moved_bytes": self.moved_bytes,
      "move_gain_tokens": self.gain_tokens,
      "move_cost_tokens": self.cost_tokens,
      "rank_load_before": self.before_L,
      "rank_load_after": self.after_L,
      "look_s": self.plan_s,
    }

  def __str__(self) -> str:
    """Returns the line for the terminal."""
    before, after = self.before_L.mean(), self.after_L.mean()
    if not self.num_slots:
      return f"experts stay: busiest rank {before:.3f}x the mean, and no move makes it less"
    worth = f"busiest rank {before:.3f}x -> {after:.3f}x the mean, worth {self.gain_tokens:,.0f}"
    cost = f"tokens until the next look at the cost of {self.cost_tokens:,.0f}"
    if self.moves is None:
      return f"experts stay: to move {self.num_slots} were {worth} {cost}"
    return f"{self.num_slots} experts move, {self.moved_bytes:,} bytes: {worth} {cost}"


def begin(model: config.Model) -> Placed:
  """Returns each expert at the slot of its number, and no load seen."""
  expert_LP = placement.initial(model.layers, model.experts)
  return Placed(expert_LP, np.zeros_like(expert_LP), 0)


def as_meta(placed: Placed) -> dict:
  """Returns `placed` as plain JSON."""
  return {name: np.asarray(value).tolist() for name, value in placed._asdict().items()}


def from_meta(meta: dict | None, settings: config.Config) -> tuple[Placed, bool]:
  """Returns what `as_meta` took apart, and whether it could be taken as it is.

  A checkpoint from before experts moved has none: its experts are at home, each at the slot of its
  number. There they go too where `moe.hosts_per_token` limits a token to experts of few hosts, and
  the placement would mix what this deployment's hosts hold: it would change the model.

  Raises:
    ValueError: it is no placement of the model's experts.
  """
  fresh = begin(settings.model)
  if meta is None:
    return fresh, True
  placed = Placed(np.array(meta["expert_LP"]), np.array(meta["tokens_LE"]), meta["num_steps"])
  if placed.expert_LP.shape != fresh.expert_LP.shape:
    raise ValueError(
      f"the checkpoint's placement has shape {placed.expert_LP.shape}, expected"
      f" {fresh.expert_LP.shape}, layers x experts; it is of another model"
    )
  packing.check(placed.expert_LP, settings.model.experts, num_ranks=1)
  groups_LGe = np.sort(placed.expert_LP.reshape(len(fresh.expert_LP), _num_hosts(settings), -1))
  is_whole = groups_LGe // groups_LGe.shape[-1] == groups_LGe[..., :1] // groups_LGe.shape[-1]
  return (placed, True) if is_whole.all() else (placed._replace(expert_LP=fresh.expert_LP), False)


class _Plan(NamedTuple):
  """A placement that could be gone to; fields as in Look."""

  change: placement.Change
  moves: migration.Moves
  gain_tokens: float
  cost_tokens: float


class Balancer:
  """Gathers loads, and looks at them every `balance.every` steps.

  Attributes:
    expert_LP: the expert at each slot, as the next step finds them.
  """

  def __init__(self, settings: config.Config, order: np.ndarray, placed: Placed, expert_bytes: int):
    """Begins with what a checkpoint held, or `begin`.

    Args:
      order: logical layer at each place along L.
      placed: where experts are now.
      expert_bytes: of one expert in one layer, with its optimizer state.

    Raises:
      ValueError: the chip of `balance.chip` has no figure for the model's dtype.
    """
    self._settings, self._order, self._expert_bytes = settings, order, expert_bytes
    self.expert_LP, self._tokens_LE, self._num_steps = placed
    self._cost = _cost(settings, expert_bytes) if self.is_on else None

  @property
  def is_on(self) -> bool:
    """Whether experts may move; on a single rank there is nowhere to."""
    return self._settings.balance.every > 0 and self._settings.mesh.expert > 1

  @property
  def placed(self) -> Placed:
    """What a checkpoint keeps."""
    return Placed(self.expert_LP, self._tokens_LE, self._num_steps)

  def observe(self, tokens_LE: np.ndarray) -> None:
    """Takes note of a step's assignments, layers and experts in logical order."""
    if self.is_on:
      self._tokens_LE, self._num_steps = self._tokens_LE + tokens_LE, self._num_steps + 1

  def look(self, num_done: int) -> Look | None:
    """Returns what the loads since the last look say, and takes the placement on that they lead to;
    None where no look is due.

    Args:
      num_done: steps dispatched.
    """
    balance, mesh = self._settings.balance, self._settings.mesh
    is_due = self.is_on and num_done % balance.every == 0 and num_done < self._settings.train.steps
    if not is_due or not self._num_steps:
      return None
    start_s = time.perf_counter()
    num_micro_batches = self._num_steps * self._settings.pipeline.micro_batches
    load_LE = self._tokens_LE / (num_micro_batches * mesh.data)  # of one copy
    plan = max(self._plans(load_LE), key=lambda plan: plan.gain_tokens - plan.cost_tokens)
    change, num_slots = plan.change, int(plan.change.moved_LP.sum())
    pays = placement.pays(change, mesh.expert, self._cost, migration.num_rounds(plan.moves))
    ratio = lambda expert_LP: monitor.max_over_mean(
      packing.rank_loads(expert_LP, load_LE, mesh.expert)
    )
    look = Look(
      plan.moves if pays else None,
      num_slots,
      num_slots * self._expert_bytes if pays else 0,
      plan.gain_tokens,
      plan.cost_tokens,
      ratio(self.expert_LP),
      ratio(change.expert_LP),
      time.perf_counter() - start_s,
    )
    if pays:
      self.expert_LP = change.expert_LP
    self._tokens_LE, self._num_steps = np.zeros_like(self._tokens_LE), 0
    return look

  def _plans(self, load_LE: np.ndarray) -> list[_Plan]:
    """Returns what could be done: all that is worth something, the better half of it, and so on."""
    hosts, cost = _num_hosts(self._settings), self._cost
    most, plans = self._settings.balance.most_moved or None, []
    for _ in range(_NUM_PLANS):
      change = placement.rebalance(
        self.expert_LP, load_LE, self._settings.mesh.expert,
        num_hosts=hosts, num_groups=hosts, most_moved=most,
      )  # fmt: skip
      num_slots = int(change.moved_LP.sum())
      if plans and not num_slots:
        break
      moves = migration.moves(self.expert_LP, change.expert_LP, self._order, self._settings.mesh)
      exchange_s = migration.num_rounds(moves) * cost.slot_bytes / cost.link_bytes_per_s
      gain_tokens = change.gain_tokens * cost.horizon
      plans.append(_Plan(change, moves, gain_tokens, exchange_s / cost.token_s))
      most = num_slots // 2
    return plans


def _cost(settings: config.Config, expert_bytes: int) -> placement.Cost:
  """Returns what moving costs and earns until the next look."""
  mesh, balance = settings.mesh, settings.balance
  chip = CHIPS[balance.chip]
  return placement.Cost(
    # Each tensor rank sends its share, and each copy its part of that (ZeRO-1).
    slot_bytes=expert_bytes / (mesh.tensor * mesh.data),
    link_bytes_per_s=price.link_bytes_per_s(settings, chip),
    token_s=price.token_seconds(settings, chip),
    # Stages work at once, so of what all layers save a step gains one stage's part.
    horizon=balance.every * settings.pipeline.micro_batches / mesh.stage,
  )


def _num_hosts(settings: config.Config) -> int:
  """Returns among how many groups a token's choice is limited; they move as a whole, or not."""
  if not settings.moe.hosts_per_token:
    return 1
  return settings.mesh.expert // settings.moe.expert_ranks_per_host
