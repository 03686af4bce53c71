"""How many rows each rank of `expert` gets: from a distribution over experts, or a recorded trace.

Knows counts of tokens by expert and the rows of a block; must not know time.
"""

import json
import math
import pathlib
from typing import NamedTuple

import numpy as np

from moe_jax.config import Config
from moe_jax.plan import saving
from moe_jax.plan.steps import even_rounds, sizes

# Bounds and number of the times at which `drawn` looks, the first over the sum of weights, the last
# over the least: nobody has arrived, and all have.
_EARLIEST, _LATEST, _NUM_TIMES = 1e-9, 50.0, 400
# Decades between the weights of two experts over which those times are close enough.
_MOST_DECADES = 100


class Load(NamedTuple):
  """Of one step.

  Attributes:
    share_LE: of each layer's assignments, by expert; rows sum to 1.
    rows_LX: rows that reach each rank of `expert`, over the even share.
    computed_LX: rows that a dropless rank multiplies, experts' last blocks filled up, over those
      under an even load.
    first_LX: the same of the first round.
    rounds_L: exchanges that a dropless layer takes there and back.
    dropped_fraction: of assignments, that a capacity dispatch has no room for.
  """

  share_LE: np.ndarray
  rows_LX: np.ndarray
  computed_LX: np.ndarray
  first_LX: np.ndarray
  rounds_L: np.ndarray
  dropped_fraction: float

  @property
  def max_over_mean(self) -> float:
    """Of the busiest rank, the mean over layers."""
    return float(self.rows_LX.max(1).mean())


def zipf(settings: Config, exponent: float) -> Load:
  """Returns the load of tokens that draw their K different experts one after the other, each of
  those that are left by its popularity, that of the i-th expert 1 / i ** exponent.

  Raises:
    ValueError: an exponent that is negative, or too large to tell unpopular experts apart.
  """
  if not 0 <= exponent < math.inf:
    raise ValueError(f"zipf={exponent} is not a number from 0 up; 0 is even, 1.0 is usual text")
  experts = settings.model.experts
  if exponent * math.log10(experts) > _MOST_DECADES:
    most = int(_MOST_DECADES / math.log10(experts))
    raise ValueError(
      f"zipf={exponent} leaves the last of {experts} experts next to nothing; choose at most"
      f" {most}, 1.0 is usual text"
    )
  weight_E = np.arange(1, experts + 1, dtype=float) ** -exponent
  chosen_E = drawn(weight_E, settings.model.experts_per_token)
  return of(settings, np.broadcast_to(chosen_E, (settings.model.layers, experts)))


def drawn(weight_E: np.ndarray, num_draws: int) -> np.ndarray:
  """Returns the probability with which each is among the first that are drawn, without putting
  back, by weight.

  As if each arrived after an exponential time of rate w: i is drawn where it arrives at t while
  fewer than K others have, the integral of w_i exp(-w_i t) P(fewer than K others by t) over t.

  Source: Efraimidis and Spirakis 2006, Weighted random sampling with a reservoir.
  """
  if num_draws >= len(weight_E):
    return np.ones(len(weight_E))
  log_t, step = np.linspace(
    math.log(_EARLIEST / weight_E.sum()), math.log(_LATEST / weight_E.min()), _NUM_TIMES,
    retstep=True,
  )  # fmt: skip
  arrived_PE = -np.expm1(-np.exp(log_t)[:, None] * weight_E)
  found_E = np.empty(len(weight_E))
  for i, weight in enumerate(weight_E):
    # Of the others, the probabilities of 0 to K - 1 arrivals.
    count_PK = np.zeros((_NUM_TIMES, num_draws))
    count_PK[:, 0] = 1.0
    for other in range(len(weight_E)):
      if other != i:
        by_P1 = arrived_PE[:, other, None]
        late_PK = count_PK * (1 - by_P1)
        late_PK[:, 1:] += count_PK[:, :-1] * by_P1
        count_PK = late_PK
    # In the logarithm of time, whose step is t d(log t), the trapezoids of so smooth a curve that
    # ends in zeros are exact to many digits.
    rate_P = weight * np.exp(log_t - np.exp(log_t) * weight)
    found_E[i] = (rate_P * count_PK.sum(1)).sum() * step
  return found_E


def trace(settings: Config, path: str) -> Load:
  """Returns the load that a file recorded: {"counts_LE": [[tokens of each expert] of each layer]}.

  Raises:
    ValueError: the file is not such a trace, or of another model.
  """
  try:
    counts_LE = np.asarray(json.loads(pathlib.Path(path).read_text())["counts_LE"], float)
  except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f'{path} is not a trace ({error}); write {{"counts_LE": [[...]]}}') from error
  expected = (settings.model.layers, settings.model.experts)
  if counts_LE.shape != expected:
    raise ValueError(
      f"{path}: counts_LE has shape {counts_LE.shape}, the model has {expected} (layers, experts)"
    )
  return of(settings, counts_LE)


def of(settings: Config, counts_LE: np.ndarray) -> Load:
  """Returns the load of counts of any scale.

  Raises:
    ValueError: counts that are negative or not finite, or a layer with none.
  """
  totals = counts_LE.sum(1, keepdims=True)
  if (counts_LE < 0).any() or not ((totals > 0) & (totals < math.inf)).all():
    raise ValueError(
      "counts of tokens must be 0 or more and finite, with one above 0 in every layer"
    )
  share_LE, moe, ranks = counts_LE / totals, settings.moe, settings.mesh.expert
  share_LXe = share_LE.reshape(len(share_LE), ranks, -1)
  rows_LX = share_LXe.sum(2) * ranks
  # Each source sends its own share; B rows go to a rank in a round.
  rounds_L = np.maximum(1, np.ceil(rows_LX.max(1) / moe.capacity_factor - 1e-9))
  even_LXe = np.full(share_LXe.shape, 1 / settings.model.experts)
  even = _computed(settings, even_LXe, even_rounds(settings))
  found = _computed(settings, share_LXe, int(rounds_L.max()))
  computed_LX, first_LX = (each / each_even for each, each_even in zip(found, even, strict=True))
  room = moe.capacity_factor / settings.model.experts
  dropped = np.maximum(share_LE - room, 0).sum(1).mean() if moe.dispatch == "capacity" else 0.0
  return Load(share_LE, rows_LX, computed_LX, first_LX, rounds_L, float(dropped))


def _computed(settings: Config, share_LXe: np.ndarray, num_rounds: int):
  """Returns the rows of all blocks that a rank multiplies in a micro-batch, [layers, ranks], and of
  them those of the first round.

  A source's rows for a rank wait sorted by expert, and a round takes the next B of them.
  """
  at, mesh = sizes(settings), settings.mesh
  block = saving.ROWS_PER_BLOCK
  assignments = at.tokens * settings.model.experts_per_token
  of_round = min(assignments, settings.moe.capacity_factor * assignments / mesh.expert)
  end_LXe = np.cumsum(share_LXe, 2) * assignments
  rows_by_round = []
  for number in range(num_rounds):
    taken_LXe = np.diff(np.clip(end_LXe - number * of_round, 0, of_round), axis=2, prepend=0)
    # To the thousandth of a row: whole blocks are not to become one more by rounding.
    blocks_LXe = np.ceil(taken_LXe * mesh.expert * mesh.tensor / block - 1e-3)
    rows_by_round.append(block * blocks_LXe.sum(2))
  return sum(rows_by_round), rows_by_round[0]
