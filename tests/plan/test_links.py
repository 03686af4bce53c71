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
COPIES = Mesh(expert=4, tensor=2, stage=2, data=4)  # two groups of `tensor` on each host
MESHES = pytest.mark.parametrize("mesh", [POD64, COPIES], ids=str)
SETS = [
  ("expert",), ("tensor",), ("stage",), ("data",), ("expert", "tensor"), ("stage", "tensor"),
  ("data", "expert"), axes.TOKENS, axes.ALL,
]  # fmt: skip


def members(mesh, along):
  """Devices of the groups along some axes, [groups, size]."""
  sizes = [getattr(mesh, name) for name in axes.ALL]
  inner = [axes.ALL.index(name) for name in along]
  outer = [i for i in range(len(sizes)) if i not in inner]
  size = math.prod(sizes[i] for i in inner)
  return np.arange(mesh.num_devices).reshape(sizes).transpose(outer + inner).reshape(-1, size)


def test_axes_are_those_of_the_mesh():
  assert links.AXES == axes.ALL


@MESHES
@pytest.mark.parametrize("along", SETS, ids="+".join)
def test_groups_are_where_the_devices_lie(along, mesh):
  found = links.group(mesh, along, 4)
  ids = members(mesh, along)[0]
  hosts, each = np.unique(ids // 4, return_counts=True)
  assert found == (ids.size, len(hosts), each.max())


def test_copies_of_a_mesh_lie_on_other_hosts():
  """A copy has 16 GPUs, four hosts of four: each GPU of a host meets its like on four hosts."""
  assert links.group(COPIES, ("data",), 4) == links.Group(4, 4, 1)
  assert links.group(COPIES, ("data", "expert"), 4) == links.Group(16, 8, 2)


@MESHES
@pytest.mark.parametrize("chip", ["h100", "a100", "planned"])
@pytest.mark.parametrize("kind", [k for k in links.KINDS if k != "collective-permute"])
def test_seconds_and_bytes_are_the_rehearsals(kind, chip, mesh):
  for along, operand_bytes in itertools.product(SETS, (4, 100_000, 10_000_000)):
    to = links.group(mesh, along, 4)
    groups = Groups(tuple(map(tuple, members(mesh, along).tolist())), along, True)
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
  # 500 kB at 50 GB/s take 10 us, after 8.4 us to begin and 14 us of a step.
  assert found == pytest.approx(32.4e-6)
  # 30 kB go by Simple too, 16 kB by LL, which sends as many flags as bytes: 6.6 + 2.7 us and 0.66,
  # or 0.8 at 20.4 GB/s of many hosts; but the message takes 1 us to post, each of seven one.
  small = lambda kind, kilobytes, hosts: links.seconds(
    kind, kilobytes * 1024, links.Group(hosts, hosts, 1), CHIPS["h100"]
  )
  assert small("collective-permute", 32, 2) == pytest.approx(22.4e-6 + 3e-6)
  assert small("collective-permute", 16, 2) == pytest.approx(9.3e-6 + 1e-6)
  assert small("all-to-all", 8 * 16, 8) == pytest.approx(9.3e-6 + 7e-6)


@pytest.mark.parametrize(
  ("megabytes", "expected_us"),
  [
    # Each of four GPUs sends three times what it has; 450 GB/s, with LL 141 and LL128 92%.
    (0.1, 6.6 + 3 * 0.6 + 0.3e6 / 141e3),  # LL
    (1.0, 8.4 + 3 * 3.4 + 3e6 / 450e3),  # Simple
    (0.8, 8.4 + 3 * 3.4 + 2.4e6 / 450e3),  # LL128: 14 + 3 x 1.9 + 5.8, longer
  ],
)
def test_a_gather_inside_a_host_takes_the_fastest_protocol(megabytes, expected_us):
  to = links.Group(4, 1, 4)
  found = links.seconds("all-gather", megabytes * 1e6, to, CHIPS["h100"])
  assert found == pytest.approx(expected_us * 1e-6)


def test_a_tree_is_slower_for_some_sizes():
  """All-reduce of 512 kB = 64 B x 2^13 over 16 hosts of one GPU: with LL128 14 + 2 x 4 x 8.5 us,
  and twice the bytes at 50 GB/s x 0.92 x 120/128 x 0.6."""
  to = links.Group(16, 16, 1)
  found = links.seconds("all-reduce", 64 * 2**13, to, CHIPS["h100"])
  wire_us = 2 * 64 * 2**13 / (50e3 * 0.92 * 120 / 128 * 0.6)
  assert found == pytest.approx((14 + 8 * 8.5 + wire_us) * 1e-6)


def test_registered_memory_shortens_what_stays_inside_a_host():
  """NCCL's kernels for it: 7.8 us and softplus of the bytes' time less 1 us, at 343.6 GB/s; of few
  bytes 4.5 us, nine times as many bytes."""
  inside, across = links.Group(4, 1, 4), links.Group(8, 2, 4)
  take = lambda kind, operand_bytes, to: [
    links.seconds(kind, operand_bytes, to, CHIPS["h100"], is_symmetric) * 1e6
    for is_symmetric in (False, True)
  ]
  soft = lambda wire_us: math.log1p(math.exp(wire_us - 1))
  bytes_per_us = 320 * 2**30 / 1e6
  for kind, operand_bytes in (("all-gather", 5e5), ("reduce-scatter", 2e6)):
    plain, registered = take(kind, operand_bytes, inside)
    assert registered == pytest.approx(7.8 + soft(1.5e6 / bytes_per_us))
    assert registered < 0.6 * plain
  assert take("all-reduce", 4, inside)[1] == pytest.approx(4.5 + soft(0), abs=1e-3)
  assert take("all-gather", 5e5, across)[0] == take("all-gather", 5e5, across)[1]
  assert take("all-to-all", 5e5, inside)[0] == take("all-to-all", 5e5, inside)[1]
  plain, registered = take("all-gather", 1e8, inside)
  assert plain == registered  # a ring reaches more of the link


def test_one_device_sends_nothing():
  for kind in links.KINDS:
    assert links.seconds(kind, 1e9, links.Group(1, 1, 1), CHIPS["h100"]) == 0
    assert links.bytes_sent(kind, 1e9, 1) == 0
