"""What one instruction computes: operations of matrix products, and bytes to and from memory.

Only matrix products count as operations, as in `plan.cost`: all else is bound by memory. An array
of which a fusion reads a slice counts as that slice, and an update in place as what it writes.
Knows HLO; must not know chips, time or phases.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from moe_jax.rehearse import convolution
from moe_jax.rehearse.hlo import Computation, Instruction, Module, Shape


class Kernel(NamedTuple):
  """What a hand-written kernel does, by the shapes of its operands.

  Attributes:
    flops: of its matrix products.
    read_parts: of operands that it does not read wholly the part, by their number.
  """

  flops: Callable[[tuple[Shape, ...]], float]
  read_parts: Callable[[tuple[Shape, ...]], Mapping[int, float]] = lambda operands: {}


# By the name that it has in a compiled program.
Kernels = Mapping[str, Kernel]

_GEMM_TARGETS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8", "__onednn$matmul")
_KERNEL_TARGETS = ("__gpu$xla.gpu.triton", "triton_kernel_call", "mosaic_gpu_v2")
_NO_FLOPS_TARGETS = ("__cub$DeviceRadixSort", "__cub$DeviceRadixSortUnassignedScratchSize", "TopK")
_INTEGER = re.compile(r"[su]\d+|pred")
_PASS = ("bitcast", "reshape", "get-tuple-element", "copy", "convert")
_ELEMENTWISE = (
  "add", "compare", "convert", "divide", "exponential", "logistic", "maximum", "minimum",
  "multiply", "negate", "select", "subtract", "tanh", "transpose",
)  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")


class _Update(NamedTuple):
  """What writes a part of its first operand, in place: which operand holds the part, and whether
  that is added to what is there, which is then read too.
  """

  part: int
  adds: bool


_UPDATES = {"dynamic-update-slice": _Update(1, adds=False), "scatter": _Update(2, adds=True)}


@dataclasses.dataclass(frozen=True)
class Work:
  """Of one execution of one instruction.

  Attributes:
    flops: by dtype of the operands, as HLO names it, and tf32.
    num_bytes: read and written.
    unknown: what could not be counted, by name; its bytes are, its operations are not.
  """

  flops: Mapping[str, float]
  num_bytes: float
  unknown: tuple[str, ...] = ()


def of(
  module: Module, computation: Computation, instruction: Instruction, kernels: Kernels
) -> Work:
  """Returns the work of an instruction of `computation` that calls no loop and no collective."""
  flops: collections.Counter[str] = collections.Counter()
  unknown = []
  for where, each in _inside(module, computation, instruction):
    if each.opcode == "dot":
      flops[_dot_dtype(where, each)] += _dot_flops(where, each)
    elif each.opcode == "convolution":
      counted = convolution.flops(where, each)
      if counted is None:
        unknown.append("convolution in groups")
      else:
        flops[_dot_dtype(where, each)] += counted
    elif each.opcode == "custom-call":
      counted = _custom_call_flops(where, each, kernels)
      if counted is None:
        unknown.append(f"custom-call {_target(each)}")
      elif counted:
        flops[_call_dtype(where, each)] += counted
    elif each.opcode in ("fft", "triangular-solve", "cholesky"):
      unknown.append(each.opcode)
  num_bytes = _num_bytes(module, computation, instruction, kernels)
  return Work(dict(flops), num_bytes, tuple(unknown))


def _inside(
  module: Module, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
  """Yields an instruction and, where it is a fusion or a call, those inside."""
  yield computation, instruction
  if "calls" in instruction.called or instruction.opcode == "call":
    attribute = "calls" if "calls" in instruction.called else "to_apply"
    inner = module.called(instruction, attribute)
    for each in inner.instructions:
      yield from _inside(module, inner, each)


def _dot_dtype(computation: Computation, dot: Instruction) -> str:
  """Returns the dtype of the operands; tf32 where float32 is not asked to be exact.

  Source: https://openxla.org/xla/operation_semantics#dot, PrecisionConfig: DEFAULT is the fastest,
  which on NVIDIA's tensor cores is TensorFloat-32.
  """
  dtype = computation.operands_of(dot)[0].shapes[0].dtype
  is_exact = "high" in (dot.attribute("operand_precision") or "")
  return "tf32" if dtype == "f32" and not is_exact else dtype


def _dot_flops(computation: Computation, dot: Instruction) -> float:
  left = computation.operands_of(dot)[0].shapes[0]
  contracted = (dot.attribute("lhs_contracting_dims") or "{}").strip("{}")
  sizes = [left.dims[int(d)] for d in contracted.split(",") if d]
  return 2.0 * dot.shapes[0].elements * math.prod(sizes)


def _custom_call_flops(
  computation: Computation, call: Instruction, kernels: Kernels
) -> float | None:
  target = _target(call)
  operands = _shapes(computation.operands_of(call))
  if target in _GEMM_TARGETS:
    config = call.backend_config.get("gemm_backend_config", call.backend_config)
    numbers = config["dot_dimension_numbers"]
    contracted = (operands[0].dims[int(d)] for d in numbers["lhs_contracting_dimensions"])
    return 2.0 * call.shapes[0].elements * math.prod(contracted)
  if target in _NO_FLOPS_TARGETS:
    return 0.0
  name = _kernel_name(call)
  return kernels[name].flops(operands) if name in kernels else None


def _shapes(operands: Sequence[Instruction]) -> tuple[Shape, ...]:
  return tuple(shape for operand in operands for shape in operand.shapes)


def _call_dtype(computation: Computation, call: Instruction) -> str:
  """Returns the dtype of the operands, the first that is no index; of a hand-written kernel tf32 in
  place of float32.

  Source: https://triton-lang.org/main/python-api/generated/triton.language.dot.html,
  input_precision, which Pallas leaves at its default.
  """
  dtypes = [shape.dtype for shape in _shapes(computation.operands_of(call))]
  dtype = next((d for d in dtypes if not _INTEGER.fullmatch(d)), dtypes[0])
  return "tf32" if dtype == "f32" and _target(call) in _KERNEL_TARGETS else dtype


def _target(call: Instruction) -> str:
  return (call.attribute("custom_call_target") or "").strip('"')


def _kernel_name(call: Instruction) -> str:
  if _target(call) not in _KERNEL_TARGETS:
    return _target(call)
  found = re.search(r'name\s*[=:]\s*\\*"([\w.\-]+)', call.attributes)
  return call.backend_config.get("name") or (found[1] if found else "")


def _num_bytes(
  module: Module, computation: Computation, instruction: Instruction, kernels: Kernels
) -> float:
  operands = computation.operands_of(instruction)
  if "calls" in instruction.called:
    inner = module.called(instruction, "calls")
    return _parameter_bytes(inner) + _written_bytes(inner, inner.root)
  if instruction.opcode in _SLICES:
    return 2 * instruction.num_bytes
  if instruction.opcode in _UPDATES:
    update = _UPDATES[instruction.opcode]
    return (2 + update.adds) * operands[update.part].num_bytes
  parts: Mapping[int, float] = {}
  if instruction.opcode == "custom-call" and _kernel_name(instruction) in kernels:
    parts = kernels[_kernel_name(instruction)].read_parts(_shapes(operands))
  read = sum(parts.get(i, 1.0) * operand.num_bytes for i, operand in enumerate(operands))
  return instruction.num_bytes + read


def _parameter_bytes(inner: Computation) -> float:
  return sum(_read_bytes(inner, parameter) for parameter in inner.parameters.values())


def _read_bytes(inner: Computation, made: Instruction) -> float:
  """Returns how many bytes of a value are read inside a fusion: at most all, once."""
  return _read_part(inner, made) * made.num_bytes


def _read_part(inner: Computation, made: Instruction) -> float:
  """Returns which part of a value is read inside a fusion, which computes of every value only what
  its results ask for.
  """
  part = 0.0
  for user in inner.users.get(made.name, ()):
    if user.opcode in _SLICES and user.operands[0] == made.name:
      part += user.shapes[0].elements / made.shapes[0].elements
    elif user.opcode in _UPDATES and user.operands[0] == made.name:
      update = _UPDATES[user.opcode]
      written = inner.operands_of(user)[update.part].shapes[0]
      part += update.adds * written.elements / made.shapes[0].elements
    elif _asks_evenly(user, made) and not user.is_root:
      part += _read_part(inner, user)
    else:
      return 1.0
  return min(part, 1.0)


def _asks_evenly(user: Instruction, made: Instruction) -> bool:
  """Returns whether a part of the user asks for an equal part of the value."""
  if user.opcode == "reduce":
    return user.operands[0] == made.name
  return user.opcode in _PASS or (
    user.opcode in _ELEMENTWISE and user.shapes[0].elements == made.shapes[0].elements
  )


def _written_bytes(inner: Computation, root: Instruction) -> float:
  if root.opcode == "tuple":
    return sum(_written_bytes(inner, each) for each in inner.operands_of(root))
  source = root
  while source.opcode in _PASS:
    source = inner.operands_of(source)[0]
  if source.opcode in _UPDATES:
    return inner.operands_of(source)[_UPDATES[source.opcode].part].num_bytes
  return root.num_bytes
