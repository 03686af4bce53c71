"""What the model's hand-written kernels compute and read, by the name that they have in a compiled
program.

Knows kernels by the shapes of their operands; must not know chips or time.
"""

from moe_jax.model import flash
from moe_jax.moe import grouped_kernels
from moe_jax.rehearse.hlo import Shape
from moe_jax.rehearse.work import Kernel, Kernels


def _attention(name: str) -> Kernel:
  def flops(operands: tuple[Shape, ...]) -> float:
    b, S, N, H = operands[0].dims
    return flash.kernel_flops(name, b, S, N, H, num_keys=operands[1].dims[1])

  return Kernel(flops)


def _grouped(weights: int) -> Kernel:
  """Returns what is done by a product of rows, at the places of operand 2, and experts' weights: of
  as many experts of one layer as there are blocks of rows at most.
  """

  def flops(operands: tuple[Shape, ...]) -> float:
    num_places, (_, _, *of_expert) = operands[2].dims[0], operands[weights].dims
    return grouped_kernels.kernel_flops(num_places, *of_expert)

  def read_parts(operands: tuple[Shape, ...]) -> dict[int, float]:
    num_blocks, (L, e, *_) = operands[2].dims[0] / grouped_kernels.TILE, operands[weights].dims
    return {weights: min(num_blocks, e) / (L * e)}

  return Kernel(flops, read_parts)


def _outer_flops(operands: tuple[Shape, ...]) -> float:
  num_places, (_, i), (_, o) = operands[2].dims[0], operands[3].dims, operands[4].dims
  return grouped_kernels.kernel_flops(num_places, i, o)


KERNELS: Kernels = {
  **{name: _attention(name) for name in flash.PRODUCTS},
  grouped_kernels.HIDDEN: _grouped(4),
  grouped_kernels.OUTPUT: _grouped(4),
  grouped_kernels.D_HIDDEN: _grouped(5),
  grouped_kernels.D_ROWS: _grouped(4),
  grouped_kernels.D_GATE_UP: Kernel(_outer_flops),
  grouped_kernels.D_DOWN: Kernel(_outer_flops),
}
