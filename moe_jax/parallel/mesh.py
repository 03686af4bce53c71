"""Devices arranged on the three axes: live ones, virtual CPU ones, or devices that the caller
gives.

Knows devices and axis sizes; must not know what is placed on them (that is `parallel.sharding`).
"""

from collections.abc import Sequence

import jax
import numpy as np

from moe_jax import config
from moe_jax.parallel import axes


def make(sizes: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """Returns the mesh over all of `devices`, `tensor` innermost and `stage` outermost.

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
      f"mesh expert={sizes.expert} x tensor={sizes.tensor} x stage={sizes.stage} needs"
      f" {sizes.num_devices} devices, found {len(devices)}; {_fitting(sizes, len(devices))}"
    )
  shape = (sizes.stage, sizes.expert, sizes.tensor)
  return jax.sharding.Mesh(np.array(devices).reshape(shape), axes.ALL)


def _fitting(sizes: config.Mesh, num_devices: int) -> str:
  """Returns advice: the change of one axis that makes the mesh fit, or any mesh that does."""
  for name, size in (("expert", sizes.expert), ("stage", sizes.stage), ("tensor", sizes.tensor)):
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
