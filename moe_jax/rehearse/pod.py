"""A pod that exists only on paper: described devices that XLA compiles for, and the mesh on them.

Knows chips, hosts and devices; must not know what is compiled for them.
"""

import dataclasses
import difflib
import importlib.util
import re

import jax
from jax.experimental import topologies

from moe_jax import config
from moe_jax.plan.hardware import CHIPS, Chip
from moe_jax.rehearse import slices
from moe_jax.rehearse.targets import TARGETS, description

_EXAMPLE = "h100:16x4"


@dataclasses.dataclass(frozen=True)
class Pod:
  """Hosts of GPUs of one kind.

  Attributes:
    chip: what one GPU and its links can do.
    topology: the string that XLA was given, fast domains x hosts in each x GPUs per host. A host
      without NVLink to others is a fast domain of its own.
    devices: described devices; consecutive ones share a host.
  """

  chip: Chip
  hosts: int
  gpus_per_host: int
  topology: str
  devices: tuple[jax.Device, ...]

  @property
  def name(self) -> str:
    """The pod as users type it."""
    return f"{self.chip.name}:{self.hosts}x{self.gpus_per_host}"

  def mesh(self, sizes: config.Mesh) -> jax.sharding.Mesh:
    """Returns the mesh over all devices, `tensor` innermost.

    Raises:
      ValueError: the pod has another number of GPUs than the mesh.
    """
    hosts, left_over = divmod(sizes.num_devices, self.gpus_per_host)
    fit = f"{sizes.num_devices}x1" if left_over else f"{hosts}x{self.gpus_per_host}"
    fit = f"choose --pod={self.chip.name}:{fit}"
    return slices.fitting_mesh(sizes, self.name, self.devices, "GPUs", fit)


def describe(text: str) -> Pod | slices.Slice:
  """Returns the pod that `text` names, such as h100:16x4 for 16 hosts with 4 H100 each, or
  tpu:v5p:4x4x4.

  Raises:
    ValueError: `text` is not CHIP:HOSTSxGPUS, or the chip is not known.
    NotImplementedError: the compiler for it is not installed.
  """
  if text.startswith("tpu:"):
    return slices.describe(text)
  match = re.fullmatch(r"(\w+):(\d+)x(\d+)", text)
  if not match:
    raise ValueError(f"--pod={text} is not CHIP:HOSTSxGPUS; write it as --pod={_EXAMPLE}")
  kind, hosts, gpus_per_host = match[1], int(match[2]), int(match[3])
  if kind not in TARGETS:
    near = difflib.get_close_matches(kind, TARGETS, 1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(TARGETS)}"
    raise ValueError(f"--pod={text}: chip {kind!r} is not known; {hint}")
  if not hosts or not gpus_per_host:
    raise ValueError(f"--pod={text} has no GPU; give at least one host and one GPU, as {_EXAMPLE}")
  _check_installed()
  topology = f"{hosts}x1x{gpus_per_host}"
  described = topologies.get_topology_desc(
    platform="cuda",
    topology_name=kind,
    target_config=description(TARGETS[kind]),
    topology=topology,
  )
  return Pod(CHIPS[kind], hosts, gpus_per_host, topology, tuple(described.devices))


def _check_installed() -> None:
  """Refuses where the GPU compiler is missing.

  Raises:
    NotImplementedError: with the command that installs it.
  """
  plugin = "jax_plugins.xla_cuda13"
  if not importlib.util.find_spec("jax_plugins") or not importlib.util.find_spec(plugin):
    packages = " ".join(f"jax-cuda13-{p}=={jax.__version__}" for p in ("plugin", "pjrt"))
    raise NotImplementedError(
      f"rehearsing needs XLA's GPU compiler; install it with: pip install --no-deps {packages}"
    )
