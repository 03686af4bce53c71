"""How long one collective takes over the links of a cluster, by algorithm.

NCCL's own way to choose: the fastest of the algorithms and protocols that can do it, by what a
collective and its steps take at least, and bytes over the slowest link. Knows groups of GPUs and
bytes; must not know models, or when a collective runs.

Source: NCCL 2.30, src/graph/tuning.cc, ncclTopoTuneModel and ncclTopoGetAlgoTime, but for links'
bandwidth, which is the vendor's here.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from moe_jax.config import Mesh
from moe_jax.plan import protocols
from moe_jax.plan.hardware import Chip
from moe_jax.plan.protocols import Protocol

INSIDE, BETWEEN = "inside", "between"  # hosts
# Outermost first, as parallel.axes.ALL: a test holds it.
AXES = ("data", "stage", "expert", "tensor")
_SENT: Mapping[str, Callable[[int], float]] = {
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-gather": lambda n: n - 1,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1 if n > 1 else 0,
}
KINDS = tuple(_SENT)
_BY_RING = ("all-reduce", "all-gather", "reduce-scatter")


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
    "data": mesh.data, "stage": mesh.stage, "hosts": mesh.expert // ranks, "ranks": ranks,
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


def seconds(
  kind: str, operand_bytes: float, to: Group, chip: Chip, is_symmetric: bool = False
) -> float:
  """Returns the seconds of a collective by the fastest algorithm and protocol.

  Args:
    kind: one of KINDS.
    operand_bytes: what this device puts in.
    to: who takes part.
    chip: of each.
    is_symmetric: whether what is sent lies in memory that they registered with each other.
  """
  if to.size == 1:
    return 0.0
  algorithms = (*_ALGORITHMS[kind], *((_symmetric,) if is_symmetric else ()))
  return min(
    found_s for algorithm in algorithms for found_s in algorithm(kind, operand_bytes, to, chip)
  )


def _ring(kind: str, operand_bytes: float, to: Group, chip: Chip) -> Iterator[float]:
  """All-gather, reduce-scatter or all-reduce in steps from neighbour to neighbour."""
  rounds = 2 if kind == "all-reduce" else 1
  sent = bytes_sent(kind, operand_bytes, to.size)
  wire_s = _wire_seconds(kind, operand_bytes, to, chip)
  for protocol in chip.protocols.ring:
    inside_s = protocol.inside_s
    if to.num_hosts > 1:
      inside_s = max(inside_s, protocol.posting_s)
    between_s = protocol.alone_s if to.per_host == 1 else protocol.between_s
    latency_s = protocol.base_s + rounds * (
      (to.size - to.num_hosts) * inside_s + (to.num_hosts - 1) * between_s
    )
    if rounds == 2 and to.num_hosts > 1 and protocol is chip.protocols.ring[-1]:
      latency_s *= chip.protocols.plateau
    yield latency_s + _at_rate(protocol, sent, wire_s, to, chip)


def _tree(kind: str, operand_bytes: float, to: Group, chip: Chip) -> Iterator[float]:
  """All-reduce up a tree of hosts and down again: all bytes go both ways."""
  sent = 2 * operand_bytes
  rate = chip.inside_bytes_per_s if to.per_host > 1 else math.inf
  if to.num_hosts > 1:
    rate = min(rate, to.per_host * chip.between_bytes_per_s)
  size = max(int(operand_bytes) // 64, 1).bit_length() - 1
  for protocol in chip.protocols.tree:
    of_size = protocol.by_size[size] if size < len(protocol.by_size) else 1.0
    between_s = protocol.alone_s if to.per_host == 1 else protocol.between_s
    latency_s = protocol.base_s + 2 * (
      (to.per_host - 1) * protocol.inside_s + _log2(to.num_hosts) * between_s
    )
    yield latency_s + _at_rate(protocol, sent, sent / rate, to, chip) / of_size


def _pat(kind: str, operand_bytes: float, to: Group, chip: Chip) -> Iterator[float]:
  """All-gather or reduce-scatter in as many steps as a tree is high, one GPU on each host."""
  protocol = chip.protocols.pat
  if protocol is None or to.per_host > 1:
    return
  steps_s = _log2(to.num_hosts) * protocol.alone_s / protocols.PAT_STEPS_AT_ONCE
  latency_s = protocol.base_s + steps_s + to.size * protocols.PAT_PER_RANK_S
  yield latency_s + _wire_seconds(kind, operand_bytes, to, chip) / protocol.fraction


def _direct(kind: str, operand_bytes: float, to: Group, chip: Chip) -> Iterator[float]:
  """All-to-all or permutation: each sends to each at once, a message posted after the other."""
  message = operand_bytes / (1 if kind == "collective-permute" else to.size)
  is_small = message <= chip.protocols.small_bytes
  protocol = chip.protocols.small_direct if is_small else chip.protocols.direct
  latency_s = protocol.base_s + (protocol.between_s if to.num_hosts > 1 else protocol.inside_s)
  sent = bytes_sent(kind, operand_bytes, to.size)
  wire_s = _wire_seconds(kind, operand_bytes, to, chip)
  leaving = 1 if kind == "collective-permute" else to.size - to.per_host
  posting_s = leaving * protocol.posting_s if to.num_hosts > 1 else 0.0
  yield latency_s + max(_at_rate(protocol, sent, wire_s, to, chip), posting_s)


def _symmetric(kind: str, operand_bytes: float, to: Group, chip: Chip) -> Iterator[float]:
  """All-gather, reduce-scatter or all-reduce inside a host, by kernels that read and write the
  memory of the others.
  """
  if to.num_hosts > 1 or kind not in _BY_RING:
    return
  whole = operand_bytes * (1 if kind == "reduce-scatter" else to.size)
  sent = bytes_sent(kind, operand_bytes, to.size)
  for each in chip.protocols.symmetric:
    moved = whole * each.times if each.times > 1 else sent
    wire_s = moved / min(each.bytes_per_s, chip.inside_bytes_per_s)
    # Of the bytes a first microsecond hides in the base, smoothly.
    beyond = (wire_s - protocols.HIDDEN_S) / protocols.HIDDEN_S
    yield each.base_s + protocols.HIDDEN_S * (beyond + math.log1p(math.exp(-beyond)))


_ALGORITHMS: Mapping[str, tuple[Callable[[str, float, Group, Chip], Iterator[float]], ...]] = {
  "all-reduce": (_ring, _tree),
  "all-gather": (_ring, _pat),
  "reduce-scatter": (_ring, _pat),
  "all-to-all": (_direct,),
  "collective-permute": (_direct,),
}


def _at_rate(protocol: Protocol, sent: float, wire_s: float, to: Group, chip: Chip) -> float:
  """Returns the seconds of bytes that take `wire_s` at full bandwidth, at a protocol's."""
  found_s = wire_s / protocol.fraction
  if not protocol.is_low_latency:
    return found_s
  most = chip.low_latency_bytes_per_s
  if to.num_hosts > 1:
    most = protocols.LOW_LATENCY_BETWEEN[to.num_hosts > 2]
  return max(found_s, sent / most)


def _log2(number: int) -> int:
  return number.bit_length() - 1


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
