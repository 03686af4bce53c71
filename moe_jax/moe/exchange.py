"""How rows travel between the devices that hold tokens and those that hold experts.

Letters: X devices of the expert axis, e experts of this device, C rows per source device and
expert, R = X * tensor * C rows that reach each expert. `to_experts` takes this device's rows for
all experts; `to_tokens` brings back what the experts made of them and sums the tensor ranks'
partial results. Knows rows; must not know tokens or what an expert computes.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.parallel import collectives
from moe_jax.parallel.axes import EXPERT, TENSOR


class Exchange(NamedTuple):
  """The two directions; each undoes the row order of the other."""

  to_experts: Callable[[jax.Array], jax.Array]
  to_tokens: Callable[[jax.Array], jax.Array]


def _send(rows_ECD):
  """Returns rows_eRD with R = X * C: the exchange between hosts."""
  num_ranks = jax.lax.axis_size(EXPERT)
  num_experts, num_rows, width = rows_ECD.shape
  rows_XeCD = rows_ECD.reshape(num_ranks, num_experts // num_ranks, num_rows, width)
  rows_XeCD = collectives.exchange(rows_XeCD, EXPERT)
  return rows_XeCD.swapaxes(0, 1).reshape(num_experts // num_ranks, num_ranks * num_rows, width)


def _return(rows_eRD):
  """Returns rows_ECD: undoes `_send`."""
  num_ranks = jax.lax.axis_size(EXPERT)
  num_local, num_rows, width = rows_eRD.shape
  rows_eXCD = rows_eRD.reshape(num_local, num_ranks, num_rows // num_ranks, width)
  rows_XeCD = collectives.exchange(rows_eXCD.swapaxes(0, 1), EXPERT)
  return rows_XeCD.reshape(num_ranks * num_local, num_rows // num_ranks, width)


def _hierarchical_to_experts(rows_ECD):
  """Between hosts with this tensor rank's own rows, then all ranks' rows inside the host.

  Communication: all-to-all over `expert`, (X - 1) / X * E * C * D elements; then all-gather over
  `tensor`, (tensor - 1) * E * C * D elements.
  """
  return collectives.gather(_send(rows_ECD), TENSOR, 1)


def _hierarchical_to_tokens(rows_eRD):
  """Sums inside the host, each tensor rank keeping its own rows, then between hosts.

  Communication: reduce-scatter over `tensor`, (tensor - 1) * E * C * D elements; then all-to-all
  over `expert`, (X - 1) / X * E * C * D elements.
  """
  return _return(collectives.reduce_scatter(rows_eRD, TENSOR, 1))


def _flat_to_experts(rows_ECD):
  """Every tensor rank sends all ranks' rows between hosts: the baseline.

  Communication: all-gather over `tensor`, (tensor - 1) * E * C * D elements; then all-to-all over
  `expert`, (X - 1) / X * tensor * E * C * D elements.
  """
  return _send(collectives.gather(rows_ECD, TENSOR, 1))


def _flat_to_tokens(rows_eRD):
  """Every tensor rank returns all ranks' partial rows between hosts, then sums.

  Communication: all-to-all over `expert`, (X - 1) / X * tensor * E * C * D elements; then
  reduce-scatter over `tensor`, (tensor - 1) * E * C * D elements.
  """
  return collectives.reduce_scatter(_return(rows_eRD), TENSOR, 1)


def _float8_to_experts(rows_ECD):
  """As hierarchical, but between hosts each row is float8 with a float32 scale behind it.

  Communication: all-to-all over `expert`, (X - 1) / X * E * C * (D + 4) elements; then all-gather
  over `tensor`, (tensor - 1) * E * C * D elements.
  """
  return collectives.gather(_float8(_send)(rows_ECD), TENSOR, 1)


def _float8_to_tokens(rows_eRD):
  """As hierarchical, but between hosts each row is float8 with a float32 scale behind it.

  Communication: reduce-scatter over `tensor`, (tensor - 1) * E * C * D elements; then all-to-all
  over `expert`, (X - 1) / X * E * C * (D + 4) elements.
  """
  return _float8(_return)(collectives.reduce_scatter(rows_eRD, TENSOR, 1))


def _float8(travel):
  """Returns `travel` of rounded rows; integers travel as they are."""

  def rounded(rows):
    if not jnp.issubdtype(rows.dtype, jnp.floating):
      return travel(rows)
    return _travel_float8(rows, travel)

  return rounded


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _travel_float8(rows_abD, travel):
  """Returns `travel(rows)`, each row rounded to float8 (4 exponent bits, 3 of mantissa), its
  largest element to the largest float8.

  The error of an element is at most 1/16 of it, or 2^-10 of that of the row's largest over 448
  where it is tiny; of a row of normal numbers it is 2.6% in relative L2. A row whose largest is
  below 448 times the least float32, 5.3e-36, is as one with that as its largest. The gradient
  travels the same way.

  Source: FP8 Formats for Deep Learning (arXiv:2209.05433), E4M3.
  """
  largest_ab1 = jnp.max(jnp.abs(rows_abD), -1, keepdims=True).astype(jnp.float32)
  # No smaller than the least normal number: XLA takes what is below for 0, and would divide by it.
  scale_ab1 = jnp.maximum(largest_ab1, jnp.finfo(jnp.float32).tiny * _LARGEST) / _LARGEST
  small_abD = (rows_abD.astype(jnp.float32) / scale_ab1).astype(jnp.float8_e4m3fn)
  # One message for both: a second would wait for the first, and cost its latency.
  bytes_of = lambda array: jax.lax.bitcast_convert_type(array, jnp.uint8)
  arrived = travel(jnp.concatenate([bytes_of(small_abD), bytes_of(scale_ab1[..., 0])], -1))
  small_abD = jax.lax.bitcast_convert_type(arrived[..., :-4], jnp.float8_e4m3fn)
  scale_ab = jax.lax.bitcast_convert_type(arrived[..., -4:], jnp.float32)
  return (small_abD.astype(jnp.float32) * scale_ab[..., None]).astype(rows_abD.dtype)


def _travel_float8_forward(rows_abD, travel):
  return _travel_float8(rows_abD, travel), None


def _travel_float8_backward(travel, _, gradient):
  return (_travel_float8(gradient, _WAY_BACK[travel]),)


_travel_float8.defvjp(_travel_float8_forward, _travel_float8_backward)

_LARGEST = float(jnp.finfo(jnp.float8_e4m3fn).max)  # 448
_WAY_BACK = {_send: _return, _return: _send}

EXCHANGE: dict[str, Exchange] = {
  "hierarchical": Exchange(_hierarchical_to_experts, _hierarchical_to_tokens),
  "flat": Exchange(_flat_to_experts, _flat_to_tokens),
  "hierarchical_float8": Exchange(_float8_to_experts, _float8_to_tokens),
}
