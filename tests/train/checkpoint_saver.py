"""Saves checkpoints without end, each filled with its step, until it is killed.

`python -m tests.train.checkpoint_saver FOLDER` prints `complete STEP` when STEP is complete.
"""

import sys

import jax
import jax.numpy as jnp

from moe_jax.train.checkpoint import Checkpoints


def filled(step: int) -> dict:
  """Returns arrays of 2 MB altogether, each element of which is `step`."""
  return {f"leaf{i}": jnp.full((256, 256), step, jnp.int32) for i in range(8)}


def main(folder: str):
  checkpoints = Checkpoints(folder, keep=2, report=print)
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), filled(0)
  )
  found = checkpoints.restore(abstract)
  step = found[0] if found else 0
  while True:
    step += 1
    checkpoints.save(step, filled(step), {"filled_with": step})
    print(f"complete {step - 1}", flush=True)


if __name__ == "__main__":
  main(sys.argv[1])
