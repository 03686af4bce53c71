"""How many rows each rank of `expert` gets: from a distribution over experts, or a recorded trace.

Knows counts of tokens by expert; must not know time.
"""

import json
import math
import pathlib
from typing import NamedTuple

import numpy as np

from moe_jax.config import Config


class Load(NamedTuple):
  """Of one step.

  Attributes:
    share_LE: of each layer's assignments, by expert; rows sum to 1.
    rows_LX: rows that reach each rank of `expert`, over the even share.
    rounds_L: exchanges that a dropless layer takes there and back.
    dropped_fraction: of assignments, that a capacity dispatch has no room for.
  """

  share_LE: np.ndarray
  rows_LX: np.ndarray
  rounds_L: np.ndarray
  dropped_fraction: float

  @property
  def max_over_mean(self) -> float:
    """Of the busiest rank, the mean over layers."""
    return float(self.rows_LX.max(1).mean())


def zipf(settings: Config, exponent: float) -> Load:
  """Returns the load under which the i-th most popular expert gets a share of 1 / i ** exponent.

  Raises:
    ValueError: a negative exponent.
  """
  if not 0 <= exponent < math.inf:
    raise ValueError(f"zipf={exponent} is not a number from 0 up; 0 is even, 1.0 is usual text")
  weight_E = np.arange(1, settings.model.experts + 1, dtype=float) ** -exponent
  return of(settings, np.broadcast_to(weight_E, (settings.model.layers, settings.model.experts)))


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
    ValueError: negative counts, or a layer with none.
  """
  totals = counts_LE.sum(1, keepdims=True)
  if (counts_LE < 0).any() or not (totals > 0).all():
    raise ValueError("counts of tokens must be 0 or more, with one above 0 in every layer")
  share_LE, moe, ranks = counts_LE / totals, settings.moe, settings.mesh.expert
  rows_LX = share_LE.reshape(len(share_LE), ranks, -1).sum(2) * ranks
  # Each source sends its own share; B rows go to a rank in a round.
  rounds_L = np.maximum(1, np.ceil(rows_LX.max(1) / moe.capacity_factor - 1e-9))
  room = moe.capacity_factor / settings.model.experts
  dropped = np.maximum(share_LE - room, 0).sum(1).mean() if moe.dispatch == "capacity" else 0.0
  return Load(share_LE, rows_LX, rounds_L, float(dropped))
