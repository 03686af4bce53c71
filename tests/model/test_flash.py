"""The attention kernels: interpreted against plain attention, and compiled for GPUs on paper."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import config
from moe_jax.model import attention_core, flash
from moe_jax.parallel import collectives
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.rehearse import hlo, pod
from tests.model.attention_cases import TOLERANCE, arrays, check_against_plain, plain, relative_l2

J = flash.BLOCK
attention = attention_core.differentiable(
  functools.partial(flash.forward, interpret=True),
  functools.partial(flash.backward, interpret=True),
)


@pytest.mark.parametrize(
  ("S", "N", "G", "H", "dtype", "num_documents"),
  [
    (2 * J, 2, 2, 32, "float32", 1),
    (2 * J + 23, 4, 2, 32, "float32", 4),
    (J + 2, 3, 1, 64, "float32", 2),  # a group of three heads
    (J + 7, 2, 1, 128, "float32", 2),
    (J // 2 + 1, 2, 2, 24, "float32", 2),  # shorter than a block, a width between powers of two
    (2 * J + 23, 4, 2, 32, "bfloat16", 4),
  ],
)
def test_values_and_gradients_equal_plain_attention(S, N, G, H, dtype, num_documents):
  *qkv, segments, cotangent = arrays(S, N, G, dtype, num_documents, H=H)
  check_against_plain(attention, qkv, segments, cotangent)


def test_large_scores_overflow_nothing():
  *qkv, segments, cotangent = arrays(J + 3, 1, 1, "float32", 2, b=1)
  qkv = [100.0 * qkv[0], 100.0 * qkv[1], qkv[2]]
  found, vjp = jax.vjp(lambda *qkv: attention(*qkv, segments), *qkv)
  assert relative_l2(found, plain(*qkv, segments)) < TOLERANCE["float32"]
  assert all(jnp.isfinite(leaf).all() for leaf in vjp(cotangent))


def test_blocks_above_the_diagonal_are_not_touched():
  """What is not a number spreads by any product, also with a weight of 0."""
  q, k, v, segments, cotangent = arrays(3 * J, 1, 1, "float32", 1, b=1)
  forward = functools.partial(flash.forward, interpret=True)
  backward = functools.partial(flash.backward, interpret=True)
  saved = forward(q, k, v, segments)
  late = lambda x: x.at[:, 2 * J :].set(jnp.nan)
  o, _ = forward(q, late(k), late(v), segments)
  assert np.array_equal(o[:, : 2 * J], saved[0][:, : 2 * J]) and jnp.isnan(o[:, 2 * J :]).all()
  expected = backward(q, k, v, segments, *saved, cotangent)
  dq, _, _ = backward(q, late(k), late(v), segments, *saved, cotangent)
  assert np.array_equal(dq[:, : 2 * J], expected[0][:, : 2 * J])
  early = lambda x: x.at[:, :J].set(jnp.nan)
  _, *found = backward(early(q), k, v, segments, *saved, early(cotangent))
  for each, expected_each in zip(found, expected[1:], strict=True):
    assert np.array_equal(each[:, J:], expected_each[:, J:]) and jnp.isnan(each[:, :J]).all()


def test_the_kernels_multiply_as_often_as_they_declare():
  *qkv, segments, cotangent = arrays(J, 2, 1, "float32", 1, b=1)
  saved = jax.eval_shape(flash.forward, *qkv, segments)
  forward = jax.make_jaxpr(flash.forward)(*qkv, segments)
  backward = jax.make_jaxpr(flash.backward)(*qkv, segments, *saved, cotangent)
  found = {
    flash.FORWARD: str(forward).count("dot_general["),
    flash.BACKWARD: str(backward).count("dot_general["),
  }
  assert found == flash.PRODUCTS


def layers(q_lbSNH, k_lbSGH, v_lbSGH, segments_bS):
  """Gradients of three layers in a scan, each computed again but for its residuals: one device's
  part.
  """

  @functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("residual")
  )
  def layer(x_bSNH, qkv):
    q, k, v = qkv
    return attention_core.attention(x_bSNH * q, k, v, segments_bS), None

  def loss(q, k, v):
    start = collectives.varying_like(jnp.ones(q.shape[1:], q.dtype), q)
    x, _ = jax.lax.scan(layer, start, (q, k, v))
    return x.astype(jnp.float32).sum()

  return jax.grad(loss, (0, 1, 2))(q_lbSNH, k_lbSGH, v_lbSGH)


def compiled(mesh, S, N=4, G=2, H=32):
  """Returns the text of `layers` in a manual region over `mesh`, bfloat16."""
  split = PartitionSpec(None, "expert", None, "tensor")
  rows = PartitionSpec("expert")
  region = jax.shard_map(layers, mesh=mesh, in_specs=(split,) * 3 + (rows,), out_specs=(split,) * 3)
  struct = lambda shape, dtype, spec: jax.ShapeDtypeStruct(
    shape, dtype, sharding=NamedSharding(mesh, spec)
  )
  qkv = [struct((3, 2, S, heads, H), jnp.bfloat16, split) for heads in (N, G, G)]
  lowered = jax.jit(region).lower(*qkv, struct((2, S), jnp.int32, rows))
  # Autotuning would need the device.
  options = {} if mesh.devices.flat[0].platform == "cpu" else {"xla_gpu_autotune_level": 0}
  return lowered.compile(compiler_options=options).as_text()


def kernels_of(text):
  calls = [
    each
    for computation in hlo.parse(text).computations.values()
    for each in computation.instructions
    if each.opcode == "custom-call" and "triton" in each.attributes
  ]
  return sorted(call.backend_config["name"] for call in calls)


SIZES = config.Mesh(expert=2, tensor=2, stage=1)


@pytest.mark.skipif(
  not importlib.util.find_spec("jax_plugins"), reason="the rehearse extra is not installed"
)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_a_program_for_gpus_runs_each_kernel_once_a_layer_and_stores_no_scores():
  S = 512
  text = compiled(pod.describe("h100:2x2").mesh(SIZES), S)
  assert kernels_of(text) == [flash.BACKWARD, flash.FORWARD]
  sizes = [
    shape.elements
    for computation in hlo.parse(text).computations.values()
    for each in computation.instructions
    for shape in each.shapes
  ]
  # One device has 3 layers of one row and two heads of width 32.
  assert max(sizes) == 3 * S * 2 * 32 < S * S


def test_a_program_for_cpus_has_no_kernel():
  assert kernels_of(compiled(mesh_lib.make(SIZES, jax.devices()[:4]), 128)) == []
