"""Which experts the served tokens went to: sums of what every call reports beside its tokens.

Counting costs no synchronisation: the counts lie beside the tokens that are waited for anyway.
Knows counts; must not know requests, calls or who reads them.
"""

from typing import NamedTuple

import numpy as np

from moe_jax import config
from moe_jax.balance import monitor
from moe_jax.pipeline.table import Table

_KEEP = 0.99  # of what was recent after one more call: about the last hundred count


class ExpertLoad(NamedTuple):
  """What the experts have served.

  Attributes:
    tokens_LE: assignments since the start, layers in logical order.
    share_LE: of each layer's recent assignments.
    max_over_mean_L: of the recent assignments; 1 is even.
    dropped: assignments that no expert served, since the start.
  """

  tokens_LE: np.ndarray
  share_LE: np.ndarray
  max_over_mean_L: np.ndarray
  dropped: int


class ExpertCounts:
  """Adds up what calls report."""

  def __init__(self, model: config.Model, table: Table):
    """Nothing served yet.

    Args:
      table: of any call: layers are reported in its placement.
    """
    order = np.asarray(table.layer_order)
    per_chunk = model.layers // len(order)
    logical = (order[:, None] * per_chunk + np.arange(per_chunk)).reshape(-1)
    self._place_L = np.argsort(logical)
    self._tokens_LE = np.zeros((model.layers, model.experts), np.int64)
    self._recent_LE = np.zeros((model.layers, model.experts))
    self._dropped = 0

  def add(self, assigned_LE: np.ndarray, dropped_L: np.ndarray) -> None:
    """Takes note of a call, as its Result has it."""
    assigned_LE = assigned_LE[self._place_L]
    self._tokens_LE += assigned_LE
    self._recent_LE = _KEEP * self._recent_LE + assigned_LE
    self._dropped += int(dropped_L.sum())

  def load(self) -> ExpertLoad:
    """Returns the sums so far."""
    return ExpertLoad(
      self._tokens_LE.copy(),
      monitor.load_share(self._recent_LE),
      monitor.max_over_mean(self._recent_LE),
      self._dropped,
    )
