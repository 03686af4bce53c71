"""The experts' SwiGLU over blocks of rows as GPU kernels, forward and backward.

Written in Pallas for Triton. Three multiply blocks by the weights of their expert: rows by gate and
up; the activation, made on the way, by down; and in the backward pass their transposes. One sums
products of rows and gradients over an expert's blocks, so that no program adds to what another
wrote. Rows are read, and results written, where they lie as they arrived: each kernel gathers or
scatters its own, so nothing passes over memory only to be laid in order. A block without rows reads
nothing. jax 0.12 warns that Pallas will lose Triton in some later version. Knows blocks; must not
know where rows come from, nor what runs where there is no GPU.

Letters: R rows as they arrived; N blocks of J rows; P places in blocks, N * J; e experts of this
device; f this tensor rank's share of the hidden units; V tiles of places, P / 64.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from moe_jax.moe.experts import Stacked, Weights
from moe_jax.parallel.collectives import varying_like

TILE = 64  # rows, columns and terms at a time: a float32 sum is 16 registers of each of 256 threads

# Names of the kernels in a compiled program.
HIDDEN, OUTPUT = "grouped_hidden", "grouped_output"
D_HIDDEN, D_ROWS = "grouped_d_hidden", "grouped_d_rows"
D_GATE_UP, D_DOWN = "grouped_d_gate_up", "grouped_d_down"

_WARPS = triton.CompilerParams(num_warps=8, num_stages=2)


def forward(weights: Weights | Stacked, x_RD, row_NJ, expert_N, used_2, *, interpret=False):
  """Returns `y_RD`, this tensor rank's partial sums, zero in empty rows, and `gate_up_NJ2f`.

  Args:
    weights: of this device's experts; of a stack the layer is read where it lies.
    x_RD: rows as they arrived.
    row_NJ: which of them lies at each place, int32, J a multiple of 64; R + r where none does, for
      each empty row r once, else 2 * R.
    expert_N: whose rows each block holds, int32.
    used_2: which blocks hold rows, the first and the one behind the last, int32; the others give
      zeros.
    interpret: run as jax operations, on any device, in place of kernels: for tests.

  Source: GLU Variants Improve Transformer (arXiv:2002.05202), equation 6.
  """
  stack, layer = _stacked(weights)
  run = _Call(x_RD, row_NJ, expert_N, used_2, layer, interpret)
  f, D = stack.down_efD.shape[2:]
  (gate_up_P2f,) = run.placed(HIDDEN, _hidden_kernel, (x_RD,), stack.gate_up_eD2f, f, ((2,),))
  y_RD = run.arrived(OUTPUT, _output_kernel, gate_up_P2f, stack.down_efD, D)
  return y_RD, gate_up_P2f.reshape(*row_NJ.shape, 2, f)


def backward(
  weights: Weights | Stacked, x_RD, row_NJ, expert_N, used_2, gate_up_NJ2f, dy_RD, *,
  interpret=False,
):  # fmt: skip
  """Returns the gradients of the weights, float32, and of the rows, `dx_RD`.

  Args:
    weights, x_RD, row_NJ, expert_N, used_2, interpret: as `forward` took them.
    gate_up_NJ2f: as it returned it.
    dy_RD: gradient of its output.
  """
  stack, layer = _stacked(weights)
  run = _Call(x_RD, row_NJ, expert_N, used_2, layer, interpret)
  _, num_experts, f, D = stack.down_efD.shape
  given = (dy_RD, gate_up_NJ2f.reshape(-1, 2, f))
  d_P2f, hidden_Pf = run.placed(D_HIDDEN, _d_hidden_kernel, given, stack.down_efD, f, ((2,), ()))
  dx_RD = run.arrived(D_ROWS, _d_rows_kernel, d_P2f, stack.gate_up_eD2f, D)
  of_gate_up = run.outer(D_GATE_UP, _d_gate_up_kernel, x_RD, d_P2f, num_experts)
  of_down = run.outer(D_DOWN, _d_down_kernel, hidden_Pf, dy_RD, num_experts)
  return Weights(of_gate_up, of_down), dx_RD


def _stacked(weights: Weights | Stacked) -> Stacked:
  """Returns the weights in a stack, of one layer where it is to be padded to whole tiles."""
  if isinstance(weights, Weights):
    return Stacked(jax.tree.map(lambda w: w[None], weights), 0)
  is_whole = all(size % TILE == 0 for w in weights.stack for size in (w.shape[2], w.shape[-1]))
  return weights if is_whole else _stacked(weights.cut())


class _Call:
  """Calls kernels over the tiles of the same blocks; rows [R, ...] or [P, ...] are matrices or have
  a dimension of gate and up between.
  """

  def __init__(self, x_RD, row_NJ, expert_N, used_2, layer, interpret):
    self.like, self.interpret = x_RD, interpret
    self.num_rows, self.num_places = len(x_RD), row_NJ.size
    tiles = row_NJ.shape[1] // TILE
    # Of places: the row, and of whole tiles whose rows they are; which tiles hold rows; the layer.
    used_2, layer_1 = varying_like(
      ((used_2 * tiles).astype(jnp.int32), jnp.full(1, layer, jnp.int32)), x_RD
    )
    self.where_3 = jnp.concatenate([used_2, layer_1])
    self.row_P, self.expert_V = varying_like(
      (row_NJ.reshape(-1), jnp.repeat(expert_N, tiles)), x_RD
    )

  def placed(self, name, kernel, rows, weights, width, outputs):
    """Returns an array [P, *output, width] for each output; a program of the kernel writes a tile
    of each of its matrices.
    """
    shapes = [(self.num_places, *output) for output in outputs]
    specs = [_tile_of(output) for output in outputs]
    return self._call(name, kernel, rows, weights, width, shapes, out_specs=specs)

  def arrived(self, name, kernel, places, weights, width):
    """Returns an array [R, width]; a program of the kernel writes its tile where the rows lie."""
    return self._call(name, kernel, (places,), weights, width, [(self.num_rows,)])[0]

  def outer(self, name, kernel, left, right, num_experts):
    """Returns the sum over each expert's rows of left x right, [e, i, *o] float32."""
    width, shape = left.shape[1], right.shape[1:]
    left, right = _padded(left, -1), _padded(right.reshape(len(right), -1), -1)
    expert_e = varying_like(jnp.arange(num_experts, dtype=jnp.int32), self.like)
    tile_V = jnp.arange(self.expert_V.size, dtype=jnp.int32)
    is_used_V = (tile_V >= self.where_3[0]) & (tile_V < self.where_3[1])
    is_own_eV = (self.expert_V[None] == expert_e[:, None]) & is_used_V[None]
    length_e = is_own_eV.sum(1, dtype=jnp.int32)
    first_e = jnp.argmax(is_own_eV, 1).astype(jnp.int32)
    i, o = left.shape[1], right.shape[1]
    found = pl.pallas_call(
      kernel,
      name=name,
      grid=(num_experts, i // TILE, o // TILE),
      out_specs=pl.BlockSpec((None, TILE, TILE), lambda e, r, c: (e, r, c)),
      out_shape=self._out((num_experts, i, o), jnp.float32),
      compiler_params=_WARPS,
      cost_estimate=_cost(self.num_places, i, o),
      interpret=self.interpret,
    )(first_e, length_e, self.row_P, left, right)
    return found[:, :width, : math.prod(shape)].reshape(num_experts, width, *shape)

  def _call(self, name, kernel, rows, weights, width, shapes, **options):
    """Returns arrays of these shapes, `width` more in the last dimension, of which the kernel's
    programs, one for each tile of places and columns, write theirs.
    """
    weights = _padded(_padded(varying_like(weights, self.like), 2), -1)
    columns = math.ceil(width / TILE)
    found = pl.pallas_call(
      kernel,
      name=name,
      grid=(self.num_places // TILE, columns),
      out_shape=[self._out((*shape, columns * TILE)) for shape in shapes],
      compiler_params=_WARPS,
      cost_estimate=_cost(self.num_places, *weights.shape[2:]),
      interpret=self.interpret,
      **options,
    )(self.expert_V, self.where_3, self.row_P, *(_padded(x, -1) for x in rows), weights)
    return [x[..., :width] for x in found]

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


def _walk(expert_ref, where_ref, num_terms, step, num_sums):
  """Returns the sums, [64, 64] float32, of `step(expert, k)` over tiles of terms; 0 for a tile that
  holds no rows. An expert is its layer and which of it.
  """
  v = pl.program_id(0)
  expert = where_ref[2], expert_ref[v]
  is_used = (v >= where_ref[0]) & (v < where_ref[1])
  turns = is_used.astype(jnp.int32) * (num_terms // TILE)

  def turn(k, sums):
    return tuple(s + more for s, more in zip(sums, step(expert, k), strict=True))

  zeros = jnp.zeros((TILE, TILE), jnp.float32)
  return jax.lax.fori_loop(0, turns, turn, (zeros,) * num_sums)


def _at(index):
  return pl.ds(index * TILE, TILE)


def _tile(rows, number):
  """Returns where a tile of columns of these rows lies."""
  columns = number * TILE + jax.lax.broadcasted_iota(jnp.int32, (TILE, TILE), 1)
  return jnp.broadcast_to(rows[:, None], (TILE, TILE)), columns


def _read(ref, rows, number):
  """Returns a tile of columns of rows as they arrived; zeros where there is no such row."""
  place = _tile(rows, number)
  return triton.load(ref.at[place], mask=place[0] < ref.shape[0], other=0.0)


def _write(ref, rows, number, tile):
  """Writes a tile of columns where the rows lie: what no row made, zero, in empty ones."""
  num_rows = ref.shape[0]
  place = _tile(jnp.where(rows < num_rows, rows, rows - num_rows), number)
  triton.store(ref.at[place], tile.astype(ref.dtype), mask=place[0] < num_rows)


def _hidden_kernel(expert_ref, where_ref, row_ref, x_ref, gate_up_w_ref, gate_up_ref):
  rows, column = row_ref[_at(pl.program_id(0))], _at(pl.program_id(1))

  def step(expert, k):
    x = _read(x_ref, rows, k)
    return [triton.dot(x, gate_up_w_ref[*expert, _at(k), part, column]) for part in range(2)]

  sums = _walk(expert_ref, where_ref, x_ref.shape[1], step, 2)
  for part in range(2):
    gate_up_ref[:, part, :] = sums[part].astype(gate_up_ref.dtype)


def _output_kernel(expert_ref, where_ref, row_ref, gate_up_ref, down_w_ref, y_ref):
  here, column = _at(pl.program_id(0)), _at(pl.program_id(1))

  def step(expert, k):
    gate, up = (_wide(gate_up_ref[here, part, _at(k)]) for part in range(2))
    down = down_w_ref[*expert, _at(k), column]
    return [triton.dot((gate * jax.nn.sigmoid(gate) * up).astype(down.dtype), down)]

  (y,) = _walk(expert_ref, where_ref, gate_up_ref.shape[2], step, 1)
  _write(y_ref, row_ref[here], pl.program_id(1), y)


def _d_hidden_kernel(
  expert_ref, where_ref, row_ref, dy_ref, gate_up_ref, down_w_ref, d_ref, hidden_ref
):
  here, column = _at(pl.program_id(0)), _at(pl.program_id(1))
  rows = row_ref[here]

  def step(expert, k):
    down = down_w_ref[*expert, column, _at(k)]
    return [triton.dot(_read(dy_ref, rows, k), down, trans_b=True)]

  (dhidden,) = _walk(expert_ref, where_ref, dy_ref.shape[1], step, 1)
  gate, up = (_wide(gate_up_ref[here, part, column]) for part in range(2))
  sigmoid = jax.nn.sigmoid(gate)
  slope = sigmoid * (1 + gate * (1 - sigmoid))
  d_ref[:, 0, :] = (dhidden * up * slope).astype(d_ref.dtype)
  d_ref[:, 1, :] = (dhidden * gate * sigmoid).astype(d_ref.dtype)
  hidden_ref[...] = (gate * sigmoid * up).astype(hidden_ref.dtype)


def _d_rows_kernel(expert_ref, where_ref, row_ref, d_ref, gate_up_w_ref, dx_ref):
  here, column = _at(pl.program_id(0)), _at(pl.program_id(1))

  def step(expert, k):
    products = [
      triton.dot(
        d_ref[here, part, _at(k)], gate_up_w_ref[*expert, column, part, _at(k)], trans_b=True
      )
      for part in range(2)
    ]
    return [sum(products)]

  (dx,) = _walk(expert_ref, where_ref, d_ref.shape[2], step, 1)
  _write(dx_ref, row_ref[here], pl.program_id(1), dx)


def _d_gate_up_kernel(first_ref, length_ref, row_ref, x_ref, d_ref, out_ref):
  left = lambda here, row: _read(x_ref, row_ref[here], row)
  right = lambda here, column: d_ref[here, _at(column)]
  _sum_outer(first_ref, length_ref, left, right, out_ref)


def _d_down_kernel(first_ref, length_ref, row_ref, hidden_ref, dy_ref, out_ref):
  left = lambda here, row: hidden_ref[here, _at(row)]
  right = lambda here, column: _read(dy_ref, row_ref[here], column)
  _sum_outer(first_ref, length_ref, left, right, out_ref)


def _sum_outer(first_ref, length_ref, left, right, out_ref):
  """Writes the sum over an expert's tiles of places of a left tile, turned, times a right one."""
  expert, row, column = (pl.program_id(axis) for axis in range(3))
  first = first_ref[expert]

  def turn(n, total):
    here = _at(first + n)
    return total + triton.dot(left(here, row), right(here, column), trans_a=True)

  zeros = jnp.zeros((TILE, TILE), jnp.float32)
  out_ref[...] = jax.lax.fori_loop(0, length_ref[expert], turn, zeros)


def _wide(x):
  return x.astype(jnp.float32)
