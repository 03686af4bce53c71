"""The ways to bring tokens to their experts and back: one table, one signature.

A dispatch is five functions. Once for a micro-batch `plan` decides; then each round is three
phases: `send` (communication), `compute` (the experts), `back` (communication). Knows the back ends
by name; must not know what they do.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from moe_jax.moe import capacity, dense, dropless, gathered, ragged, stolen, two_level
from moe_jax.moe.experts import Weights
from moe_jax.moe.plan import Plan, Setting
from moe_jax.moe.router import Routing


class Dispatch(NamedTuple):
  """One way, for inside the manual region.

  Attributes:
    plan: (setting, routing, ranking_tE) -> Plan; nothing of it is differentiated. The
      ranking is `router.ranking`'s: only what spills goes by it.
    most_rounds: (setting) -> the most rounds that any plan has.
    send: (setting, x_tD, plan, round_id) -> what reaches this device's experts: rows, and what it
      takes to know whose they are.
    compute: (weights, plan, what was sent) -> this tensor rank's partial sums: rows, and what it
      takes to bring them home.
    back: (setting, rows, weights_TK, plan, round_id) -> `y_tD`, the weighted sum of what the
      experts made of the token's assignments of the round.
  """

  plan: Callable[[Setting, Routing, jax.Array], Plan]
  most_rounds: Callable[[Setting], int]
  send: Callable[[Setting, jax.Array, Plan, jax.Array | int], Any]
  compute: Callable[[Weights, Plan, Any], Any]
  back: Callable[[Setting, Any, jax.Array, Plan, jax.Array | int], jax.Array]


# Entries that read experts where they lie in the stack of layers, if it is given beside a layer's.
READ_IN_STACK = ("dropless", "ragged", "two_level")


def _of(module) -> Dispatch:
  return Dispatch(*(getattr(module, name) for name in Dispatch._fields))


DISPATCH: dict[str, Dispatch] = {
  "capacity": _of(capacity),
  "dropless": _of(dropless),
  "stealing": _of(stolen),
  "ragged": _of(ragged),
  "two_level": _of(two_level),
  "dense": _of(dense),
  "gathered": _of(gathered),
}
