"""How XLA's GPU back end is told which chip to compile for, one that no machine here has.

A description is the text form of XLA's GpuTargetConfigProto, and says what a device query on the
chip would answer. Knows chips; must not know pods, meshes or jax.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Target:
  """What differs between chips; sizes are in bytes.

  Attributes:
    device_name: as the driver reports it.
    compute_capability: (major, minor).
    feature_extension: whether code may use what only this generation has ("a" architectures).
    core_count: streaming multiprocessors.
    nvlinks: active links.
    source: where the figures stand.
  """

  device_name: str
  compute_capability: tuple[int, int]
  feature_extension: str
  core_count: int
  fpus_per_core: int
  shared_memory_per_core: int
  shared_memory_per_block_optin: int
  l2_cache_size: int
  clock_rate_ghz: float
  device_memory_size: int
  memory_bandwidth: int
  nvlinks: int
  source: str


_XLA_SPECS = "device queries published in openxla/xla, xla/backends/gpu/target_config/specs"

_H100 = Target(
  device_name="NVIDIA H100 80GB HBM3",
  compute_capability=(9, 0),
  feature_extension="ACCELERATED_FEATURES",
  core_count=132,
  fpus_per_core=128,
  shared_memory_per_core=233_472,
  shared_memory_per_block_optin=232_448,
  l2_cache_size=52_428_800,
  clock_rate_ghz=1.98,
  device_memory_size=84_942_979_072,
  memory_bandwidth=3_352_320_000_000,
  nvlinks=18,
  source=f"{_XLA_SPECS}/h100_sxm.txtpb",
)

TARGETS: Mapping[str, Target] = {
  "a100": Target(
    device_name="NVIDIA A100-SXM4-80GB",
    compute_capability=(8, 0),
    feature_extension="NONE",
    core_count=108,
    fpus_per_core=64,
    shared_memory_per_core=167_936,
    shared_memory_per_block_optin=166_912,
    l2_cache_size=41_943_040,
    clock_rate_ghz=1.41,
    device_memory_size=85_100_068_864,
    memory_bandwidth=2_039_040_000_000,
    nvlinks=12,
    source=f"{_XLA_SPECS}/a100_sxm_80.txtpb; links: NVIDIA A100 datasheet, 12 of 50 GB/s",
  ),
  "h100": _H100,
  "h200": dataclasses.replace(
    _H100,
    device_name="NVIDIA H200 141GB HBM3e",
    device_memory_size=151_397_597_184,
    memory_bandwidth=4_800_000_000_000,
    source=f"{_XLA_SPECS}/h200.txtpb",
  ),
  "b200": Target(
    device_name="NVIDIA B200",
    compute_capability=(10, 0),
    feature_extension="ACCELERATED_FEATURES",
    core_count=148,
    fpus_per_core=128,
    shared_memory_per_core=233_472,
    shared_memory_per_block_optin=232_448,
    l2_cache_size=132_644_864,
    clock_rate_ghz=1.965,
    device_memory_size=191_514_411_008,
    memory_bandwidth=7_672_320_000_000,
    nvlinks=18,
    source=f"{_XLA_SPECS}/b200.txtpb",
  ),
}


def description(target: Target) -> str:
  """Returns the text of XLA's GpuTargetConfigProto.

  Limits of threads, blocks and registers are those of compute capabilities 8.0 to 10.0 alike.

  Source: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
  """
  major, minor = target.compute_capability
  return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_core: {target.shared_memory_per_core}
  shared_memory_per_block_optin: {target.shared_memory_per_block_optin}
  core_count: {target.core_count}  fpus_per_core: {target.fpus_per_core}
  clock_rate_ghz: {target.clock_rate_ghz}  l2_cache_size: {target.l2_cache_size}
  device_memory_size: {target.device_memory_size}  memory_bandwidth: {target.memory_bandwidth}
  cuda_compute_capability {{
    major: {major}  minor: {minor}  feature_extension: {target.feature_extension}
  }}
  device_vendor: "NVIDIA Corporation"  name: "{target.device_name}"
  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"  device_interconnect_info {{ active_links: {target.nvlinks} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{target.device_name}"
"""
