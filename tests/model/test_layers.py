"""Norm and rotary positions: the properties that define them."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model.layers import rms_norm, rotary

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_norm_is_x_over_its_root_mean_square(dtype):
  random = np.random.default_rng(0)
  x = jnp.asarray(random.normal(0, 3, (2, 3, 16)), dtype)
  scale = random.uniform(0.5, 1.5, 16).astype(np.float32)
  found = rms_norm(jnp.asarray(scale), x, 1e-5)
  wide = np.asarray(x, np.float64)
  expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * scale
  assert found.dtype == jnp.dtype(dtype)
  np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=TOLERANCE[dtype])


def test_norm_of_bfloat16_squares_in_float32():
  x = jnp.full((1, 4096), 1.0, jnp.bfloat16)  # a bfloat16 sum of these stops at 256
  np.testing.assert_array_equal(rms_norm(jnp.ones(4096), x, 1e-5), x)


def test_rotary_scores_depend_on_the_distance_alone():
  random = np.random.default_rng(0)
  q, k = (jnp.asarray(random.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in "qk")
  turn = lambda x, position: rotary(x, jnp.full((1, 1), position, jnp.int32), 10_000.0)
  score = lambda i, j: float((turn(q, i) * turn(k, j)).sum())
  assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
  assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_rotary_turns_pairs_by_their_own_angle():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 6)), jnp.float32)
  positions = np.array([[0, 1, 7]], np.int32)
  found = np.asarray(rotary(x, jnp.asarray(positions), 100.0))
  x = np.asarray(x, np.float64)
  pairs = x[..., :3] + 1j * x[..., 3:]
  angle = positions[0, :, None] * 100.0 ** (-np.arange(3) / 3)
  turned = pairs * np.exp(1j * angle)[None, :, None, :]
  np.testing.assert_allclose(
    found, np.concatenate([turned.real, turned.imag], -1), rtol=1e-5, atol=1e-6
  )
