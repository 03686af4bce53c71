"""The load of the next window, and how far each way to foresee it can be trusted.

A window is a number of micro-batches. Every forecaster is one function of what was and of the
tokens that come next, which are known before they are routed; each is judged by what it would have
said at every window so far (walk-forward), and the best by that record speaks. Knows counts and
token types; must not know models or where counts come from.

Letters: W windows so far, V token types.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

_AVERAGE_WINDOWS = 8  # over which the moving average forgets all but 1/e
_TREND_WINDOWS = 6  # through which the line is drawn
_AFFINITY_WINDOWS = 64
_RIDGE = 0.02  # of the mean variance of a token type's share
_MARGIN = 0.002  # of accuracy; a forecaster must be this much better than a simpler one


class History(NamedTuple):
  """What was observed.

  Attributes:
    counts_WLE: tokens of each window at each expert.
    tokens_WV: how often each type of token occurred in each window.
  """

  counts_WLE: np.ndarray
  tokens_WV: np.ndarray


Forecaster = Callable[[History, np.ndarray], np.ndarray]


def last(history: History, next_V: np.ndarray) -> np.ndarray:
  """Returns share_LE: as in the last window."""
  del next_V
  return _shares(history.counts_WLE[-1])


def average(history: History, next_V: np.ndarray) -> np.ndarray:
  """Returns share_LE: the exponentially weighted mean of all windows."""
  del next_V
  return np.einsum("w,wle->le", _weights(len(history.counts_WLE)), _shares(history.counts_WLE))


def trend(history: History, next_V: np.ndarray) -> np.ndarray:
  """Returns share_LE: the least-squares line through the last windows, one window on."""
  del next_V
  share_WLE = _shares(history.counts_WLE[-_TREND_WINDOWS:])
  num_windows = len(share_WLE)
  if num_windows < 3:
    return share_WLE[-1]
  time_W = np.arange(num_windows) - (num_windows - 1) / 2
  slope_LE = np.einsum("w,wle->le", time_W, share_WLE) / (time_W**2).sum()
  ahead_LE = np.maximum(share_WLE.mean(0) + slope_LE * (time_W[-1] + 1), 0)
  return _shares(ahead_LE)


def affinity(history: History, next_V: np.ndarray) -> np.ndarray:
  """Returns share_LE from which experts which tokens prefer, and the tokens that come next.

  Ridge regression of the experts' shares on the token types' shares, about the moving average: what
  the tokens do not explain is left to that.
  """
  recent = History(*(array[-_AFFINITY_WINDOWS:] for array in history))
  share_WLE, type_WV = _shares(recent.counts_WLE), _shares(recent.tokens_WV)
  weight_W = _weights(len(share_WLE))
  mean_LE = np.einsum("w,wle->le", weight_W, share_WLE)
  mean_V = weight_W @ type_WV
  # All windows teach alike which experts a token prefers; their mean is the recent one.
  off_WV, off_WLE = type_WV - type_WV.mean(0), share_WLE - share_WLE.mean(0)
  # In the windows' space: they are fewer than the token types.
  gram_WW = off_WV @ off_WV.T
  ridge = _RIDGE * np.trace(gram_WW) + 1e-12
  along_W = np.linalg.solve(
    gram_WW + ridge * np.eye(len(gram_WW)), off_WV @ (_shares(next_V) - mean_V)
  )
  return _shares(np.maximum(mean_LE + np.einsum("w,wle->le", along_W, off_WLE), 0))


# The simplest first.
FORECAST: Mapping[str, Forecaster] = {
  "last": last,
  "average": average,
  "trend": trend,
  "affinity": affinity,
}


def accuracy(share_LE: np.ndarray, counts_LE: np.ndarray) -> float:
  """Returns 1 minus the total variation distance of forecast and fact, the mean over layers."""
  return float(1 - np.abs(share_LE - _shares(counts_LE)).sum(-1).mean() / 2)


def walk_forward(
  counts_WLE: np.ndarray, tokens_WV: np.ndarray, *, first: int = 3
) -> dict[str, np.ndarray]:
  """Returns the accuracy of each forecaster at every window from `first` on, by name.

  A window is foreseen from those before it and its own tokens, never from its own counts.
  """
  return {
    name: np.array(
      [
        accuracy(forecaster(History(counts_WLE[:w], tokens_WV[:w]), tokens_WV[w]), counts_WLE[w])
        for w in range(first, len(counts_WLE))
      ]
    )
    for name, forecaster in FORECAST.items()
  }


def best(record: Mapping[str, np.ndarray]) -> str:
  """Returns the name of the most accurate forecaster, the simplest of those nearly as good.

  Args:
    record: accuracies so far, by name, the simplest first; where there are none, the simplest.
  """
  mean = {name: float(np.mean(values)) for name, values in record.items() if len(values)}
  if not mean:
    return next(iter(record))
  enough = max(mean.values()) - _MARGIN
  return next(name for name in mean if mean[name] >= enough)


class Forecast:
  """Foresees window after window with whichever forecaster has been the best so far."""

  def __init__(self):
    self._history: History | None = None
    self._said: dict[str, np.ndarray] = {}
    self.record: dict[str, list[float]] = {name: [] for name in FORECAST}

  def observe(self, counts_LE: np.ndarray, tokens_V: np.ndarray) -> None:
    """Takes note of a window; what was said of it goes into the record."""
    for name, share_LE in self._said.items():
      self.record[name].append(accuracy(share_LE, counts_LE))
    self._said = {}
    old = self._history or History(
      np.empty((0, *np.shape(counts_LE))), np.empty((0, *np.shape(tokens_V)))
    )
    # Older windows than any forecaster looks at are forgotten.
    self._history = History(
      np.concatenate([old.counts_WLE, np.asarray(counts_LE)[None]])[-_AFFINITY_WINDOWS:],
      np.concatenate([old.tokens_WV, np.asarray(tokens_V)[None]])[-_AFFINITY_WINDOWS:],
    )

  def next(self, tokens_V: np.ndarray) -> np.ndarray:
    """Returns share_LE of the window whose tokens are these.

    Raises:
      ValueError: no window was observed yet.
    """
    if self._history is None:
      raise ValueError(
        "a forecast needs a window that was observed, got none; call observe after the first window"
      )
    self._said = {name: entry(self._history, tokens_V) for name, entry in FORECAST.items()}
    return self._said[self.best]

  @property
  def best(self) -> str:
    """The name of the forecaster that speaks."""
    return best(self.record)


def _shares(counts):
  total = counts.sum(-1, keepdims=True)
  return counts / np.where(total > 0, total, 1)


def _weights(num_windows):
  weight_W = np.exp((np.arange(num_windows) - num_windows + 1) / _AVERAGE_WINDOWS)
  return weight_W / weight_W.sum()
