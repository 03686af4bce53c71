"""One of two processes with four devices each, which save and restore together.

`python -m tests.train.checkpoint_process PORT PROCESS_ID FOLDER` prints one JSON object.
"""

import json
import sys
import time
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")

import numpy as np  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from moe_jax.train import lock, processes  # noqa: E402
from moe_jax.train.checkpoint import Checkpoints  # noqa: E402

SPECS = {
  "w": PartitionSpec("expert", "tensor"),
  "v": PartitionSpec(None, ("stage", "expert")),
  "replicated": PartitionSpec(),
}


def values(step: int) -> dict:
  rng = np.random.default_rng(step)
  return {name: rng.standard_normal((8, 16)).astype(np.float32) for name in SPECS}


def shardings(shape: tuple[int, int, int]) -> dict:
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), ("expert", "tensor", "stage"))
  return {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}


def placed(step: int, shape: tuple[int, int, int]) -> dict:
  return {
    name: jax.make_array_from_callback(value.shape, shardings(shape)[name], lambda i, v=value: v[i])
    for name, value in values(step).items()
  }


def same(arrays: dict, step: int) -> bool:
  return all(
    np.array_equal(shard.data, values(step)[name][shard.index])
    for name, array in arrays.items()
    for shard in array.addressable_shards
  )


def error_of(call) -> str:
  try:
    call()
  except (ValueError, OSError) as error:
    return f"{type(error).__name__}: {error}"
  return "none"


def main(port: str, process_id: str, folder: Path):
  jax.distributed.initialize(f"localhost:{port}", 2, int(process_id))
  lines, seen = [], {}
  checkpoints = Checkpoints(folder / "run", keep=2, report=lines.append)
  abstract = {
    name: jax.ShapeDtypeStruct((8, 16), np.float32, sharding=sharding)
    for name, sharding in shardings((4, 2, 1)).items()
  }
  seen["empty"] = checkpoints.restore(abstract)
  for step in (10, 20):
    checkpoints.save(step, placed(step, (2, 2, 2)), {"step": step})
  checkpoints.wait()
  seen["latest"] = checkpoints.latest_step()
  if process_id == "0":
    damaged = next(p for p in (folder / "run/20/arrays/ocdbt.process_1/d").iterdir())
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
  multihost_utils.sync_global_devices("damaged")
  step, arrays, meta = checkpoints.restore(abstract)
  seen["fell_back"] = [step, same(arrays, 10), meta]
  checkpoints.save(20, placed(21, (4, 2, 1)), {"again": True})
  step, arrays, meta = checkpoints.restore(abstract)
  seen["saved_again"] = [step, same(arrays, 21), meta]
  other = {
    **abstract,
    "w": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=abstract["w"].sharding),
  }
  seen["other_model"] = error_of(lambda: checkpoints.restore(other))
  local = {"scalar": jax.numpy.float32(1)}
  seen["local_leaf"] = error_of(lambda: checkpoints.save(30, local, {}))
  checkpoints.save(40, placed(40, (2, 2, 2)), {})
  if process_id == "0":
    # Where process 0 is about to write a file, once both processes' arrays are there.
    (folder / "run/40.saving/meta.json").mkdir()
  seen["failed_on_one"] = error_of(checkpoints.wait)[:40]
  seen["after_failing"] = checkpoints.restore(abstract)[0]
  checkpoints.close()
  (folder / "file").touch()
  unwritable = Checkpoints(folder / "file" / "run", keep=1, report=lines.append)
  seen["unwritable"] = error_of(lambda: unwritable.save(1, placed(1, (2, 2, 2)), {}))
  unwritable.close()
  with lock.held(folder):
    seen["held_twice"] = error_of(lambda: lock.held(folder).__enter__())
  seen["of_each"] = processes.of_each(np.array([int(process_id), 7])).tolist()
  alone = Checkpoints(folder / "alone", keep=1, report=lines.append)
  alone.save(1, placed(1, (2, 2, 2)), {})
  while process_id == "0" and not (folder / "closed").exists():
    time.sleep(0.01)  # as in a collective with process 1, which ends by an error
  alone.close(failed=True)
  (folder / "closed").touch()
  print(json.dumps({**seen, "lines": lines}))


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
