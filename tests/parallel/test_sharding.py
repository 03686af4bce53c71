"""The table of rules: specs, refusals, and what ZeRO-1 splits."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.model import transformer
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel import sharding
from moe_jax.parallel.axes import ALL, DATA, EXPERT, STAGE, TENSOR


@pytest.fixture(scope="module")
def mesh():
  return mesh_lib.make(config.Mesh(expert=2, tensor=2, stage=2))


@pytest.mark.parametrize(
  ("logical", "expected"),
  [
    (("layers", "experts", "model", "hidden"), P(STAGE, EXPERT, None, TENSOR)),
    (("vocab", "model"), P((STAGE, TENSOR), None)),
    (("model",), P(None)),
    ((), P()),
  ],
)
def test_spec(logical, expected):
  assert sharding.spec(logical) == expected


def test_every_rule_names_mesh_axes():
  assert {axis for rule in sharding.RULES.values() for axis in rule or ()} <= set(ALL)


def test_two_dimensions_along_one_mesh_axis_are_refused():
  with pytest.raises(
    ValueError, match="'heads' and 'hidden' of one array both lie along"
  ) as refused:
    sharding.spec(("heads", "hidden"))
  assert "'tensor'" in str(refused.value)
  with pytest.raises(ValueError, match="'layers' and 'vocab'"):
    sharding.spec(("layers", "vocab"))


def test_an_axis_without_a_rule_is_refused():
  with pytest.raises(ValueError, match="'header' has no sharding rule; known: layers, vocab"):
    sharding.spec(("header",))


@pytest.mark.parametrize("spec", [P(), P(STAGE), P((STAGE, TENSOR), None), P(None, EXPERT, TENSOR)])
def test_axes_are_split_or_replicated(spec):
  split, same = sharding.axes_of(spec), sharding.replicated_axes(spec)
  assert sorted((*split, *same)) == sorted(ALL)
  assert not set(split) & set(same)


@pytest.mark.parametrize(
  ("spec", "shape", "dimension", "expected"),
  [
    (P(None), (16,), 0, P(EXPERT)),
    (P(STAGE, None, TENSOR), (4, 16, 8), 1, P(STAGE, EXPERT, TENSOR)),
    (P((STAGE, TENSOR), None), (32, 4), 0, P((STAGE, TENSOR, EXPERT), None)),
    (P(EXPERT, None), (4, 16), None, P(EXPERT, None)),
    (P(None), (7,), None, P(None)),
    (P((STAGE, TENSOR)), (12, 6), 1, P((STAGE, TENSOR), EXPERT)),
  ],
)
def test_zero_splits_the_largest_dimension_that_divides(mesh, spec, shape, dimension, expected):
  found = sharding.shares(spec, shape, mesh)
  assert found == (dimension, () if dimension is None else (EXPERT,))
  assert sharding.zero_spec(spec, shape, mesh) == expected
  # jax agrees that it divides.
  jax.sharding.NamedSharding(mesh, expected).shard_shape(shape)


@pytest.mark.parametrize(
  ("spec", "shape", "shares", "expected"),
  [
    (P(None), (16,), (0, (EXPERT, DATA)), P((EXPERT, DATA))),
    (P(None, TENSOR), (4, 16), (1, (EXPERT, DATA)), P(None, (TENSOR, EXPERT, DATA))),
    # What lies along `expert` is split over copies alone, and stays where it is along `expert`.
    (P(STAGE, EXPERT, None), (2, 8, 6), (2, (DATA,)), P(STAGE, EXPERT, DATA)),
    (P(EXPERT), (8,), (None, ()), P(EXPERT)),
    # Not by both, so by one: `expert`.
    (P(None), (2,), (0, (EXPERT,)), P(EXPERT)),
    (P(None), (3, 6), (1, (EXPERT,)), P(None, EXPERT)),
    (P(None), (7,), (None, ()), P(None)),
  ],
)
def test_shares_are_of_copies_too(spec, shape, shares, expected):
  mesh = mesh_lib.make(config.Mesh(expert=2, tensor=2, data=2))
  assert sharding.shares(spec, shape, mesh) == shares
  assert sharding.zero_spec(spec, shape, mesh) == expected
  jax.sharding.NamedSharding(mesh, expected).shard_shape(shape)


@pytest.mark.parametrize(
  ("spec", "expected"),
  [
    (P(), P((DATA, TENSOR))),
    (P(None, TENSOR), P(DATA, TENSOR)),
    (P(STAGE, None), P((STAGE, DATA, TENSOR), None)),
    (P(TENSOR, EXPERT), P((TENSOR, DATA), EXPERT)),
  ],
)
def test_axes_of_one_device_may_be_named(spec, expected):
  mesh = mesh_lib.make(config.Mesh(expert=2, stage=4))
  assert sharding.with_axes_of_one(spec, mesh) == expected


def test_parameters_lie_as_the_design_says():
  specs = transformer.specs(config.Model())
  layers, shared = specs.layers, specs.shared
  assert layers["attention"]["query"].get_value() == P(STAGE, None, TENSOR, None)
  assert layers["attention"]["out"].get_value() == P(STAGE, TENSOR, None, None)
  assert layers["experts"]["gate_up"].get_value() == P(STAGE, EXPERT, None, None, TENSOR)
  assert layers["experts"]["down"].get_value() == P(STAGE, EXPERT, TENSOR, None)
  assert layers["router"]["kernel"].get_value() == P(STAGE, None, None)
  assert shared["embedding"]["table"].get_value() == P(TENSOR, None)
  assert shared["head"]["kernel"].get_value() == P(None, (STAGE, TENSOR))
  tied = transformer.specs(config.Model(tied_embeddings=True)).shared
  assert tied["embedding"]["table"].get_value() == P((STAGE, TENSOR), None)
