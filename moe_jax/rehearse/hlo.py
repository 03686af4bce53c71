"""Compiled HLO text, taken apart into computations and instructions in schedule order.

The grammar and nothing else: names, shapes, operands, attributes. Knows no opcode but where its
text has a form of its own; must not know what an instruction costs or means.

Source: https://openxla.org/xla/operation_semantics for opcodes; xla/hlo/parser of openxla/xla.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_BITS = {
  "pred": 8, "token": 0, "opaque": 0,
  "s2": 2, "s4": 4, "s8": 8, "s16": 16, "s32": 32, "s64": 64,
  "u2": 2, "u4": 4, "u8": 8, "u16": 16, "u32": 32, "u64": 64,
  "f4e2m1fn": 4, "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3": 8, "f8e8m0fnu": 8, "f8e4m3b11fnuz": 8,
  "f8e4m3fnuz": 8, "f8e5m2fnuz": 8, "f8e3m4": 8, "f16": 16, "bf16": 16, "f32": 32, "f64": 64,
  "c64": 64, "c128": 128,
}  # fmt: skip

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_SHAPE = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,<=?]*)\]")
_SPACE = re.compile(r":S\((\d+)\)")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
  r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_MLIR = re.compile(r"\{\w+ = ")
_MLIR_ATTRIBUTE = re.compile(r'(\w+) = ("[^"]*"|[^,}]*)')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


class Shape(NamedTuple):
  """One array."""

  dtype: str
  dims: tuple[int, ...]

  @property
  def elements(self) -> int:
    return math.prod(self.dims)

  @property
  def is_known(self) -> bool:
    """Whether the width of its elements is."""
    return self.dtype in _BITS

  @property
  def num_bytes(self) -> int:
    """Bytes of the array; 0 where the width of its elements is not known."""
    return math.ceil(self.elements * _BITS.get(self.dtype, 0) / 8)


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
  """One line of a computation.

  Attributes:
    shapes: arrays of the result, those of a tuple flattened.
    operands: names of instructions of the same computation.
    arguments: the text between the parentheses.
    attributes: the text behind them.
    called: names of computations by attribute, those of a conditional under "branches".
    spaces: memory spaces of the result's arrays, where it is not the usual one.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  arguments: str
  attributes: str
  called: Mapping[str, tuple[str, ...]]
  is_root: bool
  spaces: frozenset[int] = frozenset()

  @property
  def num_bytes(self) -> int:
    """Bytes of the result."""
    return sum(shape.num_bytes for shape in self.shapes)

  @functools.cached_property
  def op_name(self) -> str:
    """The scopes that it was traced under; empty where XLA made it up."""
    found = _OP_NAME.search(self.attributes)
    return found[1] if found else ""

  @functools.cached_property
  def backend_config(self) -> dict[str, Any]:
    """What the back end keeps with it; empty where there is nothing. JSON, or, of a hand-written
    kernel, MLIR's attributes as text.
    """
    start = self.attributes.find("backend_config=")
    if start < 0:
      return {}
    start += len("backend_config=")
    if _MLIR.match(self.attributes, start):
      found = _MLIR_ATTRIBUTE.finditer(self.attributes, start)
      return {each[1]: each[2].strip('"') for each in found}
    value, _ = json.JSONDecoder().raw_decode(self.attributes, start)
    if isinstance(value, str):
      value = json.loads(value) if value.startswith("{") else {"text": value}
    return value

  def attribute(self, name: str) -> str | None:
    """Returns the text of an attribute up to the next comma outside brackets, or None."""
    match = re.search(rf"(?:^|, ){name}=", self.attributes)
    if not match:
      return None
    depth, start = 0, match.end()
    for found in re.finditer(r"[\[{(\]}),]", self.attributes[start:]):
      if found[0] == "," and not depth:
        return self.attributes[start : start + found.start()]
      depth += {"[": 1, "{": 1, "(": 1, ",": 0}.get(found[0], -1)
    return self.attributes[start:]


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
  """Instructions in schedule order."""

  name: str
  instructions: tuple[Instruction, ...]

  @functools.cached_property
  def by_name(self) -> Mapping[str, Instruction]:
    return {each.name: each for each in self.instructions}

  @property
  def root(self) -> Instruction:
    return next((i for i in self.instructions if i.is_root), self.instructions[-1])

  @functools.cached_property
  def parameters(self) -> Mapping[int, Instruction]:
    """By their number."""
    return {int(i.arguments): i for i in self.instructions if i.opcode == "parameter"}

  @functools.cached_property
  def users(self) -> Mapping[str, tuple[Instruction, ...]]:
    """Which instructions take the result of each."""
    found: dict[str, list[Instruction]] = {}
    for each in self.instructions:
      for operand in dict.fromkeys(each.operands):
        found.setdefault(operand, []).append(each)
    return {name: tuple(users) for name, users in found.items()}

  def operands_of(self, instruction: Instruction) -> tuple[Instruction, ...]:
    """Returns the instructions that make its operands."""
    return tuple(self.by_name[name] for name in instruction.operands)


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
  """A compiled program.

  Attributes:
    is_scheduled: whether the order of instructions is that of execution.
  """

  entry: Computation
  computations: Mapping[str, Computation]
  is_scheduled: bool

  def called(self, instruction: Instruction, attribute: str) -> Computation:
    """Returns the one computation that an instruction calls by `attribute`."""
    return self.computations[instruction.called[attribute][0]]


