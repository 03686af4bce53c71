"""Each XLA flag of the table starts a process; devices are set in time or refused."""

import importlib.metadata
import os
import pathlib
import subprocess
import sys

import pytest

from launch import environment

ROOT = pathlib.Path(__file__).parents[2]
COMPUTE = "import jax; print(jax.device_count(), jax.default_backend(), jax.numpy.ones(3).sum())"
VIRTUAL = "from launch import environment; environment.virtual_devices"


def run(code, **variables):
  inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
  return subprocess.run(
    [sys.executable, "-W", "error", "-c", code],
    cwd=ROOT,
    env={**inherited, **variables},
    capture_output=True,
    text=True,
    timeout=300,
  )


def test_every_flag_of_the_table_starts_a_process():
  done = run(f"from launch import environment; environment.live_devices(); {COMPUTE}")
  assert done.returncode == 0, done.stderr
  # The check above can fail: a flag that this XLA does not know ends the process.
  done = run(COMPUTE, XLA_FLAGS="--xla_cpu_no_such_flag=1")
  assert done.returncode != 0 and "xla_cpu_no_such_flag" in done.stderr


@pytest.mark.parametrize("first", ["pass", "import jax"])
def test_virtual_devices_before_and_after_importing_jax(first):
  done = run(
    f"{first}; {VIRTUAL}(3); {COMPUTE}",
    XLA_FLAGS="--xla_force_host_platform_device_count=5",
    JAX_NUM_CPU_DEVICES="2",
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == "3 cpu 3.0\n"


def test_virtual_devices_too_late_is_refused():
  done = run(f"{COMPUTE}; {VIRTUAL}(3)", JAX_PLATFORMS="cpu")
  assert done.returncode == 1
  assert "RuntimeError: virtual_devices(3) was called after jax started" in done.stderr


def test_types_of_64_bits_stay_off():
  done = run(f"{VIRTUAL}(1); import jax; print(jax.numpy.arange(1).dtype)", JAX_ENABLE_X64="1")
  assert (done.returncode, done.stdout) == (0, "int32\n"), done.stderr


def test_for_described_devices_nothing_is_kept():
  code = "from launch import environment; environment.described_devices('h100:1x8'); import jax"
  done = run(f"{code}; print(jax.config.jax_enable_compilation_cache)")
  assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_the_users_own_flags_stay(monkeypatch):
  users = "--xla_cpu_collective_timeout_seconds=7"
  monkeypatch.setenv("XLA_FLAGS", f"{users} --xla_dump_to=x")
  monkeypatch.setattr("glob.glob", lambda pattern: [])  # of a host without GPUs
  environment.live_devices()
  flags = os.environ["XLA_FLAGS"].split()
  assert flags[:2] == [users, "--xla_dump_to=x"]
  names = [flag.partition("=")[0].removeprefix("--") for flag in flags]
  assert sorted(names) == sorted(
    {*environment.XLA_FLAGS["cpu"], *environment.XLA_FLAGS["gpu"], "xla_dump_to"}
  )
  before = os.environ["XLA_FLAGS"]
  environment.live_devices()
  assert os.environ["XLA_FLAGS"] == before


def test_xla_is_told_how_many_gpus_share_a_host(monkeypatch):
  option = "--xla_gpu_analytical_latency_estimator_options=gpus_per_node=4"
  monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
  for pod, is_told in (("h100:16x4", True), ("h100:16", False)):
    monkeypatch.setenv("XLA_FLAGS", "")
    environment.described_devices(pod)
    assert (option in os.environ["XLA_FLAGS"].split()) == is_told
  devices = [f"/dev/nvidia{number}" for number in range(4)]
  monkeypatch.setattr("glob.glob", lambda pattern: devices)
  monkeypatch.setenv("XLA_FLAGS", "")
  environment.live_devices()
  assert option in os.environ["XLA_FLAGS"].split()
  assert run(COMPUTE, XLA_FLAGS=option, JAX_PLATFORMS="cpu").returncode == 0


def test_registered_memory_is_asked_for_where_nccl_is_right(monkeypatch):
  option = f"--{environment.SYMMETRIC_MEMORY}=true"
  installed = {"nvidia-nccl-cu13": "2.32.3"}

  def version(package):
    if package not in installed:
      raise importlib.metadata.PackageNotFoundError(package)
    return installed[package]

  monkeypatch.setattr("importlib.metadata.version", version)
  monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
  for go in (
    environment.live_devices,
    lambda **asked: environment.described_devices("h100:1x4", **asked),
  ):
    for asked in (False, True):
      monkeypatch.setenv("XLA_FLAGS", "")
      go(symmetric_memory=asked)
      assert (option in os.environ["XLA_FLAGS"].split()) == asked
  assert run(COMPUTE, XLA_FLAGS=option, JAX_PLATFORMS="cpu").returncode == 0
  installed["nvidia-nccl-cu13"] = "2.29.7"
  with pytest.raises(ValueError, match=r"found nvidia-nccl-cu13 2\.29\.7; run: pip install '"):
    environment.live_devices(symmetric_memory=True)
  installed.clear()
  with pytest.raises(ValueError, match="no package of it is installed"):
    environment.live_devices(symmetric_memory=True)


def test_no_devices_is_refused():
  with pytest.raises(ValueError, match="virtual_devices=0 is not positive"):
    environment.virtual_devices(0)


def test_a_deadlocked_collective_ends_the_process():
  # Device 0 alone enters a collective over all: without the timeouts this would wait for ever.
  code = f"""
import jax, functools
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
{VIRTUAL}(2)
mesh = Mesh(jax.devices(), ("x",))
def alone(x):
  go = lambda y: jax.lax.ppermute(y, "x", [(0, 1), (1, 0)])
  return jax.lax.cond(jax.lax.axis_index("x") == 0, go, lambda y: y + 1, x)
step = jax.jit(jax.shard_map(alone, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False))
print(step(jax.numpy.ones(2)))
"""
  names = [name for name in environment.XLA_FLAGS["cpu"] if name.endswith("timeout_seconds")]
  timeouts = " ".join(f"--{name}=2" for name in names)
  done = run(code, XLA_FLAGS=timeouts)
  assert done.returncode < 0, done  # ended by its own abort
  assert "rendezvous" in done.stderr.lower()
