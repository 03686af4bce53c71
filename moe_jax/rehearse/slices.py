"""A slice of TPUs that exists only on paper, and the mesh on it.

Knows chips of a torus and their hosts; must not know what is compiled for them.
"""

import dataclasses
import difflib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from moe_jax import config
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.plan.hardware import TPUS, Tpu

_EXAMPLE = "tpu:v5p:4x4x4"
# The compiler would ask the machine which TPU it is in, and keep it for one process.
_NO_TPU_HERE = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """TPUs of one kind in a torus.

  Attributes:
    chip: what one TPU and its links can do.
    topology: chips along each dimension, as the compiler was given them.
    hosts: that the chips are attached to.
    devices: described devices; consecutive ones share a host.
  """

  chip: Tpu
  topology: str
  hosts: int
  devices: tuple[jax.Device, ...]

  @property
  def name(self) -> str:
    """The slice as users type it."""
    return f"tpu:{self.chip.name}:{self.topology}"

  def mesh(self, sizes: config.Mesh) -> jax.sharding.Mesh:
    """Returns the mesh over all devices, `tensor` innermost.

    Raises:
      ValueError: the slice has another number of TPUs than the mesh.
    """
    fit = f"choose --pod=tpu:{self.chip.name} with {sizes.num_devices} chips"
    return fitting_mesh(sizes, self.name, self.devices, "TPUs", fit)


def fitting_mesh(
  sizes: config.Mesh, name: str, devices: Sequence[jax.Device], unit: str, fit: str
) -> jax.sharding.Mesh:
  """Returns the mesh over all of `devices`, `tensor` innermost.

  Args:
    sizes: of the axes.
    name: of the pod.
    devices: of the pod.
    unit: what they are called.
    fit: what to choose where they are not as many as the mesh needs.

  Raises:
    ValueError: they are not.
  """
  if len(devices) != sizes.num_devices:
    raise ValueError(
      f"mesh {mesh_lib.text(sizes)} needs {sizes.num_devices} {unit}, pod {name} has"
      f" {len(devices)}; {fit}, or a mesh of {len(devices)}"
    )
  return mesh_lib.make(sizes, devices)


def describe(text: str) -> Slice:
  """Returns the slice that `text` names, such as tpu:v5p:4x4x4.

  Raises:
    ValueError: `text` is not tpu:CHIP:AxBxC, the chip is not known, or no slice has that shape.
    NotImplementedError: the compiler for it is not installed.
  """
  match = re.fullmatch(r"tpu:(\w+):(\d+(?:x\d+)*)", text)
  if not match:
    raise ValueError(f"--pod={text} is not tpu:CHIP:AxBxC; write it as --pod={_EXAMPLE}")
  kind, topology = match[1], match[2]
  if kind not in TPUS:
    near = difflib.get_close_matches(kind, TPUS, 1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(TPUS)}"
    raise ValueError(f"--pod={text}: chip {kind!r} is not known; {hint}")
  dimensions, found = TPUS[kind].dimensions, topology.count("x") + 1
  if found != dimensions:
    raise ValueError(
      f"--pod={text} has {found} dimensions, a slice of {kind} has {dimensions}; write it as"
      f" --pod=tpu:{kind}:{'x'.join(['4'] * dimensions)}"
    )
  _check_installed()
  for name, value in _NO_TPU_HERE.items():
    os.environ.setdefault(name, value)
  try:
    devices = topologies.get_topology_desc(
      platform="tpu", topology_name=text[len("tpu:") :]
    ).devices
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"--pod={text}: no such slice: {str(error).splitlines()[0]}") from error
  hosts = len({device.process_index for device in devices})
  return Slice(TPUS[kind], topology, hosts, tuple(devices))


def _check_installed() -> None:
  """Refuses where the TPU compiler is missing.

  Raises:
    NotImplementedError: with the command that installs the one that this jax works with.
  """
  if not importlib.util.find_spec("libtpu"):
    needs = [each for each in importlib.metadata.requires("jax") or () if "libtpu" in each]
    package = needs[0].partition(";")[0].strip() if needs else "libtpu"
    raise NotImplementedError(
      "rehearsing TPUs needs XLA's TPU compiler; install it with: pip install --no-deps"
      f" '{package}'"
    )
