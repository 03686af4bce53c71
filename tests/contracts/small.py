"""The small deployment whose collectives are counted."""

import jax
import jax.numpy as jnp

from tests.train import parity

# Sizes that no two dimensions of a device share, so that a shape tells what it is of.
MODEL = {"d_model": 24, "head_dim": 6, "experts": 8, "expert_hidden": 40, "layers": 4}
SEQUENCE = 32


def settings_of(mesh, **different):
  return parity.settings_of(mesh, sequence=SEQUENCE, model=MODEL, **different)


def struct(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)
