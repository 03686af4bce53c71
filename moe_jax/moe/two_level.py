"""Dropless dispatch where the expert axis spans several GPUs of each host: a token crosses the slow
link once for each *host* that holds experts of its choice, however many of them it chose there.

Between hosts a token's row goes to the device of the sender's place on the other host; from there
one copy for each assignment goes to the rank that holds the expert. On the way back the copies are
weighted and summed where they were made, and one row crosses again. Both levels have buffers of
configured size; what has no room travels in further rounds, and nothing is dropped.

A router that limits a token to M hosts (`router.Limit`) lets the buffers between hosts be sized for
M; without a limit they are for min(K, hosts).

Letters: H hosts of G ranks of `expert` each; B rows from each device to each host in a round;
U = H * B rows that reach this device from all hosts; C rows from each device to each rank of its
host in a round; S source devices, G * tensor; e experts of this device.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe import grouped, queues, rows
from moe_jax.moe import plan as plans
from moe_jax.moe.experts import Weights
from moe_jax.moe.plan import Plan, Setting
from moe_jax.moe.router import Routing
from moe_jax.parallel import collectives
from moe_jax.parallel.axes import EXPERT, TENSOR
from moe_jax.pipeline.saving import residual


class _Places(NamedTuple):
  """The queues of (token, host) pairs, each at its first assignment; and into how many rounds
  inside the hosts each round between them is cut, int32, the same everywhere.
  """

  pairs: queues.Queues
  num_inside: jax.Array


class _Arrived(NamedTuple):
  """Rows for this device's experts; and where this device, as a place on the way, put what it
  passed on.
  """

  rows_RD: jax.Array
  groups: grouped.Groups
  passed_on: rows.Layout


class _Computed(NamedTuple):
  """Partial sums of this tensor rank, and `_Arrived.passed_on`."""

  rows_RD: jax.Array
  passed_on: rows.Layout


class Rows(NamedTuple):
  """Rows that a device sends in a round: B to each host, C to each rank of its own."""

  to_host: int
  to_rank: int


def rows_per_round(setting: Setting, num_ranks: int) -> Rows:
  """Returns the rows of a round: the capacity factor times the even shares.

  Args:
    setting: its `hosts_per_token` is M, 0 where the router does not limit it.
    num_ranks: of the expert axis.

  >>> free = Setting(2048, 2, 16, 1.25, False, None, ranks_per_host=8)
  >>> rows_per_round(free, 16), rows_per_round(free._replace(hosts_per_token=1), 16)
  (Rows(to_host=2048, to_rank=640), Rows(to_host=1280, to_rank=640))
  """
  T, K, G = setting.num_tokens, setting.num_choices, setting.ranks_per_host
  num_hosts = num_ranks // G
  most_hosts = min(setting.hosts_per_token or K, K, num_hosts)
  share = lambda number, among: max(1, math.ceil(setting.capacity_factor * number / among))
  to_host = min(T, share(T * most_hosts, num_hosts))
  return Rows(to_host, min(num_hosts * to_host * K, share(T * K, G)))


def plan(setting: Setting, routing: Routing, ranking_tE: jax.Array) -> Plan:
  """Returns the plan: every assignment served as the router chose, in as many rounds as it takes.

  Communication: all-to-all over `expert`, (H - 1) / H * H * W * G elements, with W the most rounds
  between hosts; all-to-all over `expert`, (X - 1) * 2 elements; then all-to-all over `tensor`,
  (tensor - 1) * 2 elements.
  """
  del ranking_tE
  num_hosts, per_round = _num_hosts(setting), _rows_per_round(setting)
  host_TK = routing.experts_TK // (setting.num_experts // num_hosts)
  pair_TKK = host_TK[:, :, None] == host_TK[:, None, :]
  first_TK = jnp.argmax(pair_TKK, 2).astype(jnp.int32)  # the token's first choice on that host
  is_first_TK = first_TK == jnp.arange(setting.num_choices, dtype=jnp.int32)[None, :]
  pairs = queues.make(jnp.where(is_first_TK, host_TK, num_hosts), num_hosts, num_hosts)
  window_TK = jnp.take_along_axis(pairs.place_TK, first_TK, 1) // per_round.to_host
  longest_inside = _longest_inside(setting, routing.experts_TK, window_TK)
  longest = jnp.stack([pairs.length_Q.max(), longest_inside])
  longest = collectives.max_small(longest, (EXPERT, TENSOR))
  num_between = jnp.maximum(-(-longest[0] // per_round.to_host), 1)
  num_inside = jnp.maximum(-(-longest[1] // per_round.to_rank), 1)
  nothing_TK = jnp.zeros(host_TK.shape, bool)
  made = plans.make(
    setting,
    routing.experts_TK,
    nothing_TK,
    num_hosts * per_round.to_host,
    num_between * num_inside,
    _Places(pairs, num_inside),
  )
  unique = num_inside * pairs.length_Q.sum(dtype=jnp.int32)
  return made._replace(tally=made.tally._replace(filled=unique))


def most_rounds(setting: Setting) -> int:
  """Returns the rounds of the worst routing: all tokens to one host, all arrivals to one rank."""
  num_hosts, per_round = _num_hosts(setting), _rows_per_round(setting)
  arrivals = num_hosts * per_round.to_host * setting.num_choices
  return _most_between(setting) * -(-arrivals // per_round.to_rank)


def send(setting: Setting, x_tD: jax.Array, plan: Plan, round_id: jax.Array | int) -> _Arrived:
  """Returns the rows of the round that reach this device, and the groups that they form.

  Communication: all-to-all over `expert`, (H - 1) / H * H * B * D elements, and with D = K for the
  choices; then inside the host all-to-all over `expert`, (G - 1) / G * G * C * D elements, and
  all-gather over `tensor`, (tensor - 1) * G * C * D elements; both also with C * D = e for sizes.
  """
  per_round, G = _rows_per_round(setting), setting.ranks_per_host
  between, inside = round_id // plan.places.num_inside, round_id % plan.places.num_inside
  layout = queues.layout(plan.places.pairs, per_round.to_host, between)
  x_UD = _between(setting, rows.tokens_to_rows(x_tD, layout))
  experts_UK = _between(setting, _choices(setting, plan, layout))
  waiting = queues.make(experts_UK, setting.num_experts // _num_hosts(setting), G)
  passed_on = jax.tree.map(residual, queues.layout(waiting, per_round.to_rank, inside))
  rows_RD = _to_ranks(setting, rows.tokens_to_rows(residual(x_UD), passed_on))
  sizes_Se = _to_ranks(setting, queues.window(waiting.sizes_Qe, per_round.to_rank, inside))
  return _Arrived(rows_RD, grouped.groups(sizes_Se, per_round.to_rank), passed_on)


def compute(weights: Weights, plan: Plan, arrived: _Arrived) -> _Computed:
  """Returns this tensor rank's partial sums, and what it takes to bring them home."""
  rows_RD = grouped.grouped_swiglu(weights, arrived.rows_RD, arrived.groups, plan.stacked)
  return _Computed(rows_RD, arrived.passed_on)


