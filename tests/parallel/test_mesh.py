"""Meshes: their order of axes, and the refusal of devices that do not fit."""

import re

import jax
import pytest

from moe_jax import config
from moe_jax.parallel import axes, mesh


def test_tensor_is_innermost_and_data_outermost():
  made = mesh.make(config.Mesh(expert=2, tensor=2, stage=2))
  assert made.axis_names == axes.ALL == (axes.DATA, axes.STAGE, axes.EXPERT, axes.TENSOR)
  ids = [device.id for device in made.devices[0, 0, 0]]
  assert ids == [0, 1]  # consecutive devices share a host
  assert [device.id for device in made.devices[0, :, 0, 0]] == [0, 4]
  copies = mesh.make(config.Mesh(expert=2, stage=2, data=2))
  assert [device.id for device in copies.devices[:, 0, 0, 0]] == [0, 4]


def test_given_devices_are_used():
  devices = jax.devices()[3:5]
  made = mesh.make(config.Mesh(stage=2), devices)
  assert list(made.devices.reshape(-1)) == devices
  assert made.shape == {"data": 1, "stage": 2, "expert": 1, "tensor": 1}


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    (config.Mesh(), "needs 1 devices, found 8; choose mesh.expert=8"),
    (config.Mesh(expert=4, tensor=2, stage=2), "needs 16 devices, found 8; choose mesh.expert=2"),
    (config.Mesh(expert=2, tensor=16, stage=1), "needs 32 devices, found 8; choose mesh.tensor=4"),
    (config.Mesh(expert=3, tensor=3), "found 8; choose expert x tensor x stage = 8"),
    (
      config.Mesh(expert=8, data=2),
      "mesh expert=8 x tensor=1 x stage=1 x data=2 needs 16 devices, found 8; choose mesh.expert=4",
    ),
  ],
)
def test_devices_that_do_not_fit_are_refused_with_what_would(sizes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    mesh.make(sizes)


@pytest.mark.parametrize("sizes", [config.Mesh(), config.Mesh(expert=4, tensor=2, stage=2)])
def test_the_mesh_that_is_proposed_fits(sizes):
  with pytest.raises(ValueError, match="choose mesh") as refused:
    mesh.make(sizes)
  name, size = re.search(r"choose mesh\.(\w+)=(\d+)", str(refused.value)).groups()
  proposed = {"expert": sizes.expert, "tensor": sizes.tensor, "stage": sizes.stage}
  mesh.make(config.Mesh(**{**proposed, name: int(size)}))
