"""Causal attention between queries, keys and values: the one place that chooses what computes it.

The choice is made when a program is lowered, by the platform that it is lowered for: two kernels on
NVIDIA GPUs, a loop over blocks elsewhere. The derivative stands outside the choice, so that both
keep the same values for the backward pass. Knows arrays; must not know parameters.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np

from moe_jax.model import blockwise, flash
from moe_jax.pipeline.saving import residual


def attention(q_bSNH, k_bSGH, v_bSGH, segments_bS) -> jax.Array:
  """Returns `o_bSNH`: each position attends to itself and earlier positions of its own segment.

  Args:
    q_bSNH: queries; N is a multiple of G, and query head n reads key head n // (N / G).
    k_bSGH: keys.
    v_bSGH: values.
    segments_bS: document numbers within the row, int32.

  Source: FlashAttention-2 (arXiv:2307.08691).
  """
  return _attend(q_bSNH, k_bSGH, v_bSGH, segments_bS)


def differentiable(forward: Callable, backward: Callable) -> Callable:
  """Returns `attention` as an implementation computes it, in values and gradients.

  What the backward pass needs is marked with `residual`: where that is saved, the forward pass is
  not computed again.

  Args:
    forward: (q, k, v, segments) -> (o, log_total_bNS).
    backward: (q, k, v, segments, o, log_total_bNS, do) -> (dq, dk, dv).
  """

  def keeping(q_bSNH, k_bSGH, v_bSGH, segments_bS):
    o_bSNH, log_total_bNS = forward(q_bSNH, k_bSGH, v_bSGH, segments_bS)
    q, k, v, o, log_total = map(residual, (q_bSNH, k_bSGH, v_bSGH, o_bSNH, log_total_bNS))
    return o, (q, k, v, segments_bS, o, log_total)

  def gradients(saved, do_bSNH):
    segments_bS = saved[3]
    return *backward(*saved, do_bSNH), np.zeros(segments_bS.shape, jax.dtypes.float0)

  attend = jax.custom_vjp(lambda *arrays: keeping(*arrays)[0])
  attend.defvjp(keeping, gradients)
  return attend


_attend = differentiable(
  functools.partial(jax.lax.platform_dependent, cuda=flash.forward, default=blockwise.forward),
  functools.partial(jax.lax.platform_dependent, cuda=flash.backward, default=blockwise.backward),
)
