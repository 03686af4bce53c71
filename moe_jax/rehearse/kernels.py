"""What the model's hand-written kernels compute, by the name that they have in a compiled program.

Knows kernels by the shapes of their operands; must not know chips or time.
"""

from moe_jax.model import flash
from moe_jax.moe import grouped_kernels
from moe_jax.rehearse.hlo import Shape
from moe_jax.rehearse.work import KernelFlops


def _attention(name: str):
  def flops(operands: tuple[Shape, ...], _: tuple[Shape, ...]) -> float:
    b, S, N, H = operands[0].dims
    return flash.kernel_flops(name, b, S, N, H, num_keys=operands[1].dims[1])

  return flops


def _grouped(weights: int):
  """Returns the operations of products of rows, at the places of operand 2, and experts'
  weights.
  """

  def flops(operands: tuple[Shape, ...], _: tuple[Shape, ...]) -> float:
    num_places, (_, *of_expert) = operands[2].dims[0], operands[weights].dims
    return grouped_kernels.kernel_flops(num_places, *of_expert)

  return flops


def _grouped_outer(operands: tuple[Shape, ...], _: tuple[Shape, ...]) -> float:
  num_places, (_, i), (_, o) = operands[2].dims[0], operands[3].dims, operands[4].dims
  return grouped_kernels.kernel_flops(num_places, i, o)


FLOPS: KernelFlops = {
  **{name: _attention(name) for name in flash.PRODUCTS},
  grouped_kernels.HIDDEN: _grouped(4),
  grouped_kernels.OUTPUT: _grouped(4),
  grouped_kernels.D_HIDDEN: _grouped(5),
  grouped_kernels.D_ROWS: _grouped(4),
  grouped_kernels.D_GATE_UP: _grouped_outer,
  grouped_kernels.D_DOWN: _grouped_outer,
}
