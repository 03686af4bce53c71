"""The model's kernels as the rehearsal counts them: by name, by the blocks that they multiply."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import config
from moe_jax.model import attention_core, flash
from moe_jax.parallel import collectives
from moe_jax.rehearse import kernels, pod, program
from moe_jax.rehearse.hlo import Shape
from tests.rehearse import golden

# As XLA prints a Triton kernel: MLIR's attributes, the kernel's bytecode among them.
_CALL = (
  "%call.1 = (bf16[2,128,4,32]{3,2,1,0}, f32[2,4,128]{2,1,0}) custom-call(%q.0, %q.0, %q.0),"
  ' custom_call_target="__gpu$xla.gpu.triton", api_version=API_VERSION_TYPED_FFI,'
  ' metadata={op_name="jit(step)/attention/flash"}, backend_config={debug = false,'
  ' grid_x = 2 : i32, ir = "ML\\EFR\\22, name = \\22other }", name = "flash_forward",'
  " num_warps = 4 : i32}\n  "
)


def test_a_triton_kernel_is_read_by_its_name():
  text = golden.LISTED.replace("%gemm.1 =", "%q.0 = bf16[2,128,4,32]{3,2,1,0} parameter(1)\n"
    "  " + _CALL + "%gemm.1 =", 1)  # fmt: skip
  assert program.read(text, golden.MESH).unknown == {"custom-call __gpu$xla.gpu.triton": 1}
  found = program.read(text, golden.MESH, kernels.KERNELS)
  assert found.unknown == {}
  (kernel,) = (u for u, _ in program.flat(found.entry) if u.name == "call.1")
  # 3 of 4 blocks of 64 x 64 positions, 2 products of 2 x 32 operations, 8 rows and heads.
  assert kernel.work.flops == {"bf16": 3 * 64 * 64 * 2 * 2 * 32 * 8}
  assert kernel.work.num_bytes == (3 + 1) * 2 * 128 * 4 * 32 * 2 + 2 * 4 * 128 * 4
  assert kernel.phase == "attention"


def test_grouped_kernels_count_every_block():
  N, D, F = 640, 128, 256  # places; 2 experts of one of 3 layers
  index = (Shape("s32", (10,)), Shape("s32", (3,)), Shape("s32", (N,)))
  array = lambda *dims: Shape("bf16", dims)
  narrow, wide, both = array(500, D), array(N, F), array(N, 2, F)  # 500 rows that arrived
  gate_up, down = array(3, 2, D, 2, F), array(3, 2, F, D)
  arrays_of = {
    "grouped_hidden": ((narrow, gate_up), 2),
    "grouped_output": ((both, down), 1),
    "grouped_d_hidden": ((narrow, both, down), 1),
    "grouped_d_rows": ((both, gate_up), 2),
    "grouped_d_gate_up": ((narrow, array(N, 2 * F)), 2),
    "grouped_d_down": ((wide, narrow), 1),
  }
  assert {*arrays_of, *flash.PRODUCTS} == set(kernels.KERNELS)
  for name, (arrays, products) in arrays_of.items():
    kernel, operands = kernels.KERNELS[name], (*index, *arrays)
    assert kernel.flops(operands) == products * 2 * N * D * F
    # Of weights the experts of one layer are read, as far as there are blocks for them.
    place = next((i for i, shape in enumerate(operands) if shape in (gate_up, down)), None)
    assert kernel.read_parts(operands) == ({} if place is None else {place: 1 / 3})
  few = (*index[:2], Shape("s32", (64,)), narrow, gate_up)
  assert kernels.KERNELS["grouped_hidden"].read_parts(few) == {4: 1 / 6}


@pytest.mark.skipif(
  not importlib.util.find_spec("jax_plugins"), reason="the rehearse extra is not installed"
)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("dtype", "counted_as"), [("bfloat16", "bf16"), ("float32", "tf32")])
def test_the_compiled_kernels_are_counted(dtype, counted_as):
  S, N, G, H = 3 * flash.BLOCK, 4, 2, 32
  mesh = pod.describe("h100:1x1").mesh(config.Mesh())
  everywhere = PartitionSpec()
  struct = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(
    shape, dtype, sharding=NamedSharding(mesh, everywhere)
  )
  loss = lambda *arrays: attention_core.attention(*arrays).astype(jnp.float32).sum()
  # jax 0.12 knows the GPU by the mesh of the region that the train step is.
  gradient = jax.jit(
    jax.shard_map(
      lambda *arrays: collectives.varying(jax.grad(loss, (0, 1, 2))(*arrays)),
      mesh=mesh,
      in_specs=everywhere,
      out_specs=PartitionSpec(mesh.axis_names),
    )
  )
  arrays = struct(1, S, N, H), struct(1, S, G, H), struct(1, S, G, H)
  lowered = gradient.lower(*arrays, struct(1, S, dtype=jnp.int32))
  text = lowered.compile(compiler_options={"xla_gpu_autotune_level": 0}).as_text()
  found = program.read(text, dict(mesh.shape), kernels.KERNELS)
  assert found.unknown == {}
  flops = [unit.work.flops for unit, _ in program.flat(found.entry) if unit.work.flops]
  pairs = 6 * flash.BLOCK**2 * N  # on or below the diagonal of 3 x 3 blocks
  assert flops == [{counted_as: 2 * 2 * H * pairs}, {counted_as: 7 * 2 * H * pairs}]
