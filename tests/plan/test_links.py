"""Collectives' time and bytes: by hand, and against what the rehearsal says of the same ones."""

import itertools
import math

import numpy as np
import pytest

from moe_jax.config import Mesh
from moe_jax.parallel import axes
from moe_jax.plan import links
from moe_jax.plan.hardware import CHIPS
from moe_jax.rehearse import timing
from moe_jax.rehearse.groups import Groups
from moe_jax.rehearse.program import Collective

POD64 = Mesh(expert=8, tensor=4, stage=2)
SETS = [("expert",), ("tensor",), ("stage",), ("expert", "tensor"), ("stage", "tensor"), axes.ALL]


def test_axes_are_those_of_the_mesh():
  assert links.AXES == axes.ALL


@pytest.mark.parametrize("along", SETS, ids="+".join)
def test_groups_are_where_the_devices_lie(along):
  found = links.group(POD64, along, 4)
  ids = np.arange(64).reshape(2, 8, 4)
  index = tuple(slice(None) if name in along else 0 for name in axes.ALL)
  hosts, each = np.unique(ids[index].reshape(-1) // 4, return_counts=True)
  assert found == (ids[index].size, len(hosts), each.max())


@pytest.mark.parametrize("chip", ["h100", "a100", "planned"])
@pytest.mark.parametrize("kind", [k for k in links.KINDS if k != "collective-permute"])
def test_seconds_and_bytes_are_the_rehearsals(kind, chip):
  for along, operand_bytes in itertools.product(SETS, (4, 100_000, 10_000_000)):
    to = links.group(POD64, along, 4)
    ids = np.arange(64).reshape(2, 8, 4)
    inner = [axes.ALL.index(name) for name in along]
    outer = [i for i in range(3) if i not in inner]
    members = ids.transpose(outer + inner).reshape(-1, to.size)
    groups = Groups(tuple(map(tuple, members.tolist())), along, True)
    same = Collective("c", "other", kind, True, operand_bytes, groups, False)
    assert links.bytes_sent(kind, operand_bytes, to.size) == pytest.approx(same.bytes_sent)
    assert links.seconds(kind, operand_bytes, to, CHIPS[chip]) == pytest.approx(
      timing.collective_seconds(same, CHIPS[chip], 4)
    )
    assert to.link == timing.link_of(same, 4)


def test_a_permutation_between_hosts():
  pairs = Groups(((0, 32), (32, 0)), ("stage",), True)
  same = Collective("c", "other", "collective-permute", True, 500_000, pairs, False)
  found = links.seconds("collective-permute", 500_000, links.Group(2, 2, 1), CHIPS["h100"])
  assert found == pytest.approx(timing.collective_seconds(same, CHIPS["h100"], 4))
  # 500 kB at 50 GB/s take 10 us: with protocol Simple 14 us later, 24 us; with LL, which sends as
  # many flags as bytes, 20 us and 2.7 us of latency.
  assert found == pytest.approx(20e-6 + 2.7e-6)


def test_hierarchical_all_reduce_sends_a_share_between_hosts():
  """128 GPUs on 16 hosts: 1 GB takes a ring of one adapter 2 x 15/16 x 1 GB / 50 GB/s = 37.5 ms;
  with 8 adapters each an eighth of that, and 2 x 7/8 x 1 GB / 450 GB/s inside."""
  to = links.Group(128, 16, 8)
  found = links.ALGORITHMS["hierarchical"]("all-reduce", 1e9, to, CHIPS["h100"])
  wire_s = 0.0375 / 8 + 2 * 7 / 8 * 1e9 / 450e9
  steps_s = 2 * 7 * 3.4e-6 + 2 * math.log2(16) * 14e-6
  assert found == pytest.approx(wire_s + steps_s, rel=0.01)


def test_one_device_sends_nothing():
  for kind in links.KINDS:
    assert links.seconds(kind, 1e9, links.Group(1, 1, 1), CHIPS["h100"]) == 0
    assert links.bytes_sent(kind, 1e9, 1) == 0
