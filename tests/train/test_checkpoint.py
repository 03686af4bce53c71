import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.train import manifest
from moe_jax.train.checkpoint import Checkpoints
from tests import runs
from tests.train import checkpoint_saver

SPECS = {
  "params": {"w": PartitionSpec("expert", "tensor"), "e": PartitionSpec(("stage", "expert"))},
  "optimizer": [PartitionSpec(None, "tensor"), PartitionSpec("stage"), PartitionSpec()],
  "key": PartitionSpec(),
}


def values(step: int) -> dict:
  rng = np.random.default_rng(step)
  return {
    "params": {
      "w": rng.standard_normal((16, 32)).astype(np.float32),
      "e": rng.standard_normal((8, 4, 6)).astype(ml_dtypes.bfloat16),
    },
    "optimizer": [
      rng.standard_normal((3, 8)).astype(np.float32),
      rng.integers(-100, 100, (16,)).astype(np.int8),
      np.array(step, np.int32),
    ],
    "key": rng.integers(0, 2**32, (2,), np.uint32),
  }


def shardings(shape=(2, 2, 2)) -> dict:
  devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
  mesh = jax.sharding.Mesh(devices, ("expert", "tensor", "stage"))
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)


def placed(step: int, shape=(2, 2, 2)) -> dict:
  return jax.tree.map(jax.device_put, values(step), shardings(shape))


def abstract(shape=(2, 2, 2)) -> dict:
  return jax.tree.map(
    lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), values(0), shardings(shape)
  )


def assert_same(arrays: dict, step: int, shape=(2, 2, 2)):
  jax.tree.map(np.testing.assert_array_equal, arrays, values(step))
  jax.tree.map(lambda a, v: np.testing.assert_equal(a.dtype, v.dtype), arrays, values(step))
  jax.tree.map(lambda a, s: np.testing.assert_equal(a.sharding, s), arrays, shardings(shape))


@pytest.fixture
def lines():
  return []


@pytest.fixture
def checkpoints(tmp_path, lines):
  checkpoints = Checkpoints(tmp_path / "run", keep=2, report=lines.append)
  yield checkpoints
  checkpoints.close()


@pytest.fixture
def folder(tmp_path, checkpoints):
  """A folder with checkpoints 10 and 20."""
  for step in (10, 20):
    checkpoints.save(step, placed(step), {"data": {"position": step}})
  checkpoints.wait()
  return tmp_path / "run"


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_an_empty_folder_has_no_checkpoint(checkpoints, tmp_path):
  assert checkpoints.restore(abstract()) is None
  assert checkpoints.latest_step() is None
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("shape", [(2, 2, 2), (4, 2, 1), (1, 1, 8), (1, 1, 1)], ids=str)
def test_restores_bit_for_bit_onto_any_mesh(folder, checkpoints, lines, shape):
  step, arrays, meta = checkpoints.restore(abstract(shape))
  assert (step, meta) == (20, {"data": {"position": 20}})
  assert_same(arrays, 20, shape)
  assert lines == []


def test_one_device_to_many_and_back(checkpoints):
  checkpoints.save(1, placed(1, (1, 1, 1)), {})
  _, arrays, _ = checkpoints.restore(abstract((2, 2, 2)))
  assert_same(arrays, 1)
  checkpoints.save(2, arrays, {})
  _, arrays, _ = checkpoints.restore(abstract((1, 1, 1)))
  assert_same(arrays, 1, (1, 1, 1))


def test_the_random_key_continues_its_sequence(checkpoints):
  key = jax.random.key(3)
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  checkpoints.save(1, {"key": jax.random.key_data(key)}, {})
  _, arrays, _ = checkpoints.restore(
    {"key": jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=sharding)}
  )
  restored = jax.random.wrap_key_data(arrays["key"])
  np.testing.assert_array_equal(jax.random.bits(restored, (9,)), jax.random.bits(key, (9,)))


