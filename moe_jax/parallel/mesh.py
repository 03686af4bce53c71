"""Devices arranged on the four axes: live ones, virtual CPU ones, or devices that the caller
gives.

Knows devices and axis sizes; must not know what is placed on them (that is `parallel.sharding`).
"""

from collections.abc import Sequence

import jax
import numpy as np

from moe_jax import config
from moe_jax.parallel import axes


def make(sizes: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """Returns the mesh over all of `devices`, `tensor` innermost and `data` outermost.

  Args:
    sizes: devices along each axis.
    devices: default all that jax sees. Their number must equal the product of the sizes: a mesh
      over a part of them would leave rented devices idle in silence.

  Raises:
    ValueError: the numbers differ; the message names meshes that would fit.
  """
  devices = list(jax.devices() if devices is None else devices)
  if len(devices) != sizes.num_devices:
    raise ValueError(
      f"mesh {text(sizes)} needs {sizes.num_devices} devices, found {len(devices)};"
      f" {_fitting(sizes, len(devices))}"
    )
  shape = [getattr(sizes, name) for name in axes.ALL]
  return jax.sharding.Mesh(np.array(devices).reshape(shape), axes.ALL)


def axes_inside_host(settings: config.Config) -> tuple[str, ...]:
  """Returns the axes along which all devices are taken to share a host: `tensor`, and `expert`
  where `moe.expert_ranks_per_host` says so of all its ranks.
  """
  is_inside = settings.moe.expert_ranks_per_host == settings.mesh.expert
  return (axes.EXPERT, axes.TENSOR) if is_inside else (axes.TENSOR,)


def text(sizes: config.Mesh) -> str:
  """Returns the sizes in words, copies only where there are several."""
  names = [axes.EXPERT, axes.TENSOR, axes.STAGE, *[axes.DATA] * (sizes.data > 1)]
  return " x ".join(f"{name}={getattr(sizes, name)}" for name in names)


def _fitting(sizes: config.Mesh, num_devices: int) -> str:
  """Returns advice: the change of one axis that makes the mesh fit, or any mesh that does."""
  for name in (axes.EXPERT, axes.STAGE, axes.TENSOR, axes.DATA):
    size = getattr(sizes, name)
    others = sizes.num_devices // size
    if num_devices % others == 0:
      return (
        f"choose mesh.{name}={num_devices // others}, or start {sizes.num_devices} devices"
        f" (on CPU: --virtual_devices={sizes.num_devices})"
      )
  return (
    f"choose expert x tensor x stage = {num_devices} (for example expert={num_devices},"
    f" tensor=1, stage=1), or start {sizes.num_devices} devices"
  )
