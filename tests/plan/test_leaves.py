"""Leaves against the parameter tree that the model declares and the rules that place it."""

import dataclasses

import jax
import pytest
from jax.sharding import AbstractMesh

from moe_jax import config
from moe_jax.model import transformer
from moe_jax.parallel import sharding
from moe_jax.plan import cost
from moe_jax.plan.leaves import leaves

SMALL = config.Model(
  layers=4, d_model=24, heads=8, kv_heads=4, head_dim=8, experts=8, experts_per_token=2,
  expert_hidden=40, vocab=56, dtype="float32",
)  # fmt: skip
MODELS = [
  SMALL,
  dataclasses.replace(SMALL, tied_embeddings=True),
  dataclasses.replace(SMALL, qk_norm="head"),
  dataclasses.replace(SMALL, qk_norm="projection"),
  dataclasses.replace(SMALL, router_bias=True),
]
NAMES = ["plain", "tied", "head norm", "projection norm", "router bias"]
MESHES = [config.Mesh(), config.Mesh(8, 1, 1), config.Mesh(2, 2, 2), config.Mesh(4, 4, 2)]


@pytest.mark.parametrize("model", MODELS, ids=NAMES)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_device_holds_what_the_rules_place_there(model, mesh):
  shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), model))
  abstract = AbstractMesh((mesh.stage, mesh.expert, mesh.tensor), ("stage", "expert", "tensor"))
  place = lambda spec: jax.sharding.NamedSharding(abstract, spec)
  computed, state = [], []
  specs = jax.tree.leaves(transformer.specs(model), is_leaf=lambda n: isinstance(n, jax.P))
  for leaf, spec in zip(jax.tree.leaves(shapes), specs, strict=True):
    size = lambda shape: 1 if not shape else shape[0] * size(shape[1:])
    computed.append(size(place(spec).shard_shape(leaf.shape)))
    zero = sharding.zero_spec(spec, leaf.shape, abstract)
    state.append(size(place(zero).shard_shape(leaf.shape)))
  held = leaves(model)
  assert sorted(leaf.elements(mesh) for leaf in held) == sorted(computed)
  assert sorted(leaf.state_elements(mesh) for leaf in held) == sorted(state)


@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_on_one_device_they_are_the_counted_parameters(model):
  by_phase = dict.fromkeys(cost.PHASES, 0)
  for leaf in leaves(model):
    by_phase[leaf.phase] += leaf.elements(config.Mesh())
  assert by_phase == dataclasses.asdict(cost.num_parameters(model))
