"""Leaves against the parameter tree that the model declares and the rules that place it."""

import dataclasses
import itertools
import math

import jax
import pytest
from jax.sharding import AbstractMesh

from moe_jax import config
from moe_jax.model import transformer
from moe_jax.parallel import axes, sharding
from moe_jax.plan import cost
from moe_jax.plan.leaves import leaves
from moe_jax.train import streaming
from tests import runs

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
MESHES = [
  config.Mesh(),
  config.Mesh(8, 1, 1),
  config.Mesh(2, 2, 2),
  config.Mesh(4, 4, 2),
  config.Mesh(1, 1, 1, 8),
  config.Mesh(1, 2, 2, 2),
  config.Mesh(2, 2, 2, 2),
  config.Mesh(4, 1, 1, 6),
  # No width divides by both axes, or by one of them.
  config.Mesh(8, 1, 1, 2),
  config.Mesh(2, 4, 1, 5),
  config.Mesh(8, 1, 2, 3),
]
each_model = pytest.mark.parametrize("model", MODELS, ids=NAMES)
each_mesh = pytest.mark.parametrize("mesh", MESHES, ids=str)


def placed(model, mesh):
  """Returns the mesh that the rules know, and each parameter's shape and spec."""
  abstract = AbstractMesh(tuple(getattr(mesh, name) for name in axes.ALL), axes.ALL)
  shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), model))
  specs = jax.tree.leaves(transformer.specs(model), is_leaf=lambda n: isinstance(n, jax.P))
  return abstract, list(zip(jax.tree.leaves(shapes), specs, strict=True))


@each_model
@each_mesh
def test_a_device_holds_what_the_rules_place_there(model, mesh):
  abstract, parameters = placed(model, mesh)
  place = lambda spec: jax.sharding.NamedSharding(abstract, spec)
  computed, state = [], []
  for leaf, spec in parameters:
    computed.append(math.prod(place(spec).shard_shape(leaf.shape)))
    zero = sharding.zero_spec(spec, leaf.shape, abstract)
    state.append(math.prod(place(zero).shard_shape(leaf.shape)))
  held = leaves(model)
  assert sorted(leaf.elements(mesh) for leaf in held) == sorted(computed)
  assert sorted(leaf.state_elements(mesh) for leaf in held) == sorted(state)


@each_model
@each_mesh
def test_shares_are_those_of_the_rules(model, mesh):
  abstract, parameters = placed(model, mesh)
  ruled = [(a.shape, *sharding.shares(spec, a.shape, abstract)) for a, spec in parameters]
  held = leaves(model)
  assert sorted((leaf.shape, *leaf.shares(mesh)) for leaf in held if leaf.shares(mesh).axes) == (
    sorted(row for row in ruled if row[2])
  )
  for leaf in held:
    assert leaf.mesh_axes().isdisjoint(leaf.shares(mesh).axes)
    whole = leaf.whole_elements(mesh)
    assert list(whole) == list(leaf.shares(mesh).axes)
    # Along each axis a rank takes its part of what the axis before left of it.
    parts = [*whole.values(), leaf.state_elements(mesh)]
    assert parts[0] == leaf.elements(mesh)
    for axis, (before, after) in zip(whole, itertools.pairwise(parts), strict=True):
      assert before == after * getattr(mesh, axis)


def test_a_width_that_divides_by_one_axis_alone_is_split_along_that_one():
  """Of 20 positions of a norm 8 ranks of experts take none, 5 copies 4 each; 2 ranks and 4 copies
  would ask for 8, so 2 ranks take 10 each."""
  norm = lambda mesh: next(
    leaf.shares(mesh)
    for leaf in leaves(dataclasses.replace(SMALL, d_model=20))
    if leaf.name == "attention_norm"
  )
  assert norm(config.Mesh(8, 1, 1, 5)) == (1, ("data",))
  assert norm(config.Mesh(2, 1, 1, 4)) == (1, ("expert",))
  assert norm(config.Mesh(2, 1, 1, 5)) == (1, ("expert", "data"))
  assert norm(config.Mesh(8, 1, 1, 3)) == (None, ())


@pytest.mark.parametrize("mesh", [(2, 2, 2, 1), (2, 2, 1, 2), (1, 1, 2, 4), (4, 1, 1, 4)], ids=str)
def test_weights_that_the_pipeline_gathers_are_by_layer(mesh):
  mesh = config.Mesh(*mesh)
  settings = runs.settings(mesh=dataclasses.asdict(mesh), train={"batch": 64})
  abstract, parameters = placed(settings.model, mesh)
  takes = streaming.summed(settings, abstract).takes
  of_layers = [leaf.shape for leaf, _ in parameters][: len(takes)]
  gathered = [shape for shape, is_taken in zip(of_layers, takes, strict=True) if is_taken]
  assert gathered
  found = [leaf.shape for leaf in leaves(settings.model) if leaf.is_by_layer(mesh)]
  assert sorted(found) == sorted(gathered)


@each_model
def test_on_one_device_they_are_the_counted_parameters(model):
  by_phase = dict.fromkeys(cost.PHASES, 0)
  for leaf in leaves(model):
    by_phase[leaf.phase] += leaf.elements(config.Mesh())
  assert by_phase == dataclasses.asdict(cost.num_parameters(model))
