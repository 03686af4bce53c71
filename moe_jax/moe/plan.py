"""What every dispatch says of a micro-batch before anything travels: which expert serves which
assignment, and the counts of what became of them.

Knows tokens and experts by number; must not know rows, devices or how a plan is made.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe.exchange import Exchange
from moe_jax.moe.experts import Stacked


class Setting(NamedTuple):
  """What a dispatch knows when the program is compiled.

  Attributes:
    num_tokens: of this device.
    num_choices: experts that the router chooses for each token.
    num_experts: of the layer.
    capacity_factor: rows sent, over the even share.
    spill: an assignment that its expert has no room for goes to the token's next-ranked one.
    exchange: how rows travel, an entry of `exchange.EXCHANGE`.
    ranks_per_host: consecutive ranks of `expert` that share a host.
    hosts_per_token: to how many hosts the router limits a token; 0 where it does not.
    num_shadows: of stealing, at most so many experts' weights are sent for a micro-batch.
    shadow_tokens: of stealing, how many tokens a rank serves in the time that one shadow takes.
  """

  num_tokens: int
  num_choices: int
  num_experts: int
  capacity_factor: float
  spill: bool
  exchange: Exchange
  ranks_per_host: int = 1
  hosts_per_token: int = 0
  num_shadows: int = 0
  shadow_tokens: float = 0.0

  @property
  def num_assignments(self) -> int:
    return self.num_tokens * self.num_choices


class Counts(NamedTuple):
  """What became of this device's assignments, int32; sent = kept + spilled + dropped.

  Attributes:
    sent: assignments that the router made.
    kept: served by the expert that the router chose.
    spilled: served by another expert of lower rank.
    dropped: served by none.
    padded: rows sent that hold no assignment; of two levels those between hosts.
    rounds: exchanges there and back.
    stolen: of those kept, served by a rank that is not the expert's own.
  """

  sent: jax.Array
  kept: jax.Array
  spilled: jax.Array
  dropped: jax.Array
  padded: jax.Array
  rounds: jax.Array
  stolen: jax.Array


class Tally(NamedTuple):
  """What a plan's counts follow from, int32 scalars of this device.

  Attributes:
    served: assignments that some expert serves.
    spilled: of those, by another expert than the router chose.
    stolen: of those, by a rank that is not the expert's own.
    rows: sent in each round, empty ones included.
    filled: rows of all rounds that hold something.
  """

  served: jax.Array
  spilled: jax.Array
  stolen: jax.Array
  rows: jax.Array
  filled: jax.Array


class Plan(NamedTuple):
  """The way of each of this device's T x K assignments, integers all but for where weights lie.

  Attributes:
    expert_TK: the expert that serves the assignment; E, the number of experts, where none does.
    tally: of this device.
    num_rounds: how often rows are exchanged, the same on every device of `expert` and `tensor`.
    places: where the rows lie; read by the dispatch that made the plan and by nobody else.
    stacked: where the experts' weights lie in their stack, floats; None where nothing reads them
      there.
  """

  expert_TK: jax.Array
  tally: Tally
  num_rounds: jax.Array
  places: Any
  stacked: Stacked | None = None

  @property
  def counts(self) -> Counts:
    """The counts: to be asked for when tokens have travelled, for none waits for them."""
    sent = jnp.asarray(self.expert_TK.size, jnp.int32)
    return Counts(
      sent=sent,
      kept=self.tally.served - self.tally.spilled,
      spilled=self.tally.spilled,
      dropped=sent - self.tally.served,
      padded=self.num_rounds * self.tally.rows - self.tally.filled,
      rounds=self.num_rounds,
      stolen=self.tally.stolen,
    )


def make(setting: Setting, expert_TK, is_spilled_TK, num_rows: int, num_rounds, places) -> Plan:
  """Returns the plan; each served assignment fills a row, and none is stolen.

  Args:
    expert_TK: the expert that serves each assignment, E where none does.
    is_spilled_TK: where that is not the one that the router chose.
    num_rows: rows sent in each round, empty ones included.
    num_rounds: an int32 scalar.
    places: the dispatch's own.
  """
  served = jnp.sum(expert_TK < setting.num_experts, dtype=jnp.int32)
  tally = Tally(
    served=served,
    spilled=jnp.sum(is_spilled_TK, dtype=jnp.int32),
    stolen=jnp.zeros((), jnp.int32),
    rows=jnp.asarray(num_rows, jnp.int32),
    filled=served,
  )
  return Plan(expert_TK, tally, jnp.asarray(num_rounds, jnp.int32), places)
