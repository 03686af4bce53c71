"""Who talks to whom in a collective: its groups of devices, in every form that XLA prints.

A device is its place in the flattened mesh. Knows numbers of devices and names of axes; must not
know what is sent.

Source: CollectiveDeviceList, its iota and its mesh form, in openxla/xla, xla/hlo/ir.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}")
_MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")


class Groups(NamedTuple):
  """Groups of a collective, or the pairs of a permutation, and what they are in the mesh.

  Attributes:
    members: devices of each group, in its order; of a permutation (source, target).
    axes: mesh axes along which the devices of a group differ, outermost first.
    is_whole: whether each group holds every device along those axes.
  """

  members: tuple[tuple[int, ...], ...]
  axes: tuple[str, ...]
  is_whole: bool

  @property
  def size(self) -> int:
    """Devices of the largest group."""
    return max(map(len, self.members))

  def hosts(self, gpus_per_host: int) -> tuple[int, int]:
    """Returns (hosts, most GPUs on one host) of the group with most hosts."""
    found = (0, 0)
    for group in self.members:
      _, per_host = np.unique(np.asarray(group) // gpus_per_host, return_counts=True)
      found = max(found, (len(per_host), int(per_host.max())))
    return found


def parse(attributes: str, mesh: Mapping[str, int]) -> Groups:
  """Returns the groups that an instruction's attributes name.

  Args:
    attributes: text with replica_groups= or source_target_pairs=.
    mesh: size of each axis by name, outermost first.

  Raises:
    ValueError: a form that is not known, or a device outside the mesh.
  """
  match = re.search(r"\b(replica_groups|source_target_pairs)=", attributes)
  if not match:
    raise ValueError(f"no replica groups in {attributes[:120]!r}")
  num_devices, text = math.prod(mesh.values()), attributes[match.end() :]
  for reader in (_braces, _iota, _mesh_form):
    members = reader(text, num_devices)
    if members is not None:
      break
  else:
    raise ValueError(f"replica groups are in a form that is not known: {text[:120]!r}")
  if not 0 <= max(map(max, members)) < num_devices:
    raise ValueError(f"replica groups name a device outside of {num_devices}: {text[:120]!r}")
  return Groups(members, *_axes(members, mesh, is_pairs=match[1] == "source_target_pairs"))


def _axes(members, mesh: Mapping[str, int], is_pairs: bool) -> tuple[tuple[str, ...], bool]:
  sizes, varies, is_whole = tuple(mesh.values()), set(), True
  for group in members:
    coordinates = np.stack(np.unravel_index(np.asarray(group), sizes))
    differs = (coordinates != coordinates[:, :1]).any(1)
    varies |= set(np.flatnonzero(differs).tolist())
  for group in members:
    is_whole &= is_pairs or len(group) == math.prod(sizes[axis] for axis in varies)
  names = tuple(mesh)
  return tuple(names[axis] for axis in sorted(varies)), is_whole


def _braces(text: str, num_devices: int):
  """{{0,1},{2,3}}; {} is all devices."""
  if text.startswith("{}"):
    return (tuple(range(num_devices)),)
  match = re.match(r"\{(\{[\d, ]+\}(?:, ?\{[\d, ]+\})*)\}", text)
  return match and tuple(_numbers(group) for group in re.findall(r"\{([^}]*)\}", match[1]))


def _iota(text: str, num_devices: int):
  """[groups,size]<=[reshape]T(transpose): iota, reshaped, transposed, then cut into groups."""
  match = _IOTA.match(text)
  return match and tuple(map(tuple, _permuted(match).reshape(_numbers(match[1])).tolist()))


def _mesh_form(text: str, num_devices: int):
  """mesh['a'=2,'b'=4], device_ids=([...]) {'b'}: groups run along the axes in braces, in their
  order.
  """
  match = _MESH.match(text)
  if not match:
    return None
  sizes = {name: int(size) for name, size in _MESH_AXIS.findall(match[1])}
  along = re.findall(r"'([^']+)'(:?)", match[3])
  if any(part for _, part in along):
    return None  # a part of an axis, 'a':(1)2
  devices = np.arange(math.prod(sizes.values()))
  if match[2]:
    iota = re.match(r"()\[([\d,]+)\](?:T\(([\d,]+)\))?", match[2])
    devices = _permuted(iota) if iota else np.asarray(_numbers(match[2]))
  devices = devices.reshape(tuple(sizes.values()))
  names = list(sizes)
  inner = [names.index(name) for name, _ in along]
  outer = [axis for axis in range(len(names)) if axis not in inner]
  devices = devices.transpose(outer + inner)
  group_size = math.prod(sizes[name] for name, _ in along)
  return tuple(map(tuple, devices.reshape(-1, group_size).tolist()))


def _permuted(match) -> np.ndarray:
  """Returns the iota of a match whose groups are (anything, reshape, transpose)."""
  devices = np.arange(math.prod(_numbers(match[2]))).reshape(_numbers(match[2]))
  return (devices.transpose(_numbers(match[3])) if match[3] else devices).reshape(-1)


def _numbers(text: str) -> Sequence[int]:
  return tuple(int(number) for number in re.findall(r"\d+", text))
