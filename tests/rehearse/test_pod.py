"""Pods on paper: what they are made of, and one line for what does not fit."""

import importlib.util

import pytest

from moe_jax import config
from moe_jax.plan.hardware import CHIPS
from moe_jax.rehearse import pod
from moe_jax.rehearse.targets import TARGETS

if not importlib.util.find_spec("jax_plugins"):
  pytest.skip("the rehearse extra is not installed", allow_module_level=True)


@pytest.mark.parametrize("kind", TARGETS)
def test_every_chip_is_described(kind):
  found = pod.describe(f"{kind}:3x4")
  assert len(found.devices) == 12 and found.topology == "3x1x4"
  assert {d.device_kind for d in found.devices} == {TARGETS[kind].device_name}
  assert found.chip is CHIPS[kind] and found.name == f"{kind}:3x4"


@pytest.mark.parametrize("kind", TARGETS)
def test_targets_agree_with_the_vendors_tables(kind):
  target, chip = TARGETS[kind], CHIPS[kind]
  assert target.device_memory_size == pytest.approx(chip.memory_bytes, rel=0.08)
  assert target.memory_bandwidth == pytest.approx(chip.memory_bytes_per_s, rel=0.05)
  assert target.source


def test_tensor_ranks_share_a_host():
  found = pod.describe("h100:16x4")
  mesh = found.mesh(config.Mesh(expert=8, tensor=4, stage=2))
  hosts = [[[d.id // 4 for d in row] for row in stage] for stage in mesh.devices[0]]
  assert all(len(set(row)) == 1 for stage in hosts for row in stage)
  assert dict(mesh.shape) == {"data": 1, "stage": 2, "expert": 8, "tensor": 4}


def test_copies_lie_on_hosts_of_their_own():
  mesh = pod.describe("h100:16x4").mesh(config.Mesh(expert=4, data=16))
  assert [{d.id // 4 for d in copy.flat} for copy in mesh.devices] == [{i} for i in range(16)]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("h100", "--pod=h100 is not CHIP:HOSTSxGPUS; write it as --pod=h100:16x4"),
    ("h100:16", "is not CHIP:HOSTSxGPUS"),
    ("h100:16x4x2", "is not CHIP:HOSTSxGPUS"),
    ("h10:16x4", "chip 'h10' is not known; did you mean h100?"),
    ("mi300:2x8", "chip 'mi300' is not known; choose from a100, h100, h200, b200"),
    ("h100:0x4", "has no GPU"),
  ],
)
def test_wrong_pods_are_refused_in_one_line(text, message):
  with pytest.raises(ValueError) as error:
    pod.describe(text)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_a_mesh_that_does_not_fit_is_refused():
  with pytest.raises(
    ValueError, match=r"needs 64 GPUs, pod h100:2x4 has 8; choose --pod=h100:16x4"
  ):
    pod.describe("h100:2x4").mesh(config.Mesh(expert=8, tensor=4, stage=2))
  with pytest.raises(ValueError, match=r"needs 6 GPUs.*choose --pod=h100:6x1"):
    pod.describe("h100:2x4").mesh(config.Mesh(expert=3, tensor=1, stage=2))


def test_a_missing_compiler_is_named_with_its_command(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(NotImplementedError, match=r"pip install --no-deps jax-cuda13-plugin==\d"):
    pod.describe("h100:2x4")
