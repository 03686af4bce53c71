"""The ways to balance, each run over a stream of micro-batches, and its cost by a stated model.

A policy is an object whose `take` sees one micro-batch after the other and says what every rank
computed, what was dropped and what was sent. The model of a step's time: the busiest rank's rows,
one layer after the other, and the bytes that balancing sends, as if nothing hid them. Policies that
change the routing need the router's scores; the others only counts. Knows counts, scores and
seconds; must not know models, devices or files.

Letters: X ranks, P = slots of all ranks.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from moe_jax.balance import bias, forecast, packing, placement, quantile, stealing, workloads

# A step's worth of learning in one micro-batch, so that a hundred of these show what takes a run
# thousands: in units of the scores, which are log-probabilities here.
_BIAS_SPEED, _AUX_SPEED = 0.03, 0.03


class Setting(NamedTuple):
  """What the policies work with.

  Attributes:
    num_experts: E, the first E / X on the first rank and so on.
    num_ranks: X.
    num_choices: K.
    capacity_factor: of `capacity` and `spill`.
    num_slots: P of `placement` and what builds on it.
    num_shadows: of `stealing`, at most.
    window: micro-batches after which a placement is looked at.
    horizon: micro-batches for which a placement has to pay.
    token_s: of one token at one expert, there and back, forward and backward.
    shadow_bytes: of one shadow: its weights to every rank and its gradients home.
    slot_bytes: of a slot that moves: weights and optimizer state.
    link_bytes_per_s: into one rank.
  """

  num_experts: int
  num_ranks: int
  num_choices: int
  capacity_factor: float
  num_slots: int
  num_shadows: int
  window: int
  horizon: int
  token_s: float
  shadow_bytes: float
  slot_bytes: float
  link_bytes_per_s: float


class Seen(NamedTuple):
  """One micro-batch.

  Attributes:
    counts_LE: tokens of each expert as routed without balancing.
    tokens_V: how often each token type occurs.
    ahead_V: likewise in the window that begins here; data are read ahead, so this is known before
      anything is routed.
    scores_LTE: the router's, where there are any.
  """

  counts_LE: np.ndarray
  tokens_V: np.ndarray
  ahead_V: np.ndarray
  scores_LTE: np.ndarray | None


class Taken(NamedTuple):
  """What a policy made of a micro-batch.

  Attributes:
    served_LX: tokens that each rank served.
    rows_LX: rows that it computed, padding included.
    dropped: tokens that nobody served.
    moved_bytes: into the rank that received most.
    decision_s: for one layer, 0 where none was made.
  """

  served_LX: np.ndarray
  rows_LX: np.ndarray
  dropped: int = 0
  moved_bytes: float = 0.0
  decision_s: float = 0.0


class Nothing:
  """Each expert stays where it is and serves all that choose it."""

  needs_scores = False
  is_exact = True  # every token is served by the experts that the router would choose without it

  def __init__(self, setting: Setting):
    self.setting = setting

  def take(self, seen: Seen) -> Taken:
    """Returns what the ranks do with a micro-batch."""
    return self._at_home(seen.counts_LE)

  def _at_home(self, counts_LE, **given) -> Taken:
    served_LX = counts_LE.reshape(len(counts_LE), self.setting.num_ranks, -1).sum(-1)
    return Taken(served_LX, served_LX, **given)


class Capacity(Nothing):
  """Every expert has rows for the capacity factor times its even share; they are computed whether
  tokens fill them or not.
  """

  is_exact, is_spilling = False, False

  def take(self, seen: Seen) -> Taken:
    total = int(seen.counts_LE[0].sum())
    rows = int(np.ceil(self.setting.capacity_factor * total / self.setting.num_experts))
    kept_LE = np.minimum(seen.counts_LE, rows)
    if self.is_spilling:
      kept_LE = _spilled(kept_LE, seen.counts_LE, rows)
    taken = self._at_home(kept_LE)
    padded_LX = np.full(taken.rows_LX.shape, rows * self.setting.num_experts)
    return taken._replace(
      rows_LX=padded_LX // self.setting.num_ranks, dropped=int(seen.counts_LE.sum() - kept_LE.sum())
    )


class Spill(Capacity):
  """As capacity, but what overflows goes to experts with room, the popular ones first."""

  is_spilling = True


class Aux(Nothing):
  """An auxiliary loss teaches the router: its gradient by an offset of each expert's score, which
  steps of one size follow, as Adam's are to begin with.
  """

  needs_scores, is_exact = True, False

  def __init__(self, setting: Setting):
    super().__init__(setting)
    self.offset_LE = np.zeros((1, setting.num_experts), np.float32)

  def take(self, seen: Seen) -> Taken:
    scores_LTE = seen.scores_LTE + self.offset_LE[:, None]
    counts_LE = workloads.choose(scores_LTE, self.setting.num_choices)
    fraction_LE = counts_LE / counts_LE.sum(-1, keepdims=True)
    probability_LTE = np.exp(scores_LTE - scores_LTE.max(-1, keepdims=True))
    probability_LTE /= probability_LTE.sum(-1, keepdims=True)
    # Of E x sum f_e P_e by the offset, f held fixed (Switch Transformers, equation 4).
    cost_LT1 = np.einsum("lte,le->lt", probability_LTE, fraction_LE)[..., None]
    gradient_LE = (probability_LTE * (fraction_LE[:, None] - cost_LT1)).mean(1)
    self.offset_LE = self.offset_LE - _AUX_SPEED * np.sign(gradient_LE)
    return self._at_home(counts_LE)


class Bias(Nothing):
  """The auxiliary-loss-free bias (`bias`)."""

  needs_scores, is_exact = True, False

  def __init__(self, setting: Setting):
    super().__init__(setting)
    self.bias_LE = np.zeros((1, setting.num_experts), np.float32)

  def take(self, seen: Seen) -> Taken:
    counts_LE = workloads.choose(seen.scores_LTE + self.bias_LE[:, None], self.setting.num_choices)
    start = time.perf_counter()
    before_LE = np.broadcast_to(self.bias_LE, counts_LE.shape)
    self.bias_LE = bias.update(before_LE, counts_LE, _BIAS_SPEED)
    return self._at_home(counts_LE, decision_s=(time.perf_counter() - start) / len(counts_LE))


class Quantile(Nothing):
  """The bias that would have made the micro-batch before even (`quantile`)."""

  needs_scores, is_exact = True, False

  def __init__(self, setting: Setting):
    super().__init__(setting)
    self.bias_LE = np.zeros((1, setting.num_experts), np.float32)

  def take(self, seen: Seen) -> Taken:
    counts_LE = workloads.choose(seen.scores_LTE + self.bias_LE[:, None], self.setting.num_choices)
    before_LE = np.broadcast_to(self.bias_LE, counts_LE.shape)
    start = time.perf_counter()
    self.bias_LE = np.stack(
      [
        quantile.update(bias_E, scores_TE, self.setting.num_choices)
        for bias_E, scores_TE in zip(before_LE, seen.scores_LTE, strict=True)
      ]
    )
    return self._at_home(counts_LE, decision_s=(time.perf_counter() - start) / len(counts_LE))


class Placement(Nothing):
  """After each window experts are placed and replicated for the mean load so far, if it pays."""

  def __init__(self, setting: Setting):
    super().__init__(setting)
    self.expert_LP: np.ndarray | None = None
    self._seen: list[Seen] = []
    self._mean_LE: np.ndarray | None = None

  def take(self, seen: Seen) -> Taken:
    expert_LP, given = self._look(seen)
    served_LX = packing.rank_loads(expert_LP, seen.counts_LE, self.setting.num_ranks)
    return Taken(served_LX, served_LX, **given)

  def expected(self, seen: Seen) -> np.ndarray:
    """Returns load_LE of the window that begins: the moving average of those before."""
    del seen
    window_LE = np.mean([each.counts_LE for each in self._seen], 0)
    self._mean_LE = window_LE if self._mean_LE is None else (self._mean_LE + window_LE) / 2
    return self._mean_LE

  def _look(self, seen: Seen):
    setting, given = self.setting, {}
    if self.expert_LP is None:
      self.expert_LP = self._first(len(seen.counts_LE))
    if len(self._seen) == setting.window:
      load_LE = self.expected(seen)
      self._seen = []
      start = time.perf_counter()
      change = placement.rebalance(self.expert_LP, load_LE, setting.num_ranks)
      cost = placement.Cost(
        setting.slot_bytes, setting.link_bytes_per_s, setting.token_s, setting.horizon
      )
      pays = placement.pays(change, setting.num_ranks, cost)
      given["decision_s"] = (time.perf_counter() - start) / len(load_LE)
      if pays:
        self.expert_LP = change.expert_LP
        slots = placement.busiest_moved(change.moved_LP, setting.num_ranks)
        given["moved_bytes"] = slots * setting.slot_bytes
    self._seen.append(seen._replace(scores_LTE=None))
    return self.expert_LP, given

  def _first(self, num_layers: int) -> np.ndarray:
    """Returns a placement in which each expert is at home, and further slots replicate in turn."""
    setting = self.setting
    homes_XS = np.arange(setting.num_experts).reshape(setting.num_ranks, -1)
    further = setting.num_slots // setting.num_ranks - homes_XS.shape[1]
    # Of the ranks that follow, so that none holds an expert twice.
    copies = [np.roll(homes_XS, -1 - n // homes_XS.shape[1], 0) for n in range(further)]
    columns = [copy[:, n % homes_XS.shape[1]] for n, copy in enumerate(copies)]
    slots_XS = np.concatenate([homes_XS, *(column[:, None] for column in columns)], 1)
    return np.tile(slots_XS.reshape(-1), (num_layers, 1))


class Foreseen(Placement):
  """As placement, for the load that the best forecaster so far expects of the window to come."""

  def __init__(self, setting: Setting):
    super().__init__(setting)
    self.forecast = forecast.Forecast()

  def expected(self, seen: Seen) -> np.ndarray:
    counts_LE = np.sum([each.counts_LE for each in self._seen], 0)
    self.forecast.observe(counts_LE, np.sum([each.tokens_V for each in self._seen], 0))
    share_LE = self.forecast.next(seen.ahead_V)
    return share_LE * counts_LE.sum(-1, keepdims=True) / len(self._seen)


class Stealing(Nothing):
  """Shadows of the hottest experts in every micro-batch (`stealing`), the weights at home else."""

  price_matters = False

  def __init__(self, setting: Setting):
    super().__init__(setting)
    self._holds_EX = stealing.held_once(setting.num_experts, setting.num_ranks)

  def take(self, seen: Seen) -> Taken:
    shape = (len(seen.counts_LE), *self._holds_EX.shape)
    return self._steal(seen, np.broadcast_to(self._holds_EX, shape))

  def _steal(self, seen: Seen, holds_LEX, **given) -> Taken:
    setting = self.setting
    price = None
    if self.price_matters:
      price = stealing.Price(setting.shadow_bytes / setting.link_bytes_per_s, setting.token_s)
    one, every = _decide(setting.num_shadows, price)
    counts_LE = seen.counts_LE.astype(np.int32)
    decision = jax.device_get(every(counts_LE, holds_LEX))
    jax.block_until_ready(one(counts_LE[0], holds_LEX[0]))  # compiles
    start = time.perf_counter()
    jax.block_until_ready(one(counts_LE[0], holds_LEX[0]))
    decision_s = time.perf_counter() - start
    served_LX = decision.quota_EX.sum(1)
    num_shadows = int((decision.shadow_H < setting.num_experts).sum())
    moved_bytes = given.pop("moved_bytes", 0.0) + num_shadows * setting.shadow_bytes
    given.pop("decision_s", None)
    return Taken(served_LX, served_LX, moved_bytes=moved_bytes, decision_s=decision_s, **given)


class PricedStealing(Stealing):
  """Stealing in those layers and micro-batches in which it saves more than the shadows cost."""

  price_matters = True


class PlacementStealing(Placement, Stealing):
  """Stealing on top of placement: replicas share by whole-number quotas, shadows do the rest."""

  def __init__(self, setting: Setting):
    Placement.__init__(self, setting)

  def take(self, seen: Seen) -> Taken:
    expert_LP, given = self._look(seen)
    setting = self.setting
    slots_LXS = expert_LP.reshape(len(expert_LP), setting.num_ranks, -1)
    holds_LEX = (slots_LXS[:, None] == np.arange(setting.num_experts)[None, :, None, None]).any(-1)
    return self._steal(seen, holds_LEX, **given)


class PricedPlacementStealing(PlacementStealing):
  """Likewise, with shadows only where they save more than they cost."""

  price_matters = True


POLICIES: Mapping[str, Callable[[Setting], Nothing]] = {
  "none": Nothing,
  "capacity": Capacity,
  "spill": Spill,
  "aux": Aux,
  "bias": Bias,
  "quantile": Quantile,
  "placement": Placement,
  "stealing": Stealing,
  "stealing if it pays": PricedStealing,
  "placement+stealing": PlacementStealing,
  "placement+stealing if it pays": PricedPlacementStealing,
  "forecast": Foreseen,
}


def seconds(taken: Taken, setting: Setting) -> float:
  """Returns what a micro-batch takes: the busiest rank of each layer, and what is sent."""
  computed_s = float(taken.rows_LX.max(1).sum()) * setting.token_s
  return computed_s + taken.moved_bytes / setting.link_bytes_per_s


def ideal_seconds(seen: Seen, setting: Setting) -> float:
  """Returns what it would take if every rank served as many tokens as any other."""
  return float(seen.counts_LE.sum()) / setting.num_ranks * setting.token_s


def _spilled(kept_LE, counts_LE, rows):
  """Returns kept_LE with what overflowed in the experts' free rows, popular experts first."""
  order_LE = np.argsort(-counts_LE, -1, kind="stable")
  room_LE = np.take_along_axis(rows - kept_LE, order_LE, -1)
  over_L1 = (counts_LE - kept_LE).sum(-1, keepdims=True)
  before_LE = np.cumsum(room_LE, -1) - room_LE
  filled_LE = np.empty_like(kept_LE)
  np.put_along_axis(filled_LE, order_LE, np.clip(over_L1 - before_LE, 0, room_LE), -1)
  return kept_LE + filled_LE


@functools.cache
def _decide(num_shadows: int, price: stealing.Price | None):
  """Returns the compiled decision of one layer, and of all layers at once."""
  decide = functools.partial(stealing.decide, num_shadows=num_shadows, price=price)
  return jax.jit(decide), jax.jit(jax.vmap(decide))
