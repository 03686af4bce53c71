"""The experts' SwiGLU over groups of uneven size, in blocks of rows that belong to one expert.

Rows lie as they arrived; a block gathers its own and multiplies them by its expert's weights, and
only blocks with rows are computed: on GPU by kernels (`grouped_kernels`), elsewhere by a loop over
experts, which slices an expert's weights once and not for every block. Blocks are small, so that
few rows are empty; but products of few rows are slow, and a gradient of weights in parts is to be
summed, so an expert's blocks are multiplied in one product of just their number, up to a limit past
which several follow each other. Knows rows and group sizes; must not know where rows come from.

Letters: S source devices, B rows of each, R = S * B, N blocks of J rows, e experts of this device,
f this tensor rank's share of the hidden units, g twice as many: gate and up.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe import grouped_kernels, order
from moe_jax.moe.experts import Stacked, Weights, joined
from moe_jax.parallel.collectives import varying_like
from moe_jax.pipeline.buffers import put
from moe_jax.pipeline.saving import residual

ROWS_PER_BLOCK = 64  # fewer leave fewer rows empty, but every number of blocks is a branch
_MOST_AT_ONCE = 8  # blocks
_OVER_EVEN = 2  # times an expert's even share: what one product holds at most


class Groups(NamedTuple):
  """Which received row lies where in the blocks, int32.

  Attributes:
    row_NJ: the received row at each place of the blocks. R and more where there is none: R + r at
      one place for each empty row r, 2 * R at what places are left.
    place_R: the place, block * J + j, of each received row; N * J where the row is empty.
    first_e: each expert's first block; its blocks follow each other.
    blocks_e: how many blocks it has.
  """

  row_NJ: jax.Array
  place_R: jax.Array
  first_e: jax.Array
  blocks_e: jax.Array


def blocks_at_once(num_rows: int, num_experts: int) -> int:
  """Returns how many blocks one product of the loop holds at most, for R rows of e experts.

  >>> blocks_at_once(5120, 16), blocks_at_once(5120, 2), blocks_at_once(100, 2)
  (8, 8, 1)
  """
  even_share = num_rows / (num_experts * ROWS_PER_BLOCK)
  of_all_rows = -(-num_rows // ROWS_PER_BLOCK)  # no expert has more, nor is there room for more
  return max(min(_MOST_AT_ONCE, int(_OVER_EVEN * even_share), of_all_rows), 1)


def groups(sizes_Se: jax.Array, num_source_rows: int) -> Groups:
  """Returns the blocks of rows that arrived sorted by expert from each source.

  Args:
    sizes_Se: rows of each source for each expert, the expert's rows one after another from the
      source's first row on, int32.
    num_source_rows: B, the rows of each source, empty ones included.
  """
  num_sources, num_experts = sizes_Se.shape
  num_rows = num_sources * num_source_rows
  J = ROWS_PER_BLOCK
  N = num_rows // J + num_experts  # enough, for each expert leaves less than a block empty
  sizes_e = sizes_Se.sum(0, dtype=jnp.int32)
  blocks_e = (sizes_e + J - 1) // J
  last_e = jnp.cumsum(blocks_e, dtype=jnp.int32)
  first_e = last_e - blocks_e

  # From a received row to its number among all rows by expert, empty ones last, and to its place.
  end_Se = jnp.cumsum(sizes_Se, 1, dtype=jnp.int32)
  ahead_Se = jnp.cumsum(sizes_Se, 0, dtype=jnp.int32) - sizes_Se  # of earlier sources
  before_e = jnp.cumsum(sizes_e, dtype=jnp.int32) - sizes_e
  start_Se = before_e[None, :] + ahead_Se - (end_Se - sizes_Se)
  row_B = jnp.arange(num_source_rows, dtype=jnp.int32)
  expert_SB = (row_B[None, :, None] >= end_Se[:, None, :]).sum(-1, dtype=jnp.int32)
  is_row_SB = expert_SB < num_experts
  expert_SB = jnp.minimum(expert_SB, num_experts - 1)
  filled_S = end_Se[:, -1]
  filled = filled_S.sum(dtype=jnp.int32)
  # An empty row has all rows before it, and the empty ones of its source and of earlier ones.
  start_S = filled - jnp.cumsum(filled_S, dtype=jnp.int32)
  source_S = jnp.arange(num_sources, dtype=jnp.int32) * num_source_rows
  number_SB = row_B[None, :] + jnp.where(
    is_row_SB, jnp.take_along_axis(start_Se, expert_SB, 1), (start_S + source_S)[:, None]
  )
  place_SB = jnp.where(is_row_SB, number_SB + (first_e * J - before_e)[expert_SB], N * J)
  place_R = place_SB.reshape(-1)

  # And back: in that order an expert's rows follow each other without the gaps between blocks.
  order_R = order.inverse(number_SB.reshape(-1))
  block_N = jnp.arange(N, dtype=jnp.int32)
  expert_N = (block_N[:, None] >= last_e[None, :]).sum(-1, dtype=jnp.int32)
  expert_N = jnp.minimum(expert_N, num_experts - 1)
  j_J = jnp.arange(J, dtype=jnp.int32)[None, :]
  within_NJ = (block_N - first_e[expert_N])[:, None] * J + j_J
  at = lambda number: order_R[jnp.minimum(number, num_rows - 1)]
  size_N, before_N = sizes_e[expert_N][:, None], before_e[expert_N][:, None]
  is_row_NJ = within_NJ < size_N
  # Empty rows come last, and there are no more of them than empty places; of those there are up to
  # this one as many as places without the rows among them.
  places_NJ = block_N[:, None] * J + j_J + 1 - before_N - jnp.minimum(within_NJ + 1, size_N)
  empty_NJ = filled - 1 + places_NJ
  none_NJ = num_rows + jnp.where(empty_NJ < num_rows, at(empty_NJ), num_rows)
  row_NJ = jnp.where(is_row_NJ, at(before_N + within_NJ), none_NJ)
  return Groups(row_NJ, place_R, first_e, blocks_e)


def grouped_swiglu(
  weights: Weights | Stacked, rows_RD: jax.Array, groups: Groups, stacked: Stacked | None = None
) -> jax.Array:
  """Returns this tensor rank's partial sums `rows_RD`, each row by its own expert; empty ones zero.

  Args:
    weights: of this device's experts; those in a stack are not differentiated.
    rows_RD: as they arrived.
    groups: whose they are.
    stacked: where the same weights lie in their stack, not differentiated: they are read there,
      where cutting out the layer first would copy all once more.

  Source: GLU Variants Improve Transformer (arXiv:2002.05202), equation 6.
  """
  weights = varying_like(weights, rows_RD)
  if isinstance(weights, Stacked):
    return _values(weights, rows_RD, groups)
  return _grouped_swiglu(weights, rows_RD, groups, stacked)


def _values(weights, rows_RD, groups):
  values = lambda *given: _kernels_forward(*given)[0]
  return jax.lax.platform_dependent(weights, rows_RD, groups, cuda=values, default=_blocks_values)


@jax.custom_vjp
def _grouped_swiglu(weights, rows_RD, groups, stacked):
  return _values(stacked or weights, rows_RD, groups)


def forward(weights: Weights | Stacked, rows_RD: jax.Array, groups: Groups):
  """Returns (`rows_RD`, gate_up_NJ2f): the sums, and of the blocks what `backward` takes.

  Args:
    groups: of these experts; there may be more, which have no rows.
  """
  return jax.lax.platform_dependent(
    weights, rows_RD, _of(weights, groups), cuda=_kernels_forward, default=_blocks_forward
  )


def backward(weights: Weights | Stacked, rows_RD, groups: Groups, gate_up_NJ2f, gradient_RD):
  """Returns the gradients of weights, float32, and of rows; arguments as of `forward` and as it
  returned them.
  """
  return jax.lax.platform_dependent(
    weights, rows_RD, _of(weights, groups), gate_up_NJ2f, gradient_RD,
    cuda=_kernels_backward, default=_blocks_backward,
  )  # fmt: skip


def _of(weights: Weights | Stacked, groups: Groups) -> Groups:
  """Returns the groups without the experts that follow those whose weights there are."""
  e = weights.num_experts
  return groups._replace(first_e=groups.first_e[:e], blocks_e=groups.blocks_e[:e])


def _forward(weights, rows_RD, groups, stacked):
  y_RD, gate_up_NJ2f = forward(stacked or weights, rows_RD, groups)
  return y_RD, (weights, rows_RD, groups, residual(gate_up_NJ2f), stacked)


def _backward(saved, gradient_RD):
  weights, rows_RD, groups, gate_up_NJ2f, stacked = saved
  dweights, dx_RD = backward(stacked or weights, rows_RD, groups, gate_up_NJ2f, gradient_RD)
  return jax.tree.map(lambda d, w: d.astype(w.dtype), dweights, weights), dx_RD, None, None


_grouped_swiglu.defvjp(_forward, _backward)


def _kernels_forward(weights, rows_RD, groups, interpret=False):
  return grouped_kernels.forward(
    weights, rows_RD, groups.row_NJ, *_blocks(groups), interpret=interpret
  )


def _kernels_backward(weights, rows_RD, groups, gate_up_NJ2f, gradient_RD, interpret=False):
  return grouped_kernels.backward(
    weights, rows_RD, groups.row_NJ, *_blocks(groups), gate_up_NJ2f, gradient_RD,
    interpret=interpret,
  )  # fmt: skip


def _blocks(groups):
  """Returns whose rows each block holds, some expert's where it holds none, and which blocks do:
  the first and the one behind the last.
  """
  last_e = groups.first_e + groups.blocks_e
  block_N = jnp.arange(groups.row_NJ.shape[0], dtype=jnp.int32)
  expert_N = (block_N[:, None] >= last_e[None, :]).sum(-1, dtype=jnp.int32)
  return jnp.minimum(expert_N, last_e.size - 1), jnp.stack([groups.first_e[0], last_e[-1]])


def _blocks_values(weights, rows_RD, groups):
  def step(blocks, y_NJD, one: Weights):
    # Rows make way for what the expert makes of them: one buffer for both.
    gate_Jf, up_Jf = _halves(blocks.read(y_NJD) @ joined(one.gate_up_eD2f))
    return blocks.put(y_NJD, (jax.nn.silu(gate_Jf) * up_Jf) @ one.down_efD), ()

  y_NJD, _ = _loop(weights, groups, step, _placed(rows_RD, groups))
  return _received(y_NJD, groups)


def _blocks_forward(weights, rows_RD, groups):
  def step(blocks, buffers, one: Weights):
    gate_up_NJg, y_NJD = buffers
    gate_up_Jg = blocks.read(y_NJD) @ joined(one.gate_up_eD2f)
    gate_Jf, up_Jf = _halves(gate_up_Jg)
    y_JD = (jax.nn.silu(gate_Jf) * up_Jf) @ one.down_efD
    return (blocks.put(gate_up_NJg, gate_up_Jg), blocks.put(y_NJD, y_JD)), ()

  blocks, num_hidden = groups.row_NJ.shape, weights.num_hidden
  zeros_NJg = varying_like(jnp.zeros((*blocks, 2 * num_hidden), rows_RD.dtype), rows_RD)
  buffers = (zeros_NJg, _placed(rows_RD, groups))
  (gate_up_NJg, y_NJD), _ = _loop(weights, groups, step, buffers)
  return _received(y_NJD, groups), gate_up_NJg.reshape(*blocks, 2, num_hidden)


def _blocks_backward(weights, rows_RD, groups, gate_up_NJ2f, gradient_RD):
  def nothing(one: Weights):
    return jax.tree.map(lambda w: varying_like(jnp.zeros(w.shape, jnp.float32), w), one)

  def step(blocks, d_NJD, one: Weights):
    # Rows that are none are zero here: those add nothing to any gradient.
    x_JD, dy_JD = _take_or_zero(rows_RD, blocks.read(groups.row_NJ)), blocks.read(d_NJD)
    gate_up_Jg = joined(blocks.read(gate_up_NJ2f))
    hidden_Jf, activation_vjp = jax.vjp(
      lambda gate, up: jax.nn.silu(gate) * up, *_halves(gate_up_Jg)
    )
    d_Jg = jnp.concatenate(activation_vjp(dy_JD @ one.down_efD.T), 1)
    of_gate_up = _outer(x_JD, d_Jg).reshape(one.gate_up_eD2f.shape)
    return blocks.put(d_NJD, d_Jg @ joined(one.gate_up_eD2f).T), Weights(
      of_gate_up, _outer(hidden_Jf, dy_JD)
    )

  dx_NJD, dweights = _loop(weights, groups, step, _placed(gradient_RD, groups), nothing)
  return dweights, _received(dx_NJD, groups)


def _loop(weights: Weights | Stacked, groups: Groups, step, buffers, nothing=lambda one: ()):
  """Runs `step` over the blocks of each expert: (blocks, buffers, its weights) -> buffers and what
  is summed over the expert's blocks, `nothing` of its weights where it has none.

  Returns the buffers, which go from step to step, and the sums of each expert, [e, ...].
  """
  many = blocks_at_once(groups.place_R.size, groups.first_e.size)

  def expert(buffers, given):
    one, first, number = given
    run = lambda size, first, buffers: step(_Blocks(first, size), buffers, one)
    # What full products leave comes first: mostly it is all, and then nothing has to be added.
    rest = number % many
    none = lambda buffers: (buffers, nothing(one))
    sizes = [functools.partial(run, size, first) for size in range(1, many)]

    def turn(i, state):
      buffers, sums = state
      buffers, more = run(many, first + rest + i * many, buffers)
      return buffers, jax.tree.map(jnp.add, sums, more)

    state = jax.lax.switch(rest, [none, *sizes], buffers)

    return jax.lax.fori_loop(0, number // many, turn, state)

  if isinstance(weights, Stacked):
    of_expert = lambda e: jax.tree.map(lambda w: w[weights.layer, e], weights.stack)
    in_stack = lambda buffers, given: expert(buffers, (of_expert(given[0]), *given[1:]))
    each_e = jnp.arange(weights.num_experts, dtype=jnp.int32)
    return jax.lax.scan(in_stack, buffers, (each_e, groups.first_e, groups.blocks_e))
  return jax.lax.scan(expert, buffers, (weights, groups.first_e, groups.blocks_e))


class _Blocks(NamedTuple):
  """Blocks that follow each other: the first, and how many."""

  first: jax.Array
  number: int

  def read(self, x_NJi) -> jax.Array:
    """Returns their rows, [number * J, ...]."""
    x = jax.lax.dynamic_slice_in_dim(x_NJi, self.first, self.number)
    return x.reshape(-1, *x.shape[2:])

  def put(self, x_NJi, rows) -> jax.Array:
    """Returns `x_NJi` with these as their rows."""
    return put(x_NJi, self.first, rows.reshape(self.number, *x_NJi.shape[1:]))


def _halves(gate_up_Jg):
  return jnp.split(gate_up_Jg, 2, 1)


def _outer(left_Ji, right_Jo):
  return jnp.einsum("ji,jo->io", left_Ji, right_Jo, preferred_element_type=jnp.float32)


def _placed(rows_RD, groups):
  """Returns the rows of all blocks; what lies in blocks without rows is never read."""
  return _take_or_zero(rows_RD, groups.row_NJ.reshape(-1)).reshape(*groups.row_NJ.shape, -1)


def _received(y_NJD, groups):
  """Returns rows_RD, what lies in the blocks in the order in which rows arrived."""
  return _take_or_zero(y_NJD.reshape(-1, y_NJD.shape[-1]), groups.place_R)


def _take_or_zero(x_ID, index):
  num = x_ID.shape[0]
  taken = x_ID.at[jnp.minimum(index, num - 1)].get(mode="promise_in_bounds")
  return jnp.where((index < num)[:, None], taken, jnp.zeros((), x_ID.dtype))