def back(
  setting: Setting,
  computed: _Computed,
  weights_TK: jax.Array,
  plan: Plan,
  round_id: jax.Array | int,
) -> jax.Array:
  """Returns `y_tD`, the weighted sum of each token's rows of the round.

  Communication: reduce-scatter over `tensor`, (tensor - 1) * G * C * D elements; then inside the
  host all-to-all over `expert`, (G - 1) / G * G * C * D elements; the weights go to where rows were
  copied, all-to-all over `expert`, (H - 1) / H * H * B * K elements; then all-to-all over
  `expert`, (H - 1) / H * H * B * D elements.
  """
  per_round = _rows_per_round(setting)
  layout = queues.layout(plan.places.pairs, per_round.to_host, round_id // plan.places.num_inside)
  rows_RD = collectives.reduce_scatter(computed.rows_RD, TENSOR, 0)
  rows_RD = residual(_inside(setting, rows_RD))
  weights_UK = _between(setting, rows.tokens_to_rows(weights_TK, layout))
  y_UD = rows.rows_to_tokens(rows_RD, residual(weights_UK), computed.passed_on)
  rows_HBD = residual(_between(setting, y_UD))
  # Weighted already: here a token's hosts are summed.
  return rows.rows_to_tokens(rows_HBD, jnp.ones_like(weights_TK), layout)


def _num_hosts(setting):
  return jax.lax.axis_size(EXPERT) // setting.ranks_per_host


def _rows_per_round(setting):
  return rows_per_round(setting, jax.lax.axis_size(EXPERT))


def _most_between(setting):
  return -(-setting.num_tokens // _rows_per_round(setting).to_host)


def _longest_inside(setting, experts_TK, window_TK):
  """Returns the longest queue, of any round, from this device to a rank of its host."""
  num_hosts, G = _num_hosts(setting), setting.ranks_per_host
  num_windows, num_ranks = _most_between(setting), num_hosts * G
  rank_TK = experts_TK // (setting.num_experts // num_ranks)
  key_TK = ((rank_TK // G) * num_windows + window_TK) * G + rank_TK % G
  # Sorted and searched: an array of assignments x windows x ranks would be large.
  ends = jnp.arange(num_windows * num_ranks + 1, dtype=jnp.int32)
  end_HWG = jnp.searchsorted(jnp.sort(key_TK.reshape(-1)), ends).astype(jnp.int32)
  number_HWG = jnp.diff(end_HWG).reshape(num_hosts, num_windows * G)
  arriving_HWG = collectives.exchange_between_hosts(number_HWG, EXPERT, G)
  return arriving_HWG.sum(0, dtype=jnp.int32).max()


def _choices(setting, plan, layout):
  """Returns, for each row, its token's experts by their place on the row's host; elsewhere the
  number of experts of a host, int32.
  """
  per_host = setting.num_experts // _num_hosts(setting)
  experts_RK = rows.tokens_to_rows(plan.expert_TK, layout)
  num_rows = experts_RK.shape[0]
  host_R = jnp.arange(num_rows, dtype=jnp.int32) // (num_rows // _num_hosts(setting))
  here_RK = experts_RK - (host_R * per_host)[:, None]
  is_filled_R = layout.assignment_R < plan.expert_TK.size
  is_here_RK = (here_RK >= 0) & (here_RK < per_host) & is_filled_R[:, None]
  return jnp.where(is_here_RK, here_RK, per_host)


def _between(setting, rows_Ui):
  """Returns rows_Ui: each host's rows to that host."""
  rows_HBi = rows_Ui.reshape(_num_hosts(setting), -1, *rows_Ui.shape[1:])
  rows_HBi = collectives.exchange_between_hosts(rows_HBi, EXPERT, setting.ranks_per_host)
  return rows_HBi.reshape(rows_Ui.shape)


def _inside(setting, rows_Ri):
  """Returns rows_Ri: each rank's rows to that rank of this host."""
  rows_GCi = rows_Ri.reshape(setting.ranks_per_host, -1, *rows_Ri.shape[1:])
  rows_GCi = collectives.exchange_inside_host(rows_GCi, EXPERT, setting.ranks_per_host)
  return rows_GCi.reshape(rows_Ri.shape)


def _to_ranks(setting, rows_Ri):
  """Returns the rows of all sources of this host, those of other tensor ranks included."""
  return collectives.gather(_inside(setting, rows_Ri), TENSOR, 0)
