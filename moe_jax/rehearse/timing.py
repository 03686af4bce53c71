"""How long one kernel or one collective takes by itself: rooflines of chips and of links.

Knows chips, kernels and collectives; must not know when they run.
"""

from moe_jax.plan import calibration, links
from moe_jax.plan.hardware import Chip
from moe_jax.rehearse.program import Collective, Compute

# Of `Work.flops`: (dtype of the planner's tables, whether products are exact).
_DTYPES = {
  "bf16": ("bfloat16", False), "f16": ("bfloat16", False), "tf32": ("float32", False),
  "f32": ("float32", True),
}  # fmt: skip


def compute_seconds(unit: Compute, chip: Chip) -> float:
  """Returns the seconds of a kernel: the longer of its operations and its bytes."""
  return max(flops_seconds(unit, chip), memory_seconds(unit, chip))


def flops_seconds(unit: Compute, chip: Chip) -> float:
  """Returns the seconds of a kernel's matrix products."""
  return sum(flops / flops_per_s(chip, dtype) for dtype, flops in unit.work.flops.items())


def memory_seconds(unit: Compute, chip: Chip) -> float:
  """Returns the seconds that a kernel's bytes take to and from memory."""
  return unit.work.num_bytes / (chip.memory_bytes_per_s * chip.memory_fraction)


def flops_per_s(chip: Chip, dtype: str) -> float:
  """Returns the rate of matrix products of a dtype of `Work.flops`.

  Raises:
    ValueError: no chip of ours has a figure for `dtype`.
  """
  if dtype not in _DTYPES:
    raise ValueError(f"matrix products of dtype {dtype} have no peak; known: {', '.join(_DTYPES)}")
  return calibration.NONE.flops_per_s(chip, *_DTYPES[dtype])


def link_of(unit: Collective, gpus_per_host: int) -> str:
  """Returns the slowest link that a collective crosses."""
  return _group(unit, gpus_per_host).link


def collective_seconds(unit: Collective, chip: Chip, gpus_per_host: int) -> float:
  """Returns the seconds of a collective, as the planner counts them (`plan.links`)."""
  to = _group(unit, gpus_per_host)
  return links.seconds(unit.kind, unit.operand_bytes, to, chip, unit.is_symmetric)


def _group(unit: Collective, gpus_per_host: int) -> links.Group:
  return links.Group(unit.groups.size, *unit.groups.hosts(gpus_per_host))
