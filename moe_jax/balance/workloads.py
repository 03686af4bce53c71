"""Streams of router scores whose load is uneven in ways that training meets.

Tokens have types, types prefer experts, and experts are popular; how popular, and how that changes,
is what tells the workloads apart. Everything follows from the seed. Knows scores; must not know
policies, models or devices.

Letters: U micro-batches, V token types.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

_NUM_TYPES = 16
_PREFERENCE = 0.5  # standard deviation over types of an expert's log-popularity
_CONCENTRATION = 20.0  # of the mix of types; higher is the same in every micro-batch
_BURST_TOKENS_FACTOR, _BURST_MICRO_BATCHES = 8.0, 4
_JUMP_MICRO_BATCHES, _HOT_FACTOR = 6, 12.0


class Sizes(NamedTuple):
  """Of a stream."""

  layers: int
  experts: int
  choices: int
  tokens: int
  micro_batches: int


class MicroBatch(NamedTuple):
  """Scores of one micro-batch.

  Attributes:
    scores_LTE: the router's, before any bias; log-popularity and noise.
    tokens_V: how often each type occurs.
  """

  scores_LTE: np.ndarray
  tokens_V: np.ndarray


def _even(sizes: Sizes, random) -> np.ndarray:
  return np.zeros((sizes.micro_batches, sizes.layers, sizes.experts))


def _zipf(exponent: float) -> Callable:
  def popularity(sizes: Sizes, random) -> np.ndarray:
    rank_E = random.permutation(sizes.experts)
    return np.zeros((sizes.micro_batches, sizes.layers, 1)) - exponent * np.log1p(rank_E)

  return popularity


def _drift(sizes: Sizes, random) -> np.ndarray:
  """From one Zipf 1.0 to another, and on to a third."""
  keys = np.stack([-np.log1p(random.permutation(sizes.experts)) for _ in range(3)])
  at_U = np.linspace(0, 2, sizes.micro_batches)
  low_U = np.minimum(at_U.astype(int), 1)
  part_U1 = (at_U - low_U)[:, None]
  popularity_UE = (1 - part_U1) * keys[low_U] + part_U1 * keys[low_U + 1]
  return np.repeat(popularity_UE[:, None], sizes.layers, 1)


def _bursts(sizes: Sizes, random) -> np.ndarray:
  popularity_ULE = _even(sizes, random)
  for start in range(0, sizes.micro_batches, 3 * _BURST_MICRO_BATCHES):
    first = start + random.integers(2 * _BURST_MICRO_BATCHES)
    for layer in range(sizes.layers):
      expert = random.integers(sizes.experts)
      burst = slice(first, first + _BURST_MICRO_BATCHES)
      popularity_ULE[burst, layer, expert] += np.log(_BURST_TOKENS_FACTOR)
  return popularity_ULE


def _jumping(sizes: Sizes, random) -> np.ndarray:
  popularity_ULE = _even(sizes, random)
  for start in range(0, sizes.micro_batches, _JUMP_MICRO_BATCHES):
    for layer in range(sizes.layers):
      expert = random.integers(sizes.experts)
      popularity_ULE[start : start + _JUMP_MICRO_BATCHES, layer, expert] += np.log(_HOT_FACTOR)
  return popularity_ULE


def _per_layer(sizes: Sizes, random) -> np.ndarray:
  skew_L1 = np.linspace(0, 1.5, sizes.layers)[:, None]
  rank_LE = np.stack([random.permutation(sizes.experts) for _ in range(sizes.layers)])
  return np.repeat((-skew_L1 * np.log1p(rank_LE))[None], sizes.micro_batches, 0)


# (sizes, random) -> log-popularity_ULE
WORKLOADS: Mapping[str, Callable[[Sizes, np.random.Generator], np.ndarray]] = {
  "even": _even,
  "zipf 0.5": _zipf(0.5),
  "zipf 1": _zipf(1.0),
  "zipf 1.5": _zipf(1.5),
  "zipf 2": _zipf(2.0),
  "drift": _drift,
  "bursts": _bursts,
  "jumping": _jumping,
  "per layer": _per_layer,
}


def stream(name: str, sizes: Sizes, seed: int = 0) -> Iterator[MicroBatch]:
  """Yields the micro-batches of a workload.

  Raises:
    ValueError: no workload of that name.
  """
  if name not in WORKLOADS:
    raise ValueError(f"workload={name!r} is not one of {', '.join(WORKLOADS)}")
  random = np.random.default_rng([seed, list(WORKLOADS).index(name)])
  popularity_ULE = WORKLOADS[name](sizes, random)
  shape = (sizes.layers, _NUM_TYPES, sizes.experts)
  prefers_LVE = 0.0 if name == "even" else random.normal(0, _PREFERENCE, shape)
  prefers_LVE = np.broadcast_to(prefers_LVE, shape).astype(np.float32)
  for popularity_LE in popularity_ULE:
    mix_V = random.dirichlet(np.full(_NUM_TYPES, _CONCENTRATION / _NUM_TYPES))
    type_T = random.choice(_NUM_TYPES, sizes.tokens, p=mix_V)
    # With Gumbel noise the largest scores are a draw, without replacement, by popularity.
    scores_LTE = random.random((sizes.layers, sizes.tokens, sizes.experts), np.float32)
    np.log(scores_LTE + np.float32(1e-20), out=scores_LTE)
    np.negative(np.log(-scores_LTE + np.float32(1e-12)), out=scores_LTE)
    scores_LTE += popularity_LE[:, None].astype(np.float32) + prefers_LVE[:, type_T]
    yield MicroBatch(scores_LTE, np.bincount(type_T, minlength=_NUM_TYPES))


def choose(scores_LTE: np.ndarray, num_choices: int) -> np.ndarray:
  """Returns counts_LE: for how many tokens each expert is among the `num_choices` best."""
  num_layers, _, num_experts = scores_LTE.shape
  left_LTE = scores_LTE.copy() if num_choices > 1 else scores_LTE
  counts = 0
  for choice in range(num_choices):
    # Several times faster than a partition of so short rows.
    best_LT = left_LTE.argmax(-1)
    if choice < num_choices - 1:
      np.put_along_axis(left_LTE, best_LT[..., None], -np.inf, -1)
    flat = best_LT + np.arange(num_layers)[:, None] * num_experts
    counts = counts + np.bincount(flat.ravel(), minlength=num_layers * num_experts)
  return counts.reshape(num_layers, -1)
