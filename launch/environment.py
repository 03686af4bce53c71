"""The environment a process needs before jax looks at it: XLA flags and virtual CPU devices.

Called by `launch.flags.run` before a program's own code. It must not know configs or the model.
"""

import glob
import importlib.metadata
import os
import re
import sys

# An unknown XLA flag aborts the process, so every flag stands here and a test starts one with each.
# The same names hold for jax 0.10.2 and 0.12.
XLA_FLAGS = {
  "cpu": {
    # A collective that some device never reaches: say so after a minute, abort after five. Many
    # virtual devices on few, shared cores can be minutes apart in a healthy run.
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": "60",
    "xla_cpu_collective_call_terminate_timeout_seconds": "300",
    "xla_cpu_collective_timeout_seconds": "300",
    # Without it XLA:CPU copies the whole optimizer state once a step, though it is donated.
    "xla_cpu_copy_insertion_use_region_analysis": "true",
    # The order for many threads keeps more alive: of a step of laptop.py 69 MB instead of 56. With
    # a device on every core already, there are no threads left for it.
    "xla_cpu_enable_concurrency_optimized_scheduler": "false",
  },
  "gpu": {
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    # Two links, and two streams of work on each: by default one collective is on its way at a time.
    "xla_gpu_experimental_parallel_collective_overlap_limit": "4",
  },
  "described": {
    # Autotuning would need the device.
    "xla_gpu_autotune_level": "0",
  },
}

# XLA:CPU takes its temporaries anew for every step, and glibc would hand gigabytes back to the
# kernel after each and fault them in again, page by page: a fifth of a step's time at 1 GB of
# temporaries.
_MALLOC = {
  "MALLOC_MMAP_MAX_": "0",
  "MALLOC_TRIM_THRESHOLD_": str(2**40),
  "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
# An arena for each thread gives back what it holds whatever the threshold. One for all does not,
# but the threads of eight devices wait for each other there: a third of a step of laptop.py.
_ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}

_DEVICE_COUNT = "xla_force_host_platform_device_count"
# How many GPUs share a host: XLA takes the time of collectives from it, and where nothing is said
# counts on 8.
_GPUS_PER_HOST = "xla_gpu_analytical_latency_estimator_options"
# Memory that the GPUs of a host register with each other, for kernels of NCCL that begin sooner.
SYMMETRIC_MEMORY = "xla_gpu_experimental_enable_nccl_symmetric_buffers"
# Before it such a kernel could read what the one before had not yet written: sgl-project/sglang
# #37768 measured wrong results under CUDA graphs.
_LEAST_NCCL = (2, 30, 7)


def live_devices(scheduling_profile: str = "", symmetric_memory: bool = False) -> None:
  """Sets the flags of XLA_FLAGS for the devices that jax will find; those the user set stay.

  Args:
    scheduling_profile: a file that `launch.rehearse --profile` wrote, by which XLA schedules
      programs for GPUs.
    symmetric_memory: whether the GPUs of a host register what they send with each other.

  Raises:
    ValueError: there is no such file, or NCCL is too old for such memory.
  """
  if symmetric_memory:
    _check_nccl()
  by_profile = {}
  if scheduling_profile:
    if not os.path.isfile(scheduling_profile):
      raise ValueError(
        f"--scheduling_profile={scheduling_profile} is not a file; write one with"
        " python -m launch.rehearse --profile=PATH"
      )
    by_profile = {"xla_gpu_pgle_profile_file_or_directory_path": scheduling_profile}
  gpus = len(glob.glob("/dev/nvidia[0-9]*"))
  sharing = _sharing_a_host(gpus) | _symmetric(symmetric_memory)
  _set_xla_flags({**XLA_FLAGS["cpu"], **XLA_FLAGS["gpu"], **sharing, **by_profile})