def test_arrays_may_be_donated_right_after_save_and_after_restore(checkpoints):
  overwrite = jax.jit(lambda x: -x, donate_argnums=0)
  sharding = shardings()["params"]["w"]
  for step in range(5):
    array = jax.device_put(jnp.full((2048, 512), step, jnp.float32), sharding)
    checkpoints.save(step, {"x": array}, {})
    for _ in range(20):
      array = overwrite(array)
    abstract_x = {"x": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)}
    _, first, _ = checkpoints.restore(abstract_x)
    assert (np.asarray(first["x"]) == step).all()
    _, second, _ = checkpoints.restore(abstract_x)
    assert (np.asarray(overwrite(first["x"])) == -step).all()
    assert first["x"].is_deleted()
    assert (np.asarray(second["x"]) == step).all()


def test_keeps_the_newest(checkpoints, tmp_path):
  for step in range(5):
    checkpoints.save(step, placed(step), {})
  checkpoints.wait()
  assert names(tmp_path / "run") == ["3", "4"]
  assert checkpoints.latest_step() == 4


def test_a_flipped_bit_in_any_file_is_reported_and_the_one_before_used(folder, checkpoints, lines):
  files = [path for path in (folder / "20").rglob("*") if path.stat().st_size and path.is_file()]
  assert len(files) > 8
  before = names(folder)
  for i, path in enumerate(files):
    original = path.read_bytes()
    at = (7919 * i) % len(original)
    path.write_bytes(original[:at] + bytes([original[at] ^ 1 << i % 8]) + original[at + 1 :])
    step, arrays, meta = checkpoints.restore(abstract())
    assert (step, meta) == (10, {"data": {"position": 10}})
    assert_same(arrays, 10)
    [line] = lines
    assert f"{folder / '20'} is damaged: {path.relative_to(folder / '20')} " in line
    path.write_bytes(original)
    lines.clear()
  assert checkpoints.restore(abstract())[0] == 20
  assert names(folder) == before


def _truncate(path):
  os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [Path.unlink, _truncate], ids=["missing", "truncated"])
@pytest.mark.parametrize("which", ["manifest.json", "meta.json", "arrays/d/*", "arrays/_METADATA"])
def test_a_missing_or_truncated_file_is_reported(folder, checkpoints, lines, damage, which):
  path = next((folder / "20").glob(which))
  damage(path)
  step, arrays, _ = checkpoints.restore(abstract())
  assert step == 10
  assert_same(arrays, 10)
  [line] = lines
  assert f"{folder / '20'} is damaged: {path.relative_to(folder / '20')} " in line
  assert "\n" not in line


def test_a_description_that_no_manifest_misses_is_damage_too(folder, checkpoints, lines):
  for name in ("meta.json", "manifest.json"):
    (folder / "20" / name).unlink()
  manifest.write(folder / "20")
  assert checkpoints.restore(abstract())[0] == 10
  assert lines == [
    f"checkpoint {folder / '20'} is damaged: meta.json is missing; trying the one before"
  ]


def test_all_damaged_is_an_error_that_lists_them(folder, checkpoints, lines):
  (folder / "10" / "meta.json").unlink()
  (folder / "20" / "manifest.json").write_text("{}")
  with pytest.raises(ValueError, match=r"20: manifest.json is not .*; 10: meta.json is missing"):
    checkpoints.restore(abstract())
  assert len(lines) == 2
  assert names(folder) == ["10", "20"]


def test_after_falling_back_the_damaged_step_is_put_aside_and_saved_again(folder, checkpoints):
  (folder / "20" / "meta.json").unlink()
  assert checkpoints.restore(abstract())[0] == 10
  assert names(folder) == ["10", "20"]
  checkpoints.save(20, placed(21), {"again": True})
  step, arrays, meta = checkpoints.restore(abstract())
  assert (step, meta) == (20, {"again": True})
  assert_same(arrays, 21)
  assert names(folder) == ["10", "20", "20.damaged"]
  checkpoints.save(30, placed(30), {})
  checkpoints.wait()
  assert names(folder) == ["20", "20.damaged", "30"]


def test_damaged_ones_do_not_count_as_kept(folder, checkpoints):
  (folder / "20" / "meta.json").unlink()
  checkpoints.restore(abstract())
  checkpoints.save(15, placed(15), {})
  checkpoints.wait()
  assert names(folder) == ["10", "15", "20.damaged"]


