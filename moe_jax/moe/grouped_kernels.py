"""The experts' SwiGLU over blocks of rows as GPU kernels, forward and backward.

Written in Pallas for Triton. Three multiply blocks by the weights of their expert: rows by gate and
up; the activation, made on the way, by down; and in the backward pass their transposes. One sums
products of rows and gradients over an expert's blocks, so that no program adds to what another
wrote. A block without rows costs a program that writes zeros and reads nothing. jax 0.12 warns that
Pallas will lose Triton in some later version. Knows blocks; must not know where rows come from, nor
what runs where there is no GPU.

Letters: N blocks of J rows; e experts of this device; f this tensor rank's share of the hidden
units; V tiles of rows, N * J / 64.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from moe_jax.moe.experts import Weights
from moe_jax.parallel.collectives import varying_like

TILE = 64  # rows, columns and terms at a time: a float32 sum is 16 registers of each of 256 threads

# Names of the kernels in a compiled program.
HIDDEN, OUTPUT = "grouped_hidden", "grouped_output"
D_HIDDEN, D_ROWS, D_WEIGHTS = "grouped_d_hidden", "grouped_d_rows", "grouped_d_weights"


def forward(weights: Weights, x_NJD, expert_N, used_2, *, interpret: bool = False):
  """Returns `y_NJD`, this tensor rank's partial sums, and `gate_up_NJ2f`.

  Args:
    weights: of this device's experts.
    x_NJD: rows; J is a multiple of 64.
    expert_N: whose rows each block holds, int32.
    used_2: which blocks hold rows, the first and the one behind the last, int32; the others give
      zeros.
    interpret: run as jax operations, on any device, in place of kernels: for tests.

  Source: GLU Variants Improve Transformer (arXiv:2002.05202), equation 6.
  """
  run = _Call(x_NJD, expert_N, used_2, len(weights.down_efD), interpret)
  f, D = weights.down_efD.shape[1:]
  (gate_up_NJ2f,) = run(HIDDEN, _hidden_kernel, (x_NJD,), weights.gate_up_eD2f, f, ((2,),))
  (y_NJD,) = run(OUTPUT, _output_kernel, (gate_up_NJ2f,), weights.down_efD, D, ((),))
  return y_NJD, gate_up_NJ2f


def backward(weights: Weights, x_NJD, expert_N, used_2, gate_up_NJ2f, dy_NJD, *, interpret=False):
  """Returns the gradients of the weights, float32, and of the rows, `dx_NJD`.

  Args:
    weights, x_NJD, expert_N, used_2, interpret: as `forward` took them.
    gate_up_NJ2f: as it returned it.
    dy_NJD: gradient of its output; zero in rows that are empty.
  """
  run = _Call(x_NJD, expert_N, used_2, len(weights.down_efD), interpret)
  f, D = weights.down_efD.shape[1:]
  given = (dy_NJD, gate_up_NJ2f)
  d_NJ2f, hidden_NJf = run(D_HIDDEN, _d_hidden_kernel, given, weights.down_efD, f, ((2,), ()))
  (dx_NJD,) = run(D_ROWS, _d_rows_kernel, (d_NJ2f,), weights.gate_up_eD2f, D, ((),))
  dweights = Weights(run.outer(x_NJD, d_NJ2f), run.outer(hidden_NJf, dy_NJD))
  return dweights, dx_NJD


class _Call:
  """Calls kernels over the tiles of the same blocks."""

  def __init__(self, x_NJD, expert_N, used_2, num_experts, interpret):
    self.like, self.num_experts, self.interpret = x_NJD, num_experts, interpret
    self.N, self.J = x_NJD.shape[:2]
    tiles = self.J // TILE
    expert_V = jnp.repeat(expert_N, tiles)
    self.expert_V = varying_like(expert_V, x_NJD)
    self.used_2 = varying_like((used_2 * tiles).astype(jnp.int32), x_NJD)

  def __call__(self, name, kernel, rows, weights, width, outputs):
    """Returns an array [N, J, *output, width] for each output; a program of the kernel writes a
    tile of each of its matrices.
    """
    rows = [_padded(self._flat(x), -1) for x in rows]
    weights = _padded(_padded(varying_like(weights, self.like), 1), -1)
    columns = math.ceil(width / TILE)
    found = pl.pallas_call(
      kernel,
      name=name,
      grid=(self.N * self.J // TILE, columns),
      out_specs=[_tile_of(output) for output in outputs],
      out_shape=[self._out((self.N * self.J, *output, columns * TILE)) for output in outputs],
      compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
      cost_estimate=_cost(self.N * self.J, *weights.shape[1:]),
      interpret=self.interpret,
    )(self.expert_V, self.used_2, *rows, weights)
    return [x[..., :width].reshape(self.N, self.J, *x.shape[1:-1], width) for x in found]

  def outer(self, left_NJi, right_NJo):
    """Returns the sum over each expert's rows of left x right, [e, i, *o] float32."""
    left, right = self._flat(left_NJi), self._flat(right_NJo)
    num_rows, shape = left.shape[1], right.shape[1:]
    left, right = _padded(left, -1), _padded(right.reshape(len(right), -1), -1)
    num_experts = self.num_experts
    expert_e = varying_like(jnp.arange(num_experts, dtype=jnp.int32), self.like)
    tile_V = jnp.arange(self.expert_V.size, dtype=jnp.int32)
    is_used_V = (tile_V >= self.used_2[0]) & (tile_V < self.used_2[1])
    is_own_eV = (self.expert_V[None] == expert_e[:, None]) & is_used_V[None]
    length_e = is_own_eV.sum(1, dtype=jnp.int32)
    first_e = jnp.argmax(is_own_eV, 1).astype(jnp.int32)
    i, o = left.shape[1], right.shape[1]
    found = pl.pallas_call(
      _d_weights_kernel,
      name=D_WEIGHTS,
      grid=(num_experts, i // TILE, o // TILE),
      out_specs=pl.BlockSpec((None, TILE, TILE), lambda e, r, c: (e, r, c)),
      out_shape=self._out((num_experts, i, o), jnp.float32),
      compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
      cost_estimate=_cost(len(left), i, o),
      interpret=self.interpret,
    )(first_e, length_e, left, right)
    return found[:, :num_rows, : math.prod(shape)].reshape(num_experts, num_rows, *shape)

  def _flat(self, x_NJi):
    return x_NJi.reshape(self.N * self.J, *x_NJi.shape[2:])

  def _out(self, shape, dtype=None):
    varies = jax.typeof(self.like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype or self.like.dtype, manual_axis_type=varies)


def kernel_flops(num_rows: int, *sizes: int) -> float:
  """Returns the operations of a kernel's product of so many rows and matrices of these sizes. At
  most: a block without rows is not multiplied.
  """
  return 2.0 * num_rows * math.prod(sizes)


def _cost(num_rows: int, *sizes: int) -> pl.CostEstimate:
  flops = int(kernel_flops(num_rows, *sizes))
  return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=0)


