"""Operations of a convolution, as which XLA's TPU back end writes matrix products.

What stands for the batch of a product is a dimension of the window there, with dilations and
paddings by which each result meets one tap of it: only taps that meet data count. Knows HLO; must
not know chips.

Source: https://openxla.org/xla/operation_semantics#conv_convolution.
"""

import math
import re

import numpy as np

from moe_jax.rehearse.hlo import Computation, Instruction

_FIELD = re.compile(r"(\w+)=([\w\-]+)")


def flops(computation: Computation, convolution: Instruction) -> float | None:
  """Returns two operations for each pair of an input and a tap that meet; None of features or
  batches in groups, which no matrix product becomes.
  """
  if convolution.attribute("feature_group_count") or convolution.attribute("batch_group_count"):
    return None
  left, right = (operand.shapes[0].dims for operand in computation.operands_of(convolution))
  inputs, kernel, result = _labels(convolution.attribute("dim_labels"))
  out, window = convolution.shapes[0].dims, _window(convolution.attribute("window"))
  meeting = 1
  for dim in sorted(label for label in result if label.isdigit()):
    base, taps = left[inputs.index(dim)], right[kernel.index(dim)]
    meeting *= _meeting(out[result.index(dim)], base, taps, window, int(dim))
  plain = math.prod(out[result.index(label)] for label in "bf")
  return 2.0 * plain * right[kernel.index("i")] * meeting


def _labels(text: str) -> tuple[str, str, str]:
  """Returns the labels of both operands and of the result: bf_io->bf."""
  operands, result = text.split("->")
  return (*operands.split("_"), result)


def _window(text: str | None) -> dict[str, list[str]]:
  """Returns each field of a window, an entry for each dimension: {size=4x1 pad=3_3x0_0}."""
  return {name: value.split("x") for name, value in _FIELD.findall(text or "")}


def _meeting(outputs: int, base: int, taps: int, window: dict[str, list[str]], dim: int) -> int:
  """Returns how many (result, tap) pairs meet an input rather than padding or a hole."""
  field = lambda name, default: window[name][dim] if name in window else default
  low, _ = (int(part) for part in field("pad", "0_0").split("_"))
  stride, base_dilation = int(field("stride", "1")), int(field("lhs_dilate", "1"))
  at = np.arange(outputs)[:, None] * stride - low
  at = at + np.arange(taps) * int(field("rhs_dilate", "1"))
  inside = (at >= 0) & (at <= (base - 1) * base_dilation) & (at % base_dilation == 0)
  return int(inside.sum())
