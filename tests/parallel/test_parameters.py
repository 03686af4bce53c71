"""Declarations of parameters: scale, specs with leading axes, and the cast to the compute dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.parallel import parameters
from moe_jax.parallel.axes import EXPERT, STAGE, TENSOR


class Example(nnx.Module):
  def __init__(self, rngs):
    self.kernel = parameters.parameter(rngs, (8, 64, 64), ("experts", "model", "hidden"), fan_in=64)
    self.router = parameters.parameter(
      rngs, (64, 8), ("model", "all_experts"), fan_in=64, keep_float32=True
    )
    self.norm = parameters.scale((64,), ("model",))


@pytest.fixture
def state():
  return nnx.state(Example(nnx.Rngs(0)))


def test_initial_values(state):
  assert state["kernel"][...].dtype == jnp.float32
  assert np.std(state["kernel"][...]) == pytest.approx(64**-0.5, rel=0.02)
  np.testing.assert_array_equal(state["norm"][...], np.ones(64))


def test_specs_follow_the_declaration(state):
  specs = parameters.specs(state)
  assert specs["kernel"].get_value() == P(EXPERT, None, TENSOR)
  stacked = parameters.specs(state, "layers")
  assert stacked["kernel"].get_value() == P(STAGE, EXPERT, None, TENSOR)
  assert stacked["norm"].get_value() == P(STAGE, None)
  assert jax.tree.structure(specs) == jax.tree.structure(state)


def test_cast_leaves_what_is_declared_float32(state):
  cast = parameters.cast(state, jnp.dtype("bfloat16"))
  assert cast["kernel"][...].dtype == jnp.bfloat16
  assert cast["router"][...].dtype == cast["norm"][...].dtype == jnp.float32
  assert state["kernel"][...].dtype == jnp.float32
