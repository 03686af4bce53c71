"""What chips and their links can do, by the vendors' tables, and clusters made of them.

Peaks are without sparsity; link rates are in one direction, half of what NVLink is advertised with.
What a program reaches of them is somebody else's to say, but for the hardware that the reference
plan assumes, which comes with its own fractions. Knows numbers; must not know jax, models, meshes.

Chips' figures are those of the vendors' tables as other pages quote them; for A100's ConnectX-6
adapters, B200's network and the time of a kernel's launch no page was found.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping

from moe_jax.plan.protocols import BLACKWELL, NCCL, Protocols


@dataclasses.dataclass(frozen=True)
class Chip:
  """One GPU, and the links through which it reaches others.

  Attributes:
    name: as users type it.
    peak_flops_per_s: dense matrix products, by dtype of the operands.
    memory_bytes: of the chip's own memory, decimal as vendors count.
    memory_bytes_per_s: to and from that memory.
    inside_bytes_per_s: to the other chips of a host together, one direction.
    between_bytes_per_s: to chips of other hosts together, one direction; the chip's own adapter.
    source: where the figures stand.
    low_latency_bytes_per_s: what NCCL's protocol LL reaches at most inside a host.
    protocols: of its collectives.
    compute_fraction, memory_fraction: how much of the two peaks may be counted on; 1 unless stated.
  """

  name: str
  peak_flops_per_s: Mapping[str, float]
  memory_bytes: float
  memory_bytes_per_s: float
  inside_bytes_per_s: float
  between_bytes_per_s: float
  source: str
  low_latency_bytes_per_s: float = math.inf  # NCCL, src/graph/tuning.cc, llMaxBws
  protocols: Protocols = NCCL
  compute_fraction: float = 1.0
  memory_fraction: float = 1.0

  def __hash__(self):
    return hash(self.name)  # peaks are a mapping

  def flops_per_s(self, dtype: str) -> float:
    """Returns the rate of matrix products that may be counted on.

    Raises:
      ValueError: no figure for `dtype`.
    """
    if dtype not in self.peak_flops_per_s:
      known = ", ".join(self.peak_flops_per_s)
      raise ValueError(f"chip {self.name} has no peak for dtype {dtype!r}; choose from {known}")
    return self.compute_fraction * self.peak_flops_per_s[dtype]


_A100 = Chip(
  name="a100",
  peak_flops_per_s={"bfloat16": 312e12, "float32": 19.5e12},
  memory_bytes=80e9,
  memory_bytes_per_s=2.039e12,
  inside_bytes_per_s=300e9,  # third-generation NVLink, 600 GB/s both ways
  between_bytes_per_s=25e9,  # DGX A100: a 200 Gb/s ConnectX-6 for each GPU
  low_latency_bytes_per_s=87.7e9,
  source="NVIDIA A100 Tensor Core GPU datasheet (A100 80GB SXM); NVIDIA DGX A100 datasheet",
)

_H100 = Chip(
  name="h100",
  peak_flops_per_s={"bfloat16": 989.4e12, "float32": 66.9e12},
  memory_bytes=80e9,
  memory_bytes_per_s=3.35e12,
  inside_bytes_per_s=450e9,  # fourth-generation NVLink, 900 GB/s both ways
  between_bytes_per_s=50e9,  # DGX H100: a 400 Gb/s ConnectX-7 for each GPU
  low_latency_bytes_per_s=141e9,
  source=(
    "NVIDIA H100 Tensor Core GPU architecture whitepaper, table 2 (H100 SXM5); NVIDIA H100"
    " datasheet (memory); NVIDIA DGX H100 datasheet (network)"
  ),
)

# The compute die and links of H100 with other memory.
_H200 = dataclasses.replace(
  _H100,
  name="h200",
  memory_bytes=141e9,
  memory_bytes_per_s=4.8e12,
  source="NVIDIA H200 Tensor Core GPU datasheet (H200 SXM); NVIDIA DGX H200 datasheet (network)",
)

_B200 = Chip(
  name="b200",
  peak_flops_per_s={"bfloat16": 2.25e15, "float32": 80e12},
  # DGX B200: 1,440 GB and 64 TB/s over 8 GPUs; the chip's 192 GB are not all enabled there.
  memory_bytes=180e9,
  memory_bytes_per_s=8e12,
  inside_bytes_per_s=900e9,  # fifth-generation NVLink, 1.8 TB/s both ways
  between_bytes_per_s=50e9,  # DGX B200: a 400 Gb/s ConnectX-7 for each GPU
  low_latency_bytes_per_s=282e9,
  protocols=BLACKWELL,
  source="NVIDIA Blackwell architecture technical brief (HGX B200); NVIDIA DGX B200 datasheet",
)

# The reference plan names compute and memory with the share that it counts on, and no links: those
# of H100 are taken. Its dtype is a 16-bit one.
_PLANNED = dataclasses.replace(
  _H100,
  name="planned",
  peak_flops_per_s={"bfloat16": 400e12},
  memory_bytes=64e9,
  memory_bytes_per_s=1.8e12,
  compute_fraction=0.6,
  memory_fraction=0.8,
  source="the reference plan: 400 TFLOP/s at 60%, 64 GB, 1.8 TB/s at 80%; links as h100",
)

CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in (_A100, _H100, _H200, _B200, _PLANNED)}


@dataclasses.dataclass(frozen=True)
class Tpu:
  """One TPU chip of a slice: chips in a torus, each linked to its next ones along every dimension.

  Attributes:
    name: as users type it.
    peak_flops_per_s: dense matrix products, by dtype of the operands.
    memory_bytes: of the chip's own memory.
    ici_bytes_per_s: over all links between chips together, one direction.
    dimensions: of the torus.
    source: where the figures stand.
  """

  name: str
  peak_flops_per_s: Mapping[str, float]
  memory_bytes: float
  ici_bytes_per_s: float
  dimensions: int
  source: str

  def __hash__(self):
    return hash(self.name)  # peaks are a mapping


# The vendor's tables give both directions of the links together, and memory as GB on one page and
# GiB on another: half of the one, and the smaller of the other, are taken.
TPUS: Mapping[str, Tpu] = {
  chip.name: chip
  for chip in (
    Tpu(
      name="v5p",
      peak_flops_per_s={"bfloat16": 459e12},
      memory_bytes=95e9,
      ici_bytes_per_s=600e9,
      dimensions=3,
      source="https://docs.cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GB, 1,200 GB/s ICI",
    ),
    Tpu(
      name="v5e",
      peak_flops_per_s={"bfloat16": 197e12},
      memory_bytes=16e9,
      ici_bytes_per_s=200e9,
      dimensions=2,
      source="https://docs.cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB, 400 GB/s ICI",
    ),
    Tpu(
      name="v6e",
      peak_flops_per_s={"bfloat16": 918e12},
      memory_bytes=32e9,
      ici_bytes_per_s=400e9,
      dimensions=2,
      source="https://docs.cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB, 3,200 Gb/s ICI",
    ),
  )
}


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Hosts of GPUs of one kind; consecutive GPUs share a host.

  Attributes:
    chip: what one GPU and its links can do.
    hosts: how many.
    gpus_per_host: on each.
    symmetric_memory: whether GPUs of a host register with each other what they send.
  """

  chip: Chip
  hosts: int
  gpus_per_host: int
  symmetric_memory: bool = False

  @property
  def num_gpus(self) -> int:
    return self.hosts * self.gpus_per_host

  @property
  def name(self) -> str:
    """The cluster as users type it."""
    return f"{self.chip.name}:{self.hosts}x{self.gpus_per_host}"

  def of(self, num_gpus: int) -> "Cluster":
    """Returns as many hosts of the same kind as `num_gpus` GPUs take, all GPUs of the last one
    included; of fewer than a host has, a host with so many.
    """
    gpus_per_host = min(self.gpus_per_host, num_gpus)
    hosts = -(-num_gpus // gpus_per_host)
    return dataclasses.replace(self, hosts=hosts, gpus_per_host=gpus_per_host)


def cluster(text: str) -> Cluster:
  """Returns the cluster that `text` names, such as h100:16x4 for 16 hosts with 4 H100 each.

  Raises:
    ValueError: `text` is not CHIP:HOSTSxGPUS, the chip is not known, or there is no GPU.

  >>> cluster("h100:16x4").num_gpus
  64
  """
  example = "h100:16x4"
  match = re.fullmatch(r"(\w+):(\d+)x(\d+)", text)
  if not match:
    raise ValueError(f"cluster {text!r} is not CHIP:HOSTSxGPUS; write it as {example}")
  name, hosts, gpus_per_host = match[1], int(match[2]), int(match[3])
  if name not in CHIPS:
    near = difflib.get_close_matches(name, CHIPS, 1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(CHIPS)}"
    raise ValueError(f"cluster {text!r}: chip {name!r} is not known; {hint}")
  if not hosts or not gpus_per_host:
    raise ValueError(
      f"cluster {text!r} has no GPU; give at least one host and one GPU, such as {example}"
    )
  return Cluster(CHIPS[name], hosts, gpus_per_host)