def parse(text: str) -> Module:
  """Returns the module that `text`, as `Compiled.as_text()` prints it, describes.

  Raises:
    ValueError: a line inside a computation is not an instruction, or there is no entry.
  """
  computations, entry = {}, None
  for name, is_entry, lines in _blocks(text):
    computations[name] = Computation(name, tuple(map(_instruction, lines)))
    if is_entry:
      entry = computations[name]
  if entry is None:
    raise ValueError(f"HLO text has no ENTRY computation: {text[:80]!r}; give Compiled.as_text()")
  is_scheduled = "is_scheduled=true" in text.partition("\n")[0]
  return Module(entry, computations, is_scheduled)


def _blocks(text: str) -> Iterator[tuple[str, bool, list[str]]]:
  name, is_entry, lines = None, False, []
  for line in text.splitlines():
    if name is None:
      header = None if line.startswith("HloModule") else _HEADER.match(line)
      if header:
        name, is_entry, lines = header[2], bool(header[1]), []
    elif line.startswith("}"):
      yield name, is_entry, lines
      name = None
    elif line.strip():
      lines.append(line)


def _instruction(line: str) -> Instruction:
  match = _INSTRUCTION.match(line)
  rest = match[3] if match else ""
  shape_end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
  opcode = _OPCODE.match(rest, shape_end) if shape_end > 0 else None
  if not opcode:
    raise ValueError(f"not an HLO instruction: {line.strip()[:120]!r}")
  end = _closing(rest, opcode.end() - 1)
  arguments, attributes = rest[opcode.end() : end - 1], rest[end:].removeprefix(", ")
  is_literal = opcode[1] in ("constant", "parameter")
  return Instruction(
    name=match[2],
    opcode=opcode[1],
    shapes=tuple(_shapes(rest[:shape_end])),
    operands=() if is_literal else tuple(_NAME.findall(arguments)),
    arguments=arguments,
    attributes=attributes,
    called=_called(attributes),
    is_root=bool(match[1]),
    spaces=frozenset(map(int, _SPACE.findall(rest[:shape_end]))),
  )


def _shapes(text: str) -> Iterator[Shape]:
  for dtype, dims in _SHAPE.findall(text):
    yield Shape(dtype, tuple(int(size) for size in dims.replace("<=", "").split(",") if size))


def _called(attributes: str) -> dict[str, tuple[str, ...]]:
  called = {attribute: (name,) for attribute, name in _CALLED.findall(attributes)}
  branches = _BRANCHES.search(attributes)
  if branches:
    called["branches"] = tuple(name.strip(" %") for name in branches[1].split(","))
  elif "true_computation" in called:  # branch 0 is what runs where the predicate is false
    called["branches"] = called["false_computation"] + called["true_computation"]
  return called


def _closing(text: str, start: int) -> int:
  """Returns the place behind the parenthesis that closes the one at `start`, or -1."""
  depth = 0
  for found in re.finditer(r"[()]", text[start:]):
    depth += 1 if found[0] == "(" else -1
    if not depth:
      return start + found.end()
  return -1
