"""How long one collective takes over the links of a cluster, by algorithm.

NCCL's own way to choose: the fastest of the algorithms and protocols that can do it, by latency of
steps and bytes over the slowest link. Knows groups of GPUs and bytes; must not know models, or when
a collective runs.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from moe_jax.config import Mesh
from moe_jax.plan.hardware import Chip

INSIDE, BETWEEN = "inside", "between"  # hosts
AXES = ("stage", "expert", "tensor")  # outermost first, as parallel.axes.ALL; a test holds it
# NCCL sends small messages by protocol LL, half of whose bytes are flags, with less latency.
# Source: NCCL, src/graph/tuning.cc: hwLat of LL for NVLink; for the network, as a ring and a tree.
_LL_FRACTION, _LL_INSIDE_S, _LL_RING_S, _LL_TREE_S = 0.5, 0.6e-6, 2.7e-6, 5e-6
_SENT: Mapping[str, Callable[[int], float]] = {
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-gather": lambda n: n - 1,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1 if n > 1 else 0,
}
KINDS = tuple(_SENT)


class Group(NamedTuple):
  """Those that take part in one collective.

  Attributes:
    size: GPUs.
    num_hosts: that they lie on.
    per_host: GPUs on the host with most.
  """

  size: int
  num_hosts: int
  per_host: int

  @property
  def link(self) -> str:
    """The slowest link that the group crosses."""
    return BETWEEN if self.num_hosts > 1 else INSIDE


@functools.cache
def group(
  mesh: Mesh,
  axes: tuple[str, ...],
  gpus_per_host: int,
  among: str = "",
  ranks_per_host: int = 1,
) -> Group:
  """Returns the widest group of GPUs that differ along `axes` alone, `tensor` innermost.

  Args:
    mesh: sizes of the axes.
    axes: of AXES.
    gpus_per_host: consecutive GPUs share a host.
    among: of `expert` only one rank of each host, "hosts", or those of one host, "ranks".
    ranks_per_host: consecutive ranks of `expert` that share a host, where `among` is given.
  """
  ranks = ranks_per_host if among else mesh.expert
  sizes = {
    "stage": mesh.stage, "hosts": mesh.expert // ranks, "ranks": ranks,
    "tensor": mesh.tensor,
  }  # fmt: skip
  parts = {"expert": (among,) if among else ("hosts", "ranks")}
  axes = tuple(part for axis in axes for part in parts.get(axis, (axis,)))
  ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
  inner = [i for i, name in enumerate(sizes) if name in axes]
  outer = [i for i in range(len(sizes)) if i not in inner]
  size = math.prod(sizes[name] for name in sizes if name in axes)
  members = ids.transpose(outer + inner).reshape(-1, size)
  found = (0, 0)
  # Groups repeat from host to host; a few of them show every way in which one can lie.
  for ranks in members[: 4 * gpus_per_host]:
    _, per_host = np.unique(ranks // gpus_per_host, return_counts=True)
    found = max(found, (len(per_host), int(per_host.max())))
  return Group(size, *found)


def bytes_sent(kind: str, operand_bytes: float, size: int) -> float:
  """Returns the bytes that each device sends: by a ring, or for all-to-all directly.

  Args:
    kind: one of KINDS.
    operand_bytes: what this device puts in.
    size: devices of the group.
  """
  return operand_bytes * _SENT[kind](size)


def seconds(kind: str, operand_bytes: float, to: Group, chip: Chip) -> float:
  """Returns the seconds of a collective by the fastest of NCCL's algorithms and protocols.

  Source: NCCL, src/graph/tuning.cc, ncclTopoTuneModel.
  """
  if to.size == 1:
    return 0.0
  return min(ALGORITHMS[name](kind, operand_bytes, to, chip) for name in _CHOICES[kind])


def _ring(kind: str, operand_bytes: float, to: Group, chip: Chip) -> float:
  """All-gather, reduce-scatter or all-reduce in steps from neighbour to neighbour."""
  rounds = 2 if kind == "all-reduce" else 1
  steps = (rounds * (to.size - to.num_hosts), rounds * (to.num_hosts - 1))
  return _by_protocol(steps, _LL_RING_S, _wire_seconds(kind, operand_bytes, to, chip), chip)


def _tree(kind: str, operand_bytes: float, to: Group, chip: Chip) -> float:
  """All-reduce up a tree of hosts and down again."""
  steps = (2 * (to.per_host - 1), 2 * math.ceil(math.log2(to.num_hosts)))
  return _by_protocol(steps, _LL_TREE_S, _wire_seconds(kind, operand_bytes, to, chip), chip)


def _direct(kind: str, operand_bytes: float, to: Group, chip: Chip) -> float:
  """All-to-all or permutation: each sends to each at once."""
  steps = (0, 1) if to.num_hosts > 1 else (1, 0)
  return _by_protocol(steps, _LL_RING_S, _wire_seconds(kind, operand_bytes, to, chip), chip)


def _hierarchical(kind: str, operand_bytes: float, to: Group, chip: Chip) -> float:
  """All-reduce as reduce-scatter inside, all-reduce of the shares between hosts, all-gather inside.

  Each GPU of a host brings its own share over its own adapter.
  """
  inner, outer = Group(to.per_host, 1, to.per_host), Group(to.num_hosts, to.num_hosts, 1)
  share = operand_bytes / to.per_host
  return (
    seconds("reduce-scatter", operand_bytes, inner, chip)
    + seconds("all-reduce", share, outer, chip)
    + seconds("all-gather", share, inner, chip)
  )


ALGORITHMS: Mapping[str, Callable[[str, float, Group, Chip], float]] = {
  "ring": _ring,
  "tree": _tree,
  "direct": _direct,
  "hierarchical": _hierarchical,
}
_CHOICES: Mapping[str, tuple[str, ...]] = {
  "all-reduce": ("ring", "tree"),
  "all-gather": ("ring",),
  "reduce-scatter": ("ring",),
  "all-to-all": ("direct",),
  "collective-permute": ("direct",),
}


def _by_protocol(steps: tuple[int, int], ll_between_s: float, wire_s: float, chip: Chip) -> float:
  inside, between = steps
  protocols = (
    (1.0, chip.inside_latency_s, chip.between_latency_s),
    (_LL_FRACTION, _LL_INSIDE_S, ll_between_s),
  )
  return min(
    inside * inside_s + between * between_s + wire_s / fraction
    for fraction, inside_s, between_s in protocols
  )


def _wire_seconds(kind: str, operand_bytes: float, to: Group, chip: Chip) -> float:
  """Returns the seconds of the bytes at full bandwidth.

  A ring goes from host to host through as many adapters as it has GPUs there, for as many rings run
  at once. Of an all-to-all among n GPUs, k on each host, (n - k) / n leave the host.
  """
  sent = bytes_sent(kind, operand_bytes, to.size)
  if to.num_hosts == 1:
    return sent / chip.inside_bytes_per_s
  if kind == "collective-permute":
    return sent / chip.between_bytes_per_s
  if kind == "all-to-all":
    leaving = operand_bytes * (to.size - to.per_host) / to.size
    return max(leaving / chip.between_bytes_per_s, (sent - leaving) / chip.inside_bytes_per_s)
  inside_s = sent / chip.inside_bytes_per_s if to.per_host > 1 else 0.0
  return max(inside_s, sent / to.per_host / chip.between_bytes_per_s)