def described_devices(pod: str, symmetric_memory: bool = False) -> None:
  """Sets the flags for devices that exist on paper only, and keeps jax from looking for live ones.

  Call before jax is imported.

  Args:
    pod: to compile for, as `rehearse.pod.describe` takes it.
    symmetric_memory: as of `live_devices`.
  """
  os.environ["JAX_PLATFORMS"] = "cpu"
  # What is compiled for devices that are not there can be kept, but not loaded again.
  os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
  # XLA warns of each kernel that a scheduling profile does not name.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  gpus = pod.rpartition("x")[2]
  sharing = _sharing_a_host(int(gpus) if gpus.isdecimal() else 0) | _symmetric(symmetric_memory)
  _set_xla_flags({**XLA_FLAGS["gpu"], **XLA_FLAGS["described"], **sharing})


def virtual_devices(count: int) -> None:
  """Makes jax see `count` devices, all of them this machine's CPU.

  Args:
    count: devices, at least 1. Replaces a count already in XLA_FLAGS; other flags there stay.

  Raises:
    ValueError: `count` is below 1.
    RuntimeError: jax has already started its devices, too late for another number of them.
  """
  if count < 1:
    raise ValueError(f"virtual_devices={count} is not positive; choose at least 1")
  jax = sys.modules.get("jax")
  if jax is not None:
    # jax read the environment when it was imported. The first line raises if devices exist.
    try:
      jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
      raise RuntimeError(
        f"virtual_devices({count}) was called after jax started its devices; call it before"
        " anything that computes, or set XLA_FLAGS and JAX_PLATFORMS before the process starts"
      ) from error
    jax.config.update("jax_platforms", "cpu")
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ.pop("JAX_NUM_CPU_DEVICES", None)  # jax heeds it before the flag
  _set_xla_flags({**XLA_FLAGS["cpu"], _DEVICE_COUNT: str(count)}, replace=(_DEVICE_COUNT,))


def malloc(num_devices: int) -> dict[str, str]:
  """Returns the variables under which glibc keeps what is freed, in huge pages.

  Args:
    num_devices: virtual devices that the process computes on.
  """
  return _MALLOC | (_ONE_ARENA if num_devices == 1 else {})


def keep_freed_memory(num_devices: int) -> None:
  """Restarts this program, once, with the variables of `malloc`.

  They work only at a process's start. Those that the user set stay; where another C library than
  glibc ignores them, nothing changes.
  """
  missing = {k: v for k, v in malloc(num_devices).items() if k not in os.environ}
  if missing and sys.platform == "linux":
    os.environ.update(missing)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _sharing_a_host(gpus: int) -> dict[str, str]:
  return {_GPUS_PER_HOST: f"gpus_per_node={gpus}"} if gpus else {}


def _symmetric(is_symmetric: bool) -> dict[str, str]:
  return {SYMMETRIC_MEMORY: "true"} if is_symmetric else {}


def _check_nccl() -> None:
  """Refuses an NCCL whose kernels for registered memory are not right."""
  least = ".".join(map(str, _LEAST_NCCL))
  for package in ("nvidia-nccl-cu13", "nvidia-nccl-cu12"):
    try:
      found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
    if tuple(map(int, re.findall(r"\d+", found)[:3])) < _LEAST_NCCL:
      raise ValueError(
        f"--symmetric_memory needs NCCL {least} or newer, for older ones computed wrong sums; found"
        f" {package} {found}; run: pip install '{package}>={least}'"
      )
    return
  raise ValueError(
    f"--symmetric_memory needs NCCL {least} or newer, and no package of it is installed; run: pip"
    f" install 'nvidia-nccl-cu13>={least}', or leave the flag out"
  )


def _set_xla_flags(value_by_name: dict[str, str], replace: tuple[str, ...] = ()) -> None:
  # Programs here name every dtype, and types of 64 bits that jax would then give to what has none
  # fit to none of theirs.
  os.environ["JAX_ENABLE_X64"] = "0"
  words = [
    word
    for word in os.environ.get("XLA_FLAGS", "").split()
    if word.lstrip("-").partition("=")[0] not in replace
  ]
  present = {word.lstrip("-").partition("=")[0] for word in words}
  words += [f"--{name}={value}" for name, value in value_by_name.items() if name not in present]
  os.environ["XLA_FLAGS"] = " ".join(words)