def test_an_interrupted_save_is_skipped(folder, checkpoints, lines):
  (folder / "20").rename(folder / "20.saving")
  (folder / "20.saving" / "manifest.json").unlink()
  assert checkpoints.restore(abstract())[0] == 10
  [line] = lines
  assert str(folder / "20.saving") in line and "incomplete" in line
  shutil.rmtree(folder / "10")
  assert checkpoints.restore(abstract()) is None


WRONG = {
  "shape": ("params/w: expected float32[16,33], got float32[16,32]", "w", (16, 33), jnp.float32),
  "dtype": ("params/w: expected bfloat16[16,32], got float32[16,32]", "w", (16, 32), jnp.bfloat16),
  "absent": ("params/z: expected float32[4], got no such leaf", "z", (4,), jnp.float32),
}


@pytest.mark.parametrize("case", WRONG)
def test_another_model_is_an_error_that_names_the_leaf(folder, checkpoints, lines, case):
  message, name, shape, dtype = WRONG[case]
  other = abstract()
  other["params"][name] = jax.ShapeDtypeStruct(shape, dtype, sharding=shardings()["key"])
  with pytest.raises(ValueError) as raised:
    checkpoints.restore(other)
  assert message in str(raised.value) and str(folder / "20") in str(raised.value)
  assert names(folder) == ["10", "20"] and lines == []
  assert checkpoints.restore(abstract())[0] == 20


def test_a_leaf_that_the_model_lacks_is_named(folder, checkpoints):
  other = abstract()
  del other["params"]["e"]
  with pytest.raises(ValueError, match="params/e: expected no such leaf, got bfloat16"):
    checkpoints.restore(other)


def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, checkpoints):
  x = jnp.ones(2)
  for arrays, meta, step, message in [
    ({"x": 3}, {}, 1, "x is a int; expected a jax.Array"),
    ({"x": jax.random.key(0)}, {}, 1, "x is a random key"),
    ({"x": jnp.ones((0, 3))}, {}, 1, r"x is float32\[0,3\] and so has no elements"),
    ({"a": {"b": x}, "a/b": x}, {}, 1, "two leaves are called a/b"),
    ({}, {}, 1, "no leaf"),
    ({"x": x}, {"when": object()}, 1, "meta is not plain JSON"),
    ({"x": x}, {}, -1, "step=-1 is negative"),
  ]:
    with pytest.raises(ValueError, match=message):
      checkpoints.save(step, arrays, meta)
  with pytest.raises(ValueError, match="x has no sharding"):
    checkpoints.restore({"x": jax.ShapeDtypeStruct((2,), jnp.float32)})
  with pytest.raises(ValueError, match="keep=0"):
    Checkpoints(tmp_path, keep=0, report=print)
  (tmp_path / "file").touch()
  with pytest.raises(ValueError, match="is a file"):
    Checkpoints(tmp_path / "file", keep=1, report=print)
  assert not (tmp_path / "run").exists()


def test_an_unwritable_folder_is_one_clear_error(tmp_path):
  (tmp_path / "file").touch()
  checkpoints = Checkpoints(tmp_path / "file" / "run", keep=1, report=print)
  with pytest.raises(OSError, match=f"saving checkpoint 7 in {tmp_path}/file/run failed: .*Not a"):
    checkpoints.save(7, placed(7), {})
  checkpoints.close()


