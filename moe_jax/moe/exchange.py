"""How rows travel between the devices that hold tokens and those that hold experts.

Letters: X devices of the expert axis, e experts of this device, C rows per source device and
expert, R = X * tensor * C rows that reach each expert. `to_experts` takes this device's rows for
all experts; `to_tokens` brings back what the experts made of them and sums the tensor ranks'
partial results. Knows rows; must not know tokens or what an expert computes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

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


EXCHANGE: dict[str, Exchange] = {
  "hierarchical": Exchange(_hierarchical_to_experts, _hierarchical_to_tokens),
  "flat": Exchange(_flat_to_experts, _flat_to_tokens),
}
