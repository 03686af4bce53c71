"""What the grouped SwiGLU kernels take of a GPU: registers, spills, shared memory, occupancy.

Run `python -m tests.moe.kernels`: XLA compiles a layer's experts at pod64 dimensions, bfloat16, for
one H100 that need not be there, and dumps its PTX and its launches; NVIDIA's `ptxas`, which must be
on the path, says what the machine code takes. Theoretical occupancy is how many of a processor's
warps fit at once; no time is measured. Tests nothing.

Source: CUDA C++ Programming Guide, table of compute capabilities, 9.0; register allocation in
units of 256 for each warp, 1 KiB of shared memory reserved for each block.
"""

import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ARCHITECTURE = "sm_90a"
WARPS, BLOCKS, REGISTERS, SHARED_BYTES = 64, 32, 65_536, 228 * 1024  # of a processor
REGISTER_UNIT, RESERVED_BYTES = 256, 1024

_COMPILE = """
from launch import environment
environment.described_devices("h100:1x1")
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from moe_jax import config
from moe_jax.moe import grouped
from moe_jax.moe.experts import Weights
from moe_jax.rehearse import pod

here = NamedSharding(pod.describe("h100:1x1").mesh(config.Mesh()), PartitionSpec())
struct = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=here)

def run(weights, rows, sizes, gradient):
  groups = grouped.groups(sizes, 1280)
  y, vjp = jax.vjp(lambda *given: grouped.grouped_swiglu(*given, groups), weights, rows)
  return y, vjp(gradient)

e, D, f, rows = 2, 512, 256, struct(8 * 1280, 512)
weights = Weights(struct(e, D, 2, f), struct(e, f, D))
jax.jit(run).lower(weights, rows, struct(8, e, dtype=jnp.int32), rows).compile()
"""


def occupancy(registers: int, threads: int, shared_bytes: int) -> float:
  """Returns the share of a processor's warps that fit at once, the theoretical occupancy.

  Args:
    registers: of each thread.
    threads: of each block.
    shared_bytes: of each block.

  >>> occupancy(96, 128, 49_152)
  0.25
  """
  warps = threads // 32
  per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
  by_registers = REGISTERS // per_warp // warps
  by_shared = SHARED_BYTES // (shared_bytes + RESERVED_BYTES)
  return min(by_registers, by_shared, WARPS // warps, BLOCKS) * warps / WARPS


def launches(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
  """Returns threads and bytes of shared memory of each block, by kernel, from XLA's dump."""
  found = {}
  for path in folder.glob("*.thunk_sequence.txt"):
    pattern = r"(grouped_\w+) grid: .*? threads: \[(\d+).*?shared_memory: (\d+) bytes"
    for name, threads, shared_bytes in re.findall(pattern, path.read_text()):
      found[name] = int(threads), int(shared_bytes)
  return found


def machine_code(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
  """Returns registers of each thread and bytes spilled, stores and loads, by kernel."""
  found = {}
  for path in folder.glob("*.ptx"):
    if ".entry grouped_" in path.read_text():
      command = ["ptxas", "-v", f"-arch={ARCHITECTURE}", str(path), "-o", "/dev/null"]
      text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
      name = re.search(r"entry function '(\w+)'", text)[1]
      spilled = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
      found[name] = int(re.search(r"Used (\d+) registers", text)[1]), spilled
  return found


def main():
  if not shutil.which("ptxas"):
    sys.exit("ptxas is not on the path; install it with: pip install nvidia-cuda-nvcc")
  with tempfile.TemporaryDirectory() as name:
    flags = f"--xla_dump_to={name} --xla_gpu_autotune_level=0"
    program = f"import os; os.environ['XLA_FLAGS'] = {flags!r}" + _COMPILE
    subprocess.run([sys.executable, "-c", program], check=True)
    code, launched = machine_code(pathlib.Path(name)), launches(pathlib.Path(name))
  print(
    f"{'kernel':22} {'registers':>9} {'spilled':>8} {'shared':>8} {'threads':>8} {'occupancy':>10}"
  )
  for kernel, (threads, shared_bytes) in sorted(launched.items()):
    registers, spilled = code[kernel]
    share = occupancy(registers, threads, shared_bytes)
    print(f"{kernel:22} {registers:9} {spilled:8} {shared_bytes:8} {threads:8} {share:10.1%}")


if __name__ == "__main__":
  main()
