"""Which logical axis of an array lies along which mesh axis: one table of rules, and specs from it.

Knows names of axes and shapes; must not know parameters or the model that they belong to.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jax.sharding import Mesh, PartitionSpec

from moe_jax.parallel.axes import ALL, DATA, EXPERT, SEQUENCES, STAGE, TENSOR

# Logical axis -> mesh axes, outermost first. None keeps the whole dimension on every device.
RULES: Mapping[str, tuple[str, ...] | None] = {
  "layers": (STAGE,),
  "vocab": (STAGE, TENSOR),  # every stage computes a share of the head: no stage is a bottleneck
  "input_vocab": (TENSOR,),  # the first stage looks up alone: nothing is sent between stages for it
  "heads": (TENSOR,),
  "kv_heads": (TENSOR,),
  "experts": (EXPERT,),
  "hidden": (TENSOR,),
  "model": None,
  "head_dim": None,
  "gate_up": None,
  "all_experts": None,  # the router scores every expert on every device
  "micro_batches": None,
  "sequences": SEQUENCES,
  "positions": None,
}


def spec(logical_axes: Sequence[str]) -> PartitionSpec:
  """Returns the PartitionSpec of an array with these logical axes.

  Raises:
    ValueError: a logical axis without a rule, or two that want the same mesh axis.

  >>> spec(("experts", "model", "hidden"))
  PartitionSpec('expert', None, 'tensor')
  """
  taken: dict[str, str] = {}
  entries = []
  for name in logical_axes:
    if name not in RULES:
      raise ValueError(f"logical axis {name!r} has no sharding rule; known: {', '.join(RULES)}")
    for mesh_axis in RULES[name] or ():
      if mesh_axis in taken:
        raise ValueError(
          f"logical axes {taken[mesh_axis]!r} and {name!r} of one array both lie along mesh axis"
          f" {mesh_axis!r}; give one of them another rule or another name"
        )
      taken[mesh_axis] = name
    entries.append(_entry(RULES[name] or ()))
  return PartitionSpec(*entries)


def axes_of(partition: PartitionSpec) -> tuple[str, ...]:
  """Returns the mesh axes that `partition` splits over."""
  flat = [name for entry in partition for name in _names(entry)]
  return tuple(name for name in ALL if name in flat)


def replicated_axes(partition: PartitionSpec) -> tuple[str, ...]:
  """Returns the mesh axes along which every device holds the same part: gradients are summed
  there.
  """
  return tuple(name for name in ALL if name not in axes_of(partition))


class Shares(NamedTuple):
  """How ZeRO-1 splits an array further.

  Attributes:
    dimension: that is split, or None where none divides.
    axes: along which, the first one major; () where it is not split.
  """

  dimension: int | None
  axes: tuple[str, ...]


def shares(partition: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> Shares:
  """Returns the shares of an array in which the ranks that read different sequences, those of
  `expert` and of `data`, hold the optimizer's state of what they hold alike: of its largest
  dimension that divides.

  Where none divides by both axes, by one of them. `data` is minor: so of gradients that are summed
  along `expert` first, only a share travels between copies.

  Source: ZeRO (arXiv:1910.02054), section 5.1.
  """
  taken = axes_of(partition)
  alike = tuple(n for n in (EXPERT, DATA) if n not in taken and mesh.shape[n] > 1)
  entries = [*partition, *[None] * (len(shape) - len(partition))]
  # Which expert lies where is `expert`'s alone.
  free = [d for d in range(len(shape)) if EXPERT not in _names(entries[d])]
  for names in (alike, alike[:1], alike[1:]):
    for dimension in sorted(free, key=lambda d: -shape[d]):
      parts = math.prod(mesh.shape[name] for name in (*_names(entries[dimension]), *names))
      if names and shape[dimension] % parts == 0:
        return Shares(dimension, names)
  return Shares(None, ())


def zero_spec(partition: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """Returns `partition` with its `shares` split too (innermost)."""
  dimension, names = shares(partition, shape, mesh)
  if dimension is None:
    return partition
  entries = [*partition, *[None] * (len(shape) - len(partition))]
  entries[dimension] = _entry((*_names(entries[dimension]), *names))
  return PartitionSpec(*entries)


def with_axes_of_one(partition: PartitionSpec, mesh: Mesh) -> PartitionSpec:
  """Returns `partition`, of an array that has dimensions, with the mesh axes of one device named
  too. The array lies as before, and needs no sum over them, for which XLA:CPU would copy it.
  """
  alone = tuple(name for name in replicated_axes(partition) if mesh.shape[name] == 1)
  first, *others = partition or (None,)
  return PartitionSpec(_entry((*_names(first), *alone)), *others)


def _names(entry) -> tuple[str, ...]:
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)


def _entry(names: tuple[str, ...]):
  return None if not names else names[0] if len(names) == 1 else names
