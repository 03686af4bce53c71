"""The experts' SwiGLU over groups of uneven size, in blocks of rows that belong to one expert.

Rows lie as they arrived; a block gathers its own and multiplies them by its expert's weights, and
only blocks with rows are computed: on GPU by kernels (`grouped_kernels`), elsewhere by a loop, in
which an expert's weights are sliced once and not for every block, and the gradient of its weights
is summed beside the loop over its blocks. Blocks are small, so that few rows are empty; the loop
takes many at once while an expert has them, for products of few rows are slow. Experts of other
ranks, shadows, may follow this device's own: a loop of as many turns as a micro-batch has shadows
fetches one, and multiplies its blocks. Knows rows and group sizes; must not know where rows come
from.

Letters: S source devices, B rows of each, R = S * B, N blocks of J rows, e experts of this device,
f this tensor rank's share of the hidden units.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe import grouped_kernels
from moe_jax.moe.experts import Weights
from moe_jax.parallel.collectives import varying_like
from moe_jax.pipeline.buffers import put
from moe_jax.pipeline.saving import residual

ROWS_PER_BLOCK = 64  # fewer, and slicing and summing outweigh multiplying
_MOST_AT_ONCE = 8  # blocks
_STEPS_PER_EXPERT = 2  # of so many blocks at once, in an even load

# Names the loop over shadows in a compiled program, whose text cannot say how often it turns.
SHADOWS_SCOPE = "shadows"


class Shadows(NamedTuple):
  """Experts of other ranks, whose groups follow those of this device's own.

  Attributes:
    number: of this micro-batch, the same on all devices that the functions talk to, int32.
    fetch: (h) -> the weights of the h-th, without the leading axis.
    send_home: (h, gradients of these, gradients of this device's experts [e, ...]) -> the latter,
      with those added that other devices sent for one of them.
  """

  number: jax.Array
  fetch: Callable[[jax.Array], Weights]
  send_home: Callable[[jax.Array, Weights, Weights], Weights]


class Groups(NamedTuple):
  """Which received row lies where in the blocks, int32.

  Attributes:
    row_NJ: the received row at each place of the blocks; R where there is none.
    place_R: the place, block * J + j, of each received row; N * J where the row is empty.
    first_e: each expert's first block; its blocks follow each other.
    blocks_e: how many blocks it has.
  """

  row_NJ: jax.Array
  place_R: jax.Array
  first_e: jax.Array
  blocks_e: jax.Array


def blocks_at_once(num_rows: int, num_experts: int) -> int:
  """Returns how many blocks the loop multiplies at once, for R rows of e experts.

  >>> blocks_at_once(5120, 2), blocks_at_once(100, 2)
  (8, 1)
  """
  wanted = num_rows // (num_experts * _STEPS_PER_EXPERT * ROWS_PER_BLOCK)
  return min(_MOST_AT_ONCE, 1 << max(wanted, 1).bit_length() - 1)


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

  # From a received row to its place.
  end_Se = jnp.cumsum(sizes_Se, 1, dtype=jnp.int32)
  ahead_Se = jnp.cumsum(sizes_Se, 0, dtype=jnp.int32) - sizes_Se  # of earlier sources
  start_Se = first_e[None, :] * J + ahead_Se - (end_Se - sizes_Se)
  row_B = jnp.arange(num_source_rows, dtype=jnp.int32)
  expert_SB = (row_B[None, :, None] >= end_Se[:, None, :]).sum(-1, dtype=jnp.int32)
  start_SB = jnp.take_along_axis(start_Se, jnp.minimum(expert_SB, num_experts - 1), 1)
  place_SB = jnp.where(expert_SB < num_experts, start_SB + row_B[None, :], N * J)
  place_R = place_SB.reshape(-1)

  # And back: sorted by place, an expert's rows follow each other without the gaps between blocks.
  _, order_R = jax.lax.sort((place_R, jnp.arange(num_rows, dtype=jnp.int32)), num_keys=1)
  block_N = jnp.arange(N, dtype=jnp.int32)
  expert_N = (block_N[:, None] >= last_e[None, :]).sum(-1, dtype=jnp.int32)
  expert_N = jnp.minimum(expert_N, num_experts - 1)
  within_NJ = (block_N - first_e[expert_N])[:, None] * J + jnp.arange(J, dtype=jnp.int32)[None, :]
  ordered_NJ = (jnp.cumsum(sizes_e, dtype=jnp.int32) - sizes_e)[expert_N][:, None] + within_NJ
  row_NJ = jnp.where(
    within_NJ < sizes_e[expert_N][:, None], order_R[jnp.minimum(ordered_NJ, num_rows - 1)], num_rows
  )
  return Groups(row_NJ, place_R, first_e, blocks_e)


def grouped_swiglu(weights: Weights, rows_RD: jax.Array, groups: Groups) -> jax.Array:
  """Returns this tensor rank's partial sums `rows_RD`, each row by its own expert; empty ones zero.

  Source: GLU Variants Improve Transformer (arXiv:2002.05202), equation 6.
  """
  return _grouped_swiglu(varying_like(weights, rows_RD), rows_RD, groups)


@jax.custom_vjp
def _grouped_swiglu(weights, rows_RD, groups):
  values = lambda *given: _kernels_forward(*given)[0]
  return jax.lax.platform_dependent(weights, rows_RD, groups, cuda=values, default=_blocks_values)


def forward(weights: Weights, rows_RD: jax.Array, groups: Groups, shadows: Shadows | None = None):
  """Returns (`rows_RD`, gate_NJf, up_NJf): the sums, and of the blocks what `backward` takes."""
  return jax.lax.platform_dependent(
    weights, rows_RD, groups,
    cuda=functools.partial(_kernels_forward, shadows=shadows),
    default=functools.partial(_blocks_forward, shadows=shadows),
  )  # fmt: skip


def backward(
  weights: Weights, rows_RD, groups: Groups, gate_NJf, up_NJf, gradient_RD, shadows=None
):
  """Returns the gradients of weights and rows; arguments as of `forward` and as it returned."""
  dweights, dx_RD = jax.lax.platform_dependent(
    weights, rows_RD, groups, gate_NJf, up_NJf, gradient_RD,
    cuda=functools.partial(_kernels_backward, shadows=shadows),
    default=functools.partial(_blocks_backward, shadows=shadows),
  )  # fmt: skip
  return jax.tree.map(lambda d, w: d.astype(w.dtype), dweights, weights), dx_RD


def _forward(weights, rows_RD, groups):
  y_RD, gate_NJf, up_NJf = forward(weights, rows_RD, groups)
  return y_RD, (weights, rows_RD, groups, residual(gate_NJf), residual(up_NJf))


def _backward(saved, gradient_RD):
  return *backward(*saved, gradient_RD), None


_grouped_swiglu.defvjp(_forward, _backward)


def _kernels_forward(weights, rows_RD, groups, shadows=None, interpret=False):
  x_NJD = _placed(rows_RD, groups)

  def of(weights, groups):
    return grouped_kernels.forward(weights, x_NJD, *_blocks(groups), interpret=interpret)

  def one(h, found):
    # What a call does not multiply it leaves zero.
    return jax.tree.map(jnp.add, found, of(_stack(shadows.fetch(h)), _of_shadow(groups, e, h)))

  e = weights.gate_eDf.shape[0]
  y_NJD, gate_NJf, up_NJf = _each(shadows, one, of(weights, _own(groups, e)))
  return _received(y_NJD, groups), gate_NJf, up_NJf


def _kernels_backward(
  weights, rows_RD, groups, gate_NJf, up_NJf, gradient_RD, shadows=None, interpret=False
):
  x_NJD, dy_NJD = _placed(rows_RD, groups), _placed(gradient_RD, groups)

  def of(weights, groups):
    return grouped_kernels.backward(
      weights, x_NJD, *_blocks(groups), gate_NJf, up_NJf, dy_NJD, interpret=interpret
    )

  def one(h, found):
    dweights, dx_NJD = of(_stack(shadows.fetch(h)), _of_shadow(groups, e, h))
    own = shadows.send_home(h, jax.tree.map(lambda d: d[0], dweights), found[0])
    return own, found[1] + dx_NJD

  e = weights.gate_eDf.shape[0]
  dweights, dx_NJD = _each(shadows, one, of(weights, _own(groups, e)))
  return dweights, _received(dx_NJD, groups)


def _stack(weights: Weights) -> Weights:
  return jax.tree.map(lambda w: w[None], weights)


def _own(groups: Groups, e: int) -> Groups:
  """Returns the groups of this device's own experts."""
  return groups._replace(first_e=groups.first_e[:e], blocks_e=groups.blocks_e[:e])


def _of_shadow(groups: Groups, e: int, h) -> Groups:
  """Returns the group of a shadow."""
  one = lambda a: jax.lax.dynamic_slice_in_dim(a, e + h, 1)
  return groups._replace(first_e=one(groups.first_e), blocks_e=one(groups.blocks_e))


def _each(shadows: Shadows | None, one, state):
  """Returns the state after `one(h, state)` of each shadow."""
  if shadows is None:
    return state
  with jax.named_scope(SHADOWS_SCOPE):
    return jax.lax.fori_loop(0, shadows.number, one, state)


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
    gate_Jf, up_Jf = _hidden(one, blocks.read(y_NJD))
    return blocks.put(y_NJD, (jax.nn.silu(gate_Jf) * up_Jf) @ one.down_efD)

  y_NJD, _ = _loop(weights, groups, step, _placed(rows_RD, groups))
  return _received(y_NJD, groups)


def _blocks_forward(weights, rows_RD, groups, shadows=None):
  def step(blocks, buffers, one: Weights):
    gate_NJf, up_NJf, y_NJD = buffers
    gate_Jf, up_Jf = _hidden(one, blocks.read(y_NJD))
    y_JD = (jax.nn.silu(gate_Jf) * up_Jf) @ one.down_efD
    return blocks.put(gate_NJf, gate_Jf), blocks.put(up_NJf, up_Jf), blocks.put(y_NJD, y_JD)

  def of_shadow(h, buffers):
    return _walk(shadows.fetch(h), groups, e + h, step, buffers)[0]

  e, num_hidden = weights.down_efD.shape[:2]
  hidden = tuple(_buffer(groups, rows_RD, num_hidden) for _ in ("gate", "up"))
  buffers, _ = _loop(weights, groups, step, (*hidden, _placed(rows_RD, groups)))
  gate_NJf, up_NJf, y_NJD = _each(shadows, of_shadow, buffers)
  return _received(y_NJD, groups), gate_NJf, up_NJf


def _blocks_backward(weights, rows_RD, groups, gate_NJf, up_NJf, gradient_RD, shadows=None):
  def start(one: Weights):
    return jax.tree.map(lambda w: varying_like(jnp.zeros(w.shape, jnp.float32), w), one)

  def step(blocks, d_NJD, one: Weights, sums: Weights):
    # Rows that are none are zero here: those add nothing to any gradient.
    x_JD, dy_JD = _take_or_zero(rows_RD, blocks.read(groups.row_NJ)), blocks.read(d_NJD)
    hidden_Jf, activation_vjp = jax.vjp(
      lambda gate, up: jax.nn.silu(gate) * up, blocks.read(gate_NJf), blocks.read(up_NJf)
    )
    dgate_Jf, dup_Jf = activation_vjp(dy_JD @ one.down_efD.T)
    dx_JD = dgate_Jf @ one.gate_eDf.T + dup_Jf @ one.up_eDf.T
    return blocks.put(d_NJD, dx_JD), Weights(
      sums.gate_eDf + _outer(x_JD, dgate_Jf),
      sums.up_eDf + _outer(x_JD, dup_Jf),
      sums.down_efD + _outer(hidden_Jf, dy_JD),
    )

  def of_shadow(h, found):
    d_NJD, own = found
    d_NJD, gradients = _walk(shadows.fetch(h), groups, e + h, step, d_NJD, start)
    return d_NJD, shadows.send_home(h, gradients, own)

  e = weights.gate_eDf.shape[0]
  found = _loop(weights, groups, step, _placed(gradient_RD, groups), start)
  dx_NJD, dweights = _each(shadows, of_shadow, found)
  return dweights, _received(dx_NJD, groups)


def _loop(weights: Weights, groups: Groups, step, buffers, start=lambda one: ()):
  """Runs `step` over the blocks of each expert whose weights there are: (blocks, buffers, its
  weights, *sums) -> buffers and sums.

  Returns the buffers, which go from step to step, and the sums of each expert, [e, ...].
  """

  def expert(buffers, given):
    return _walk(given[0], groups, given[1], step, buffers, start)

  number_e = jnp.arange(weights.gate_eDf.shape[0], dtype=jnp.int32)
  return jax.lax.scan(expert, buffers, (weights, number_e))


def _walk(one: Weights, groups: Groups, expert, step, buffers, start=lambda one: ()):
  """Runs `step` over the blocks of one expert: many at once, then what is left."""
  state = buffers, start(one)
  first, number = groups.first_e[expert], groups.blocks_e[expert]
  last = first + number
  many = blocks_at_once(groups.place_R.size, groups.first_e.size)
  for size in sorted({many, 1}, reverse=True):

    def run(i, state, first=first, size=size):
      blocks, (buffers, sums) = _Blocks(first + i * size, size), state
      return step(blocks, buffers, one, sums) if sums else (step(blocks, buffers, one), sums)

    turns = (last - first) // size
    state = jax.lax.fori_loop(0, turns, run, state)
    first += turns * size
  return state


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


def _hidden(one: Weights, x_JD):
  return x_JD @ one.gate_eDf, x_JD @ one.up_eDf


def _outer(left_Ji, right_Jo):
  return jnp.einsum("ji,jo->io", left_Ji, right_Jo, preferred_element_type=jnp.float32)


def _buffer(groups, rows_RD, width):
  zeros = jnp.zeros((*groups.row_NJ.shape, width), rows_RD.dtype)
  return varying_like(zeros, rows_RD)


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