@contextlib.contextmanager
def full_disk():
  """Limits the size of files, which fails the writes of background threads as a full disk does."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


LARGE = {"x": np.random.default_rng(0).standard_normal((512, 1024), np.float32)}


def test_a_full_disk_surfaces_and_leaves_the_others(folder, checkpoints):
  for surfaced_by in (checkpoints.wait, lambda: checkpoints.save(31, placed(31), {})):
    with full_disk():
      checkpoints.save(30, jax.tree.map(jnp.asarray, LARGE), {})
      with pytest.raises(OSError, match=f"saving checkpoint 30 in {folder} failed: .*arge"):
        surfaced_by()
    assert names(folder) == ["10", "20"]
    step, arrays, _ = checkpoints.restore(abstract())
    assert step == 20
    assert_same(arrays, 20)
  checkpoints.save(30, placed(30), {})
  assert checkpoints.restore(abstract())[0] == 30


def test_closing_surfaces_a_failed_save(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1, report=print)
  with full_disk():
    checkpoints.save(1, jax.tree.map(jnp.asarray, LARGE), {})
    with pytest.raises(OSError, match="saving checkpoint 1 in"):
      checkpoints.close()
  assert names(tmp_path) == []


def test_closing_after_an_error_raises_no_other_and_gives_back_the_room(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1, report=print)
  with full_disk():
    checkpoints.save(1, jax.tree.map(jnp.asarray, LARGE), {})
    checkpoints.close(failed=True)
  assert names(tmp_path) == []
  assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def test_close_ends_every_thread(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1, report=print)
  checkpoints.save(1, placed(1), {})
  checkpoints.close()
  assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
  assert names(tmp_path) == ["1"]


def _environment(**settings):
  strict = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
  return {**os.environ, **strict, "PYTHONPATH": str(runs.ROOT), "JAX_PLATFORMS": "cpu", **settings}


def _killed(folder, delay_s: float) -> int:
  """Lets a process save into `folder` and kills it; returns the last step it called complete."""
  command = [sys.executable, "-W", "error", "-m", "tests.train.checkpoint_saver", str(folder)]
  with subprocess.Popen(
    command, cwd=runs.ROOT, env=_environment(XLA_FLAGS=""), stdout=subprocess.PIPE, text=True
  ) as saver:
    last, num_complete = 0, 0
    while num_complete < 3:
      line = saver.stdout.readline()
      assert line, f"the saver ended with {saver.wait()}"
      if line.startswith("complete "):
        last, num_complete = int(line.split()[1]), num_complete + 1
    time.sleep(delay_s)
    saver.send_signal(signal.SIGKILL)
    for line in saver.stdout:
      last = int(line.split()[1])
  assert saver.returncode == -signal.SIGKILL
  return last


def test_kill_9_loses_no_complete_checkpoint(tmp_path, lines):
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  tree = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), checkpoint_saver.filled(0)
  )
  delays_s = random.Random(0)
  for _ in range(4):
    last = _killed(tmp_path, delays_s.uniform(0, 0.3))
    checkpoints = Checkpoints(tmp_path, keep=2, report=lines.append)
    step, arrays, meta = checkpoints.restore(tree)
    checkpoints.close()
    assert step >= last > 0
    assert meta == {"filled_with": step}
    for array in arrays.values():
      assert (np.asarray(array) == step).all()
    assert all("incomplete" in line for line in lines), lines


def test_two_processes(tmp_path):
  module = ["-m", "tests.train.checkpoint_process", str(runs.free_port())]
  processes = [
    subprocess.Popen(
      [sys.executable, "-W", "error", *module, str(i), str(tmp_path)],
      cwd=runs.ROOT, env=_environment(XLA_FLAGS=""),
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for i in range(2)
  ]  # fmt: skip
  try:
    outputs = [process.communicate(timeout=120) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], outputs
  seen = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
  [line] = seen[0].pop("lines")
  assert f"{tmp_path / 'run/20'} is damaged: arrays/ocdbt.process_1/d/" in line
  assert seen[1].pop("lines") == []
  assert seen[0] == seen[1]
  assert seen[0]["empty"] is None and seen[0]["latest"] == 20
  assert seen[0]["fell_back"] == [10, True, {"step": 10}]
  assert seen[0]["saved_again"] == [20, True, {"again": True}]
  assert (
    "ValueError" in seen[0]["other_model"] and "w: expected float32[8,8]" in seen[0]["other_model"]
  )
  assert "ValueError: scalar lies on one process's devices only" in seen[0]["local_leaf"]
  assert seen[0]["failed_on_one"].startswith("OSError: saving checkpoint 40")
  assert seen[0]["after_failing"] == 20
  assert "OSError: saving checkpoint 1 in" in seen[0]["unwritable"]
  assert "ValueError: another run writes to" in seen[0]["held_twice"]
  assert seen[0]["of_each"] == [[0, 7], [1, 7]]
