"""What the model's hand-written kernels compute, by the name that they have in a compiled program.

Knows kernels by the shapes of their operands; must not know chips or time.
"""

from moe_jax.model import flash
from moe_jax.rehearse.hlo import Shape
from moe_jax.rehearse.work import KernelFlops


def _attention(name: str):
  def flops(operands: tuple[Shape, ...], _: tuple[Shape, ...]) -> float:
    b, S, N, H = operands[0].dims
    return flash.kernel_flops(name, b, S, N, H)

  return flops


FLOPS: KernelFlops = {name: _attention(name) for name in flash.PRODUCTS}
