"""Norms of queries and keys before they turn: of each head alone, or over all heads together.

Local letter: n heads of this tensor rank. Knows this device's heads; must not know attention.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.model.layers import rms_norm
from moe_jax.parallel.axes import TENSOR
from moe_jax.parallel.collectives import varying_like
from moe_jax.parallel.parameters import scale
from moe_jax.pipeline.saving import residual


class Norm(nnx.Module):
  """Parameters of a norm of queries or of keys: scale [H], or [N, H] over all heads."""

  def __init__(self, shape: tuple[int, ...], logical_axes: tuple[str, ...]):
    self.scale = scale(shape, logical_axes)


class QkNorm(NamedTuple):
  """One way.

  Attributes:
    make: (heads, their logical axis, head_dim) -> the norm's parameters, or None if it has none.
    apply: (parameters, x_bSnH, epsilon) -> `x_bSnH`, for inside the manual region.
  """

  make: Callable[[int, str, int], Norm | None]
  apply: Callable[[Norm | None, jax.Array, float], jax.Array]


def make(model: config.Model, heads: int, logical_axis: str) -> Norm | None:
  """Returns the parameters of the model's norm of `heads` heads, None if it has none."""
  return QK_NORM[model.qk_norm].make(heads, logical_axis, model.head_dim)


def apply(norm: Norm | None, model: config.Model, x_bSnH: jax.Array) -> jax.Array:
  """Returns queries or keys `x_bSnH`, normed as the model says.

  Communication: `over_projection`'s where `qk_norm` is projection, else none.
  """
  return QK_NORM[model.qk_norm].apply(norm, x_bSnH, model.norm_epsilon)


def over_head(norm: Norm, x_bSnH: jax.Array, epsilon: float) -> jax.Array:
  """Returns each head over its own root mean square, times the scale.

  Source: Qwen3 (arXiv:2505.09388), section 2.
  """
  return rms_norm(norm.scale[...], residual(x_bSnH), epsilon)


def over_projection(norm: Norm, x_bSnH: jax.Array, epsilon: float) -> jax.Array:
  """Returns `x` over the root mean square of all heads of its position, times the scale.

  Communication: all-reduce over `tensor`, 2 * (tensor - 1) / tensor * b * S elements, float32; its
  gradient as much again.

  Source: OLMoE (arXiv:2409.02060), section 2.
  """
  x32_bSnH = residual(x_bSnH).astype(jnp.float32)
  squares_bS11 = jnp.sum(x32_bSnH * x32_bSnH, axis=(2, 3), keepdims=True)
  width = x_bSnH.shape[2] * x_bSnH.shape[3] * jax.lax.axis_size(TENSOR)
  # Typed as different on all devices, as everything that is kept for the backward pass.
  mean_square_bS11 = varying_like(jax.lax.psum(squares_bS11, TENSOR), squares_bS11) / width
  normed_bSnH = x32_bSnH * jax.lax.rsqrt(mean_square_bS11 + epsilon) * norm.scale[...][None, None]
  return normed_bSnH.astype(x_bSnH.dtype)


# The keys are config.QK_NORM.
QK_NORM: dict[str, QkNorm] = {
  "none": QkNorm(lambda heads, axis, head_dim: None, lambda norm, x_bSnH, epsilon: x_bSnH),
  "head": QkNorm(lambda heads, axis, head_dim: Norm((head_dim,), ("head_dim",)), over_head),
  "projection": QkNorm(
    lambda heads, axis, head_dim: Norm((heads, head_dim), (axis, "head_dim")), over_projection
  ),
}
