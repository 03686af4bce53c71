"""Norms of queries and keys on one device and split over heads, against numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.model import qk_norm, transformer
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel import parameters
from moe_jax.parallel.axes import EXPERT, TENSOR

B, S, N, H = 2, 3, 4, 6
AXES = {"head": (3,), "projection": (2, 3)}


def test_table_holds_what_config_allows():
  assert set(qk_norm.QK_NORM) == set(config.QK_NORM)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("kind", AXES)
def test_norm_equals_numpy(kind, tensor, dtype):
  model = config.Model(qk_norm=kind, head_dim=H, norm_epsilon=1e-3)
  graph, state = nnx.split(qk_norm.make(model, N, "heads"))
  random = np.random.default_rng(0)
  scale = random.uniform(0.5, 1.5, state["scale"][...].shape).astype(np.float32)
  state["scale"] = state["scale"].replace(jnp.asarray(scale))
  x = jnp.asarray(random.normal(size=(B, S, N, H)), dtype)
  mesh = mesh_lib.make(config.Mesh(tensor=tensor, expert=2), jax.devices()[: 2 * tensor])
  spec = P(EXPERT, None, TENSOR)
  call = jax.jit(
    jax.shard_map(
      lambda state, x: qk_norm.apply(nnx.merge(graph, state), model, x),
      mesh=mesh, in_specs=(parameters.specs(state), spec), out_specs=spec,
    )
  )  # fmt: skip
  found = call(state, x)
  assert found.dtype == dtype
  wide = np.asarray(x, np.float64)
  mean_square = (wide**2).mean(AXES[kind], keepdims=True)
  expected = wide / np.sqrt(mean_square + 1e-3) * scale.reshape(-1, H)
  tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
  np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance, atol=1e-6)


def test_without_a_norm_there_are_no_parameters_and_nothing_changes():
  model = config.Model()
  assert qk_norm.make(model, N, "heads") is None
  x = jnp.ones((B, S, N, H))
  assert qk_norm.apply(None, model, x) is x


def test_norms_add_scales_and_change_no_other_parameter():
  model = config.Model(layers=1, d_model=16, heads=4, kv_heads=2, head_dim=4, expert_hidden=8)
  models = {kind: dataclasses.replace(model, qk_norm=kind) for kind in qk_norm.QK_NORM}
  init = lambda kind: transformer.init(jax.random.key(0), models[kind])
  named = lambda tree: {
    jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)
  }
  shapes = {kind: named(jax.eval_shape(lambda kind=kind: init(kind))) for kind in models}
  for kind, expected in {"head": [(1, 4), (1, 4)], "projection": [(1, 2, 4), (1, 4, 4)]}.items():
    added = sorted(set(shapes[kind]) - set(shapes["none"]))
    assert [shapes[kind][name].shape for name in added] == expected
    assert all("key_norm" in name or "query_norm" in name for name in added)
  plain, normed = (
    named(jax.jit(lambda kind=kind: init(kind))()) for kind in ("none", "projection")
  )
  for name, leaf in plain.items():
    np.testing.assert_array_equal(normed[name], leaf)
