"""Every dispatch on every mesh and load: values and gradients are those of the dense one, which are
those of a loop; nothing is lost in silence; the programs talk as their docstrings say.
"""

import functools

import numpy as np
import pytest

from moe_jax import config
from moe_jax.moe import capacity, dropless
from moe_jax.moe.dispatch import DISPATCH
from moe_jax.moe.exchange import EXCHANGE
from tests.moe import served

MESHES = [(1, 8), (2, 4), (4, 2), (8, 1)]
NUM_DEVICES, NUM_TOKENS = 8, 256
HERE = NUM_TOKENS // NUM_DEVICES
E, K = served.NUM_EXPERTS, served.NUM_CHOICES
# With room for an even load and no more; with less room than that, so that spilling drops too.
SETTINGS = {
  "dense": {"dispatch": "dense"},
  "capacity": {"dispatch": "capacity", "capacity_factor": 1.0},
  "spill": {"dispatch": "capacity", "capacity_factor": 0.75, "spill": True},
  "dropless": {"dispatch": "dropless", "capacity_factor": 1.0},
  "ragged": {"dispatch": "ragged", "capacity_factor": 1.0},
  "gathered": {"dispatch": "gathered"},
}
WITHOUT_LOSS = ("dropless", "ragged")
CASES = [
  *((mesh, name, "hierarchical") for mesh in MESHES for name in SETTINGS),
  # Where one of the axes has size 1 the two exchanges are one.
  *(
    (mesh, name, "flat")
    for mesh in [(2, 4), (4, 2)]
    for name in SETTINGS
    if name not in ("ragged", "gathered")
  ),
]


def test_config_knows_the_same_names():
  assert set(config.DISPATCH) == set(DISPATCH)
  assert set(config.EXCHANGE) == set(EXCHANGE)


@functools.cache
def case(load, num_ranks):
  return served.case(load, NUM_TOKENS, num_ranks if load == "all_to_one_device" else 1)


def run(mesh, name, exchange, load):
  moe_config = config.Moe(exchange=exchange, **SETTINGS[name])
  return served.program(mesh, moe_config)(*case(load, mesh[0]))


@functools.cache
def oracle(mesh):
  return served.program(mesh, config.Moe(**SETTINGS["dense"]))


@pytest.mark.parametrize(("mesh", "name", "exchange"), CASES)
def test_dispatch_equals_dense_and_loses_nothing_in_silence(mesh, name, exchange):
  for load in served.LOADS:
    given = case(load, mesh[0])
    found = run(mesh, name, exchange, load)
    as_served = given._replace(experts_TK=found.expert_TK)
    if name == "dense":
      expected = served.loop(*as_served)
    else:
      expected = oracle(mesh)(*as_served)[:2]
    served.check(found[:2], expected)
    check_counts(load, mesh, name, given, found)


def check_counts(load, mesh, name, given, found):
  by_device = lambda array: np.asarray(array).reshape(NUM_DEVICES, HERE, K)
  expert, chosen = by_device(found.expert_TK), by_device(given.experts_TK)
  counts = found.counts
  np.testing.assert_array_equal(counts.sent, HERE * K)
  np.testing.assert_array_equal(counts.sent, counts.kept + counts.spilled + counts.dropped)
  np.testing.assert_array_equal(counts.kept, (expert == chosen).sum((1, 2)))
  np.testing.assert_array_equal(counts.dropped, (expert == E).sum((1, 2)))
  np.testing.assert_array_equal(counts.padded, rows(mesh, name, counts) - served_of(counts))
  if name in ("dense", "gathered", *WITHOUT_LOSS):
    np.testing.assert_array_equal(expert, chosen)
  else:
    factor = SETTINGS[name]["capacity_factor"]
    num_rows = capacity.rows_per_expert(HERE, K, E, factor)
    load_XE = np.stack([np.bincount(e.reshape(-1), minlength=E + 1)[:E] for e in expert])
    assert load_XE.max() <= num_rows
    assert (counts.dropped.sum() > 0) == ((name, load) != ("capacity", "even"))
    assert (counts.spilled.sum() > 0) == (name == "spill" and load != "even")
  np.testing.assert_array_equal(counts.rounds, rounds(mesh, name, chosen))
  if name in WITHOUT_LOSS and mesh[0] > 1:
    assert (counts.rounds[0] == 1) == (load == "even")


def served_of(counts):
  return counts.kept + counts.spilled


def rows(mesh, name, counts):
  """Returns how many rows each device sends, in all rounds."""
  if name in ("dense", "gathered"):
    return E * HERE
  factor = SETTINGS[name]["capacity_factor"]
  if name in WITHOUT_LOSS:
    return counts.rounds * mesh[0] * dropless.rows_per_rank(HERE, K, mesh[0], factor)
  return E * capacity.rows_per_expert(HERE, K, E, factor)


def rounds(mesh, name, chosen):
  """Returns how many rounds the fullest queue of any device takes."""
  if name not in WITHOUT_LOSS:
    return 1
  ranks = chosen // (E // mesh[0])
  longest = max(np.bincount(each.reshape(-1)).max() for each in ranks)
  return -(-longest // dropless.rows_per_rank(HERE, K, mesh[0], 1.0))