def _padded(x, axis):
  """Returns `x` with zeros behind it up to whole tiles: they add nothing to a sum."""
  missing = -x.shape[axis] % TILE
  widths = [(0, missing if a == axis % x.ndim else 0) for a in range(x.ndim)]
  return jnp.pad(x, widths) if missing else x


def _tile_of(output):
  """Returns where a program writes an output of these dimensions between rows and columns."""
  return pl.BlockSpec((TILE, *output, TILE), lambda v, c: (v, *(0 for _ in output), c))


def _walk(expert_ref, used_ref, num_terms, step, num_sums):
  """Returns the sums, [64, 64] float32, of `step(expert, k)` over tiles of terms; 0 for a tile that
  holds no rows.
  """
  v = pl.program_id(0)
  expert = expert_ref[v]
  is_used = (v >= used_ref[0]) & (v < used_ref[1])
  turns = is_used.astype(jnp.int32) * (num_terms // TILE)

  def turn(k, sums):
    return tuple(s + more for s, more in zip(sums, step(expert, k), strict=True))

  zeros = jnp.zeros((TILE, TILE), jnp.float32)
  return jax.lax.fori_loop(0, turns, turn, (zeros,) * num_sums)


def _at(index):
  return pl.ds(index * TILE, TILE)


def _hidden_kernel(expert_ref, used_ref, x_ref, gate_up_w_ref, gate_up_ref):
  here, column = _at(pl.program_id(0)), _at(pl.program_id(1))

  def step(expert, k):
    x = x_ref[here, _at(k)]
    return [triton.dot(x, gate_up_w_ref[expert, _at(k), part, column]) for part in range(2)]

  sums = _walk(expert_ref, used_ref, x_ref.shape[1], step, 2)
  for part in range(2):
    gate_up_ref[:, part, :] = sums[part].astype(gate_up_ref.dtype)


def _output_kernel(expert_ref, used_ref, gate_up_ref, down_w_ref, y_ref):
  here, column = _at(pl.program_id(0)), _at(pl.program_id(1))

  def step(expert, k):
    gate, up = (_wide(gate_up_ref[here, part, _at(k)]) for part in range(2))
    down = down_w_ref[expert, _at(k), column]
    return [triton.dot((gate * jax.nn.sigmoid(gate) * up).astype(down.dtype), down)]

  (y,) = _walk(expert_ref, used_ref, gate_up_ref.shape[2], step, 1)
  y_ref[...] = y.astype(y_ref.dtype)


def _d_hidden_kernel(expert_ref, used_ref, dy_ref, gate_up_ref, down_w_ref, d_ref, hidden_ref):
  here, column = _at(pl.program_id(0)), _at(pl.program_id(1))

  def step(expert, k):
    down = down_w_ref[expert, column, _at(k)]
    return [triton.dot(dy_ref[here, _at(k)], down, trans_b=True)]

  (dhidden,) = _walk(expert_ref, used_ref, dy_ref.shape[1], step, 1)
  gate, up = (_wide(gate_up_ref[here, part, column]) for part in range(2))
  sigmoid = jax.nn.sigmoid(gate)
  slope = sigmoid * (1 + gate * (1 - sigmoid))
  d_ref[:, 0, :] = (dhidden * up * slope).astype(d_ref.dtype)
  d_ref[:, 1, :] = (dhidden * gate * sigmoid).astype(d_ref.dtype)
  hidden_ref[...] = (gate * sigmoid * up).astype(hidden_ref.dtype)


def _d_rows_kernel(expert_ref, used_ref, d_ref, gate_up_w_ref, dx_ref):
  here, column = _at(pl.program_id(0)), _at(pl.program_id(1))

  def step(expert, k):
    products = [
      triton.dot(
        d_ref[here, part, _at(k)], gate_up_w_ref[expert, column, part, _at(k)], trans_b=True
      )
      for part in range(2)
    ]
    return [sum(products)]

  (dx,) = _walk(expert_ref, used_ref, d_ref.shape[2], step, 1)
  dx_ref[...] = dx.astype(dx_ref.dtype)


def _d_weights_kernel(first_ref, length_ref, left_ref, right_ref, out_ref):
  expert, row, column = (pl.program_id(axis) for axis in range(3))
  first = first_ref[expert]

  def turn(n, total):
    left, right = left_ref[_at(first + n), _at(row)], right_ref[_at(first + n), _at(column)]
    return total + triton.dot(left, right, trans_a=True)

  zeros = jnp.zeros((TILE, TILE), jnp.float32)
  out_ref[...] = jax.lax.fori_loop(0, length_ref[expert], turn, zeros)


def _wide(x):
  return x.astype(jnp.float32)
