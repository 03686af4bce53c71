"""How long one kernel or one collective takes by itself: rooflines of chips and of links.

Knows chips, kernels and collectives; must not know when they run.
"""

import math

from moe_jax.plan.hardware import CHIPS, Chip
from moe_jax.rehearse.program import Collective, Compute

INSIDE, BETWEEN = "inside", "between"

_DTYPES = {"bf16": "bfloat16", "f16": "bfloat16", "tf32": "bfloat16", "f32": "float32"}
# TensorFloat-32 runs at half of bfloat16 on every chip of ours. Source: their tables, as in
# plan.hardware.
_OF_BFLOAT16 = {"tf32": 0.5}
# NCCL sends small messages by protocol LL, half of whose bytes are flags, with less latency.
# Source: NCCL, src/graph/tuning.cc: hwLat of LL for NVLink; for the network, as a ring and a tree.
_LL_FRACTION, _LL_INSIDE_S, _LL_RING_S, _LL_TREE_S = 0.5, 0.6e-6, 2.7e-6, 5e-6


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

  A chip that names bfloat16 only (the reference plan) takes H100's ratio for float32.

  Raises:
    ValueError: no chip of ours has a figure for `dtype`.
  """
  if dtype not in _DTYPES:
    raise ValueError(f"matrix products of dtype {dtype} have no peak; known: {', '.join(_DTYPES)}")
  name = _DTYPES[dtype]
  if name in chip.peak_flops_per_s:
    return chip.flops_per_s(name) * _OF_BFLOAT16.get(dtype, 1.0)
  peaks = CHIPS["h100"].peak_flops_per_s
  return chip.flops_per_s("bfloat16") * peaks[name] / peaks["bfloat16"]


def link_of(unit: Collective, gpus_per_host: int) -> str:
  """Returns the slowest link that a collective crosses."""
  return BETWEEN if unit.groups.hosts(gpus_per_host)[0] > 1 else INSIDE


def collective_seconds(unit: Collective, chip: Chip, gpus_per_host: int) -> float:
  """Returns the seconds of a collective: its steps' latency, and its bytes over the slowest link.

  The fastest is taken of NCCL's algorithms and protocols, as NCCL does by the same formulas:
  all-gather and reduce-scatter as rings, all-reduce as ring or tree, all-to-all and permutation
  sent directly; with protocol Simple, or LL at half of the bandwidth.

  Source: NCCL, src/graph/tuning.cc, ncclTopoTuneModel.
  """
  if unit.groups.size == 1:
    return 0.0
  num_hosts, per_host = unit.groups.hosts(gpus_per_host)
  simple = (1.0, chip.inside_latency_s, chip.between_latency_s)
  ring_ll = (_LL_FRACTION, _LL_INSIDE_S, _LL_RING_S)
  tree_ll = (_LL_FRACTION, _LL_INSIDE_S, _LL_TREE_S)
  ways = [(_steps(unit, num_hosts), protocol) for protocol in (simple, ring_ll)]
  if unit.kind == "all-reduce":
    tree = (2 * (per_host - 1), 2 * math.ceil(math.log2(num_hosts)))
    ways += [(tree, protocol) for protocol in (simple, tree_ll)]
  bytes_s = _bytes_seconds(unit, chip, num_hosts, per_host)
  return min(
    inside * inside_s + between * between_s + bytes_s / fraction
    for (inside, between), (fraction, inside_s, between_s) in ways
  )


def _steps(unit: Collective, num_hosts: int) -> tuple[int, int]:
  """Returns the steps (inside hosts, between hosts) of a ring, or of sending directly."""
  if unit.kind in ("all-to-all", "collective-permute"):
    return (0, 1) if num_hosts > 1 else (1, 0)
  rounds = 2 if unit.kind == "all-reduce" else 1
  return rounds * (unit.groups.size - num_hosts), rounds * (num_hosts - 1)


def _bytes_seconds(unit: Collective, chip: Chip, num_hosts: int, per_host: int) -> float:
  """Returns the seconds of the bytes at full bandwidth.

  A ring goes from host to host through as many adapters as it has GPUs there, for as many rings run
  at once. Of an all-to-all among n GPUs, k on each host, (n - k) / n leave the host.
  """
  n, sent = unit.groups.size, unit.bytes_sent
  if num_hosts == 1:
    return sent / chip.inside_bytes_per_s
  if unit.kind == "collective-permute":
    return sent / chip.between_bytes_per_s
  if unit.kind == "all-to-all":
    leaving = unit.operand_bytes * (n - per_host) / n
    staying = sent - leaving
    return max(leaving / chip.between_bytes_per_s, staying / chip.inside_bytes_per_s)
  inside_s = sent / chip.inside_bytes_per_s if per_host > 1 else 0.0
  return max(inside_s, sent / per_host / chip.between_bytes_per_s)
