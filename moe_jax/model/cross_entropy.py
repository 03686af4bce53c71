"""Logits and their cross-entropy, each device a share of the vocabulary; and the gradient of both.

Only what a share's logits sum to travels, and the logits' gradient is multiplied in the compute
dtype, as every other gradient is: differentiating the float32 logits would multiply in float32.
Knows a kernel split over `stage` and `tensor`; must not know the model, or where `h` comes from.

Source: Megatron-LM (arXiv:1909.08053), section 3: cross-entropy of logits that stay where they are.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.parallel import collectives
from moe_jax.parallel.axes import STAGE, TENSOR

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def logits(h_bSD: jax.Array, kernel_Dv: jax.Array) -> jax.Array:
  """Returns `logits_bSv`, float32."""
  return _product("bsd,dv->bsv", h_bSD, kernel_Dv)


@jax.custom_vjp
def cross_entropy(
  h_bSD: jax.Array, kernel_Dv: jax.Array, targets_bS: jax.Array, weights_bS: jax.Array
) -> jax.Array:
  """Returns this device's share of the weighted cross-entropy, float32, nats; the shares sum to it.

  Args:
    h_bSD: what the head multiplies, the same on all devices of `stage` and `tensor`.
    kernel_Dv: this device's share, of `stage` major and `tensor` minor.
    targets_bS: of the whole vocabulary, int32.
    weights_bS: of each target; not differentiated.

  Communication: all-gather over `stage` and `tensor`, (stage * tensor - 1) * b * S elements; in the
  gradient none, which is this device's share of that of `h`.
  """
  return _forward(h_bSD, kernel_Dv, targets_bS, weights_bS)[0]


def _forward(h_bSD, kernel_Dv, targets_bS, weights_bS):
  logits_bSv = logits(h_bSD, kernel_Dv)
  shares_nbS = collectives.stack(jax.nn.logsumexp(logits_bSv, -1), (STAGE, TENSOR))
  total_bS = jax.nn.logsumexp(shares_nbS, 0)
  place_bS = _place(targets_bS, kernel_Dv)
  is_mine_bS = (place_bS >= 0) & (place_bS < kernel_Dv.shape[1])
  picked_bS1 = jnp.take_along_axis(logits_bSv, jnp.where(is_mine_bS, place_bS, 0)[..., None], -1)
  target_bS = jnp.where(is_mine_bS, picked_bS1[..., 0], 0.0)
  loss = jnp.sum(weights_bS * (total_bS / len(shares_nbS) - target_bS))
  return loss, (h_bSD, kernel_Dv, targets_bS, weights_bS, logits_bSv, total_bS)


def _backward(kept, gradient):
  h_bSD, kernel_Dv, targets_bS, weights_bS, logits_bSv, total_bS = kept
  entries_bSv = jax.lax.broadcasted_iota(jnp.int32, logits_bSv.shape, 2)
  is_target_bSv = entries_bSv == _place(targets_bS, kernel_Dv)[..., None]
  probabilities_bSv = jnp.exp(logits_bSv - total_bS[..., None])
  g_bSv = (probabilities_bSv - is_target_bSv.astype(jnp.float32)) * (gradient * weights_bS)[
    ..., None
  ]
  g_bSv = g_bSv.astype(h_bSD.dtype)
  g_h_bSD = _product("bsv,dv->bsd", g_bSv, kernel_Dv).astype(h_bSD.dtype)
  g_kernel_Dv = _product("bsd,bsv->dv", h_bSD, g_bSv).astype(kernel_Dv.dtype)
  nothing = np.zeros(targets_bS.shape, jax.dtypes.float0)
  return g_h_bSD, g_kernel_Dv, nothing, jnp.zeros_like(weights_bS)


cross_entropy.defvjp(_forward, _backward)


def _place(targets_bS, kernel_Dv):
  """Returns where targets lie in this device's share, outside of it if another device has them."""
  return targets_bS - jax.lax.axis_index((STAGE, TENSOR)) * kernel_Dv.shape[1]
