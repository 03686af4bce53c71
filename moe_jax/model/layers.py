"""Small parts of the network: norm, rotary positions. Pure functions of this device's arrays."""

import jax
import jax.numpy as jnp


def rms_norm(scale_D: jax.Array, x: jax.Array, epsilon: float) -> jax.Array:
  """Returns `x` [..., D] over its root mean square, times the scale; computed in float32.

  Source: Root Mean Square Layer Normalization (arXiv:1910.07467), equation 4.
  """
  x32 = x.astype(jnp.float32)
  mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
  scale = jnp.expand_dims(scale_D, range(x.ndim - 1))
  return (x32 * jax.lax.rsqrt(mean_square + epsilon) * scale).astype(x.dtype)


def rotary(x_bSNH: jax.Array, positions_bS: jax.Array, theta: float) -> jax.Array:
  """Returns `x` with element i and i + H/2 of each head turned by position * theta ** (-2i / H).

  Source: RoFormer (arXiv:2104.09864), section 3.2.2, in the half-split pairing of Hugging Face
  checkpoints.
  """
  half = x_bSNH.shape[-1] // 2
  frequency_H = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_bSNH = positions_bS.astype(jnp.float32)[..., None, None] * frequency_H.reshape(
    1, 1, 1, half
  )
  cos, sin = jnp.cos(angle_bSNH), jnp.sin(angle_bSNH)
  first, second = jnp.split(x_bSNH.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x_bSNH.dtype)
