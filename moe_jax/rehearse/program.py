"""A compiled program as what a GPU does one after the other: computation, collectives, loops,
branches.

Reads both forms that XLA prints: pairs of kind-start and kind-done, and async computations that
wrap one collective. What it does not know it counts in `Program.unknown`, by name. Knows HLO and
the mesh; must not know chips or time.

Source: https://openxla.org/xla/operation_semantics and https://openxla.org/xla/async_ops
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax.observe import trace
from moe_jax.rehearse import groups, hlo, trips, work
from moe_jax.rehearse.hlo import Computation, Instruction, Module

PHASES = (*trace.PHASES, "optimizer")
OTHER = "other"
KINDS = (
  "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip

# Memory that NCCL registers, as programs of jax 0.10 and of 0.12 name it.
_COLLECTIVE_SPACES = frozenset({1, 7})
# Nothing runs for these: names for what is there already.
_FREE_OPCODES = """
  parameter constant tuple get-tuple-element bitcast after-all add-dependency opt-barrier
  optimization-barrier partition-id replica-id domain get-dimension-size
"""
_KERNEL_OPCODES = """
  fusion dot custom-call copy reduce reduce-window sort scatter gather slice dynamic-slice
  dynamic-update-slice transpose broadcast concatenate pad convert reshape reverse iota select
  compare add subtract multiply divide remainder power maximum minimum and or xor not negate abs
  sign exponential exponential-minus-one log log-plus-one logistic sqrt rsqrt cbrt tanh sine cosine
  tan atan2 erf floor ceil round-nearest-afz round-nearest-even is-finite clamp shift-left
  shift-right-logical shift-right-arithmetic bitcast-convert popcnt clz map reduce-precision
  rng-bit-generator stochastic-convert select-and-scatter topk
"""
_FREE, _KNOWN = frozenset(_FREE_OPCODES.split()), frozenset(_KERNEL_OPCODES.split())


@dataclasses.dataclass(frozen=True, eq=False)
class Compute:
  """One kernel.

  Attributes:
    is_backward: whether it is named as part of a backward pass, see `_is_backward`.
  """

  name: str
  phase: str
  work: work.Work
  is_backward: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Collective:
  """One collective, begun here.

  Attributes:
    is_async: whether a `Done` of the same name waits for it; otherwise it is waited for at once.
    operand_bytes: what this device puts in.
    groups: who takes part.
    is_backward: whether it is named as part of a backward pass, see `_is_backward`.
    is_symmetric: whether what it takes and brings lies in memory that its GPUs registered with each
      other.
  """

  name: str
  phase: str
  kind: str
  is_async: bool
  operand_bytes: int
  groups: groups.Groups
  is_backward: bool
  is_symmetric: bool = False

  @property
  def axis(self) -> str:
    """The mesh axes that it runs along, joined by +."""
    name = "+".join(self.groups.axes)
    return name if self.groups.is_whole else f"part of {name}"

  @property
  def bytes_sent(self) -> float:
    """Bytes that this device sends, by the ring or, for all-to-all, the direct algorithm."""
    n = self.groups.size
    return self.operand_bytes * {
      "all-reduce": 2 * (n - 1) / n,
      "all-gather": n - 1,
      "reduce-scatter": (n - 1) / n,
      "all-to-all": (n - 1) / n,
      "collective-permute": 1,
    }[self.kind]  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Done:
  """Waits for the collective `name`."""

  name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
  """Runs its body `trips` times.

  Attributes:
    op_name: of the loop: the scopes that it stands in.
  """

  name: str
  trips: int
  body: "Block"
  op_name: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Branch:
  """Runs one of its branches; which, the program's data says.

  Attributes:
    op_name: of the conditional itself, or of a loop that turns once or not at all: the scopes that
      it stands in.
  """

  name: str
  branches: tuple["Block", ...]
  op_name: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
  """A computation.

  Attributes:
    units: in schedule order.
    op_names: of its instructions, those that are fused included.
  """

  name: str
  units: tuple[Compute | Collective | Done | Loop | Branch, ...]
  op_names: frozenset[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """A compiled program.

  Attributes:
    entry: what runs.
    unknown: how often each construct stands in the text that could not be read.
    assumed: how many loops turn as often as the caller said, by what was assumed.
  """

  entry: Block
  unknown: Mapping[str, int]
  assumed: Mapping[str, int] = dataclasses.field(default_factory=dict)


def read(
  text: str,
  mesh: Mapping[str, int],
  kernels: work.Kernels | None = None,
  turns: Mapping[str, int | None] | None = None,
) -> Program:
  """Returns the schedule of a compiled program.

  Args:
    text: of `Compiled.as_text()`.
    mesh: size of each axis by name, outermost first.
    kernels: what hand-written kernels do, by name; others of them are counted as unknown.
    turns: how often a loop turns whose data decides that, by the scope that it stands in; None for
      once or not at all, as a branch.

  Raises:
    ValueError: the text is not HLO, or is not scheduled.
  """
  module = hlo.parse(text)
  if not module.is_scheduled:
    raise ValueError("the HLO text is not scheduled; give the text of a compiled program")
  reader = _Reader(module, mesh, kernels or {}, turns or {})
  entry = reader.block(module.entry)
  for computation in module.computations.values():
    for each in computation.instructions:
      for shape in each.shapes:
        if not shape.is_known:
          reader.unknown[f"elements of {shape.dtype}, taken as no bytes"] += 1
  return Program(entry, dict(reader.unknown), dict(reader.assumed))


def phase_of(op_name: str) -> str:
  """Returns the phase that an instruction was traced under, or those of what was combined into
  it, joined by +, or "other".
  """
  parts = op_name.replace("(jvp", ":(jvp").split(":") if ":" in op_name else [op_name]
  found = {trace.phase_of(part, PHASES) for part in parts} - {None}
  return "+".join(sorted(found)) or OTHER


def _is_backward(op_name: str) -> bool:
  """Returns whether an instruction is named as part of a backward pass.

  What jax.checkpoint computes again is; the steps that a layer's `restore` runs again are not, with
  pipeline.save "inputs" and "exchanges": they have the names of the forward pass.
  """
  return "transpose(" in op_name


def flat(block: Block, times: int = 1) -> Iterator[tuple[Any, int]]:
  """Yields every unit but loops and branches with how often loops run it; all branches count."""
  for unit in block.units:
    if isinstance(unit, Loop):
      yield from flat(unit.body, times * unit.trips)
    elif isinstance(unit, Branch):
      for branch in unit.branches:
        yield from flat(branch, times)
    else:
      yield unit, times


class _Reader:
  """Turns computations into blocks, and counts what it cannot read."""

  def __init__(
    self,
    module: Module,
    mesh: Mapping[str, int],
    kernels: work.Kernels,
    turns: Mapping[str, int | None],
  ):
    self.module, self.mesh, self.kernels, self.turns = module, mesh, kernels, turns
    self.unknown: collections.Counter[str] = collections.Counter()
    self.assumed: collections.Counter[str] = collections.Counter()

  def block(self, computation: Computation) -> Block:
    units: list[Any] = []
    started: dict[str, str] = {}  # async instruction -> name of the collective that it goes on with
    for each in computation.instructions:
      units += self._units(computation, each, started)
    return Block(computation.name, tuple(units), frozenset(self._op_names(computation)))

  def _units(self, computation: Computation, each: Instruction, started: dict[str, str]):
    opcode = each.opcode
    if opcode in _FREE:
      return []
    if opcode == "while":
      body = self.block(self.module.called(each, "body"))
      if self._is_branch(each):
        return [Branch(each.name, (Block("", (), frozenset()), body), each.op_name)]
      return [Loop(each.name, self._trips(computation, each), body, each.op_name)]
    if opcode == "conditional":
      names = each.called["branches"]
      branches = tuple(self.block(self.module.computations[n]) for n in names)
      return [Branch(each.name, branches, each.op_name)]
    if opcode.endswith(("-done", "-update")):
      return self._done(each, started)
    where, collective = self._collective(computation, each)
    if collective is not None:
      if opcode.endswith("-start"):
        started[each.name] = each.name
      return [self._begun(computation, where, collective, each)]
    if opcode == "call":
      return list(self.block(self.module.called(each, "to_apply")).units)
    return [self._compute(computation, each)]

  def _done(self, each: Instruction, started: dict[str, str]):
    name = started.get(each.operands[0])
    if each.opcode.endswith("-update"):
      if name is not None:
        started[each.name] = name
      return []
    return [] if name is None else [Done(name)]

  def _collective(self, computation: Computation, each: Instruction):
    """Returns the collective that an instruction begins and where it stands, or None."""
    if each.opcode.removesuffix("-start") in KINDS:
      return computation, each
    if "calls" in each.called:
      inner = self.module.called(each, "calls")
      found = [i for i in inner.instructions if i.opcode in KINDS]
      if len(found) > 1:
        self.unknown[f"{each.opcode} of {len(found)} collectives"] += 1
      if found:
        return inner, found[0]
    return None, None

  def _begun(
    self, computation: Computation, where: Computation, collective: Instruction, each: Instruction
  ) -> Collective:
    operands = where.operands_of(collective)
    # One that XLA made up belongs to what it sends.
    made_by = (collective, each, *operands, *computation.operands_of(each))
    op_name = next((maker.op_name for maker in made_by if maker.op_name), "")
    return Collective(
      name=each.name,
      phase=phase_of(op_name),
      kind=_kind(where, collective),
      is_async=each.opcode.endswith("-start"),
      operand_bytes=sum(operand.num_bytes for operand in operands),
      groups=groups.parse(collective.attributes, self.mesh),
      is_backward=_is_backward(op_name),
      is_symmetric=not _COLLECTIVE_SPACES.isdisjoint(collective.spaces),
    )

  def _compute(self, computation: Computation, each: Instruction) -> Compute:
    found = work.of(self.module, computation, each, self.kernels)
    for name in found.unknown:
      self.unknown[name] += 1
    # An async computation other than a collective counts as running where it is begun.
    if each.opcode.removesuffix("-start") not in _KNOWN:
      self.unknown[each.opcode] += 1
    return Compute(each.name, phase_of(each.op_name), found, _is_backward(each.op_name))

  def _is_branch(self, loop: Instruction) -> bool:
    """Returns whether a loop turns once or not at all."""
    scopes = loop.op_name.split("/")[:-1]
    return bool(scopes) and self.turns.get(scopes[-1], 0) is None

  def _trips(self, computation: Computation, loop: Instruction) -> int:
    known = trips.known(self.module, computation, loop)
    if known is not None:
      return known
    # Backwards a scope reads transpose(jvp(scope)).
    for scope in re.findall(r"\w+", loop.op_name):
      turns = self.turns.get(scope)
      if turns is not None:
        self.assumed[f"loop of {scope}: {turns} turns"] += 1
        return turns
    self.unknown["while without known trip count, taken as 1"] += 1
    return 1

  def _op_names(self, computation: Computation) -> Iterator[str]:
    for each in computation.instructions:
      yield each.op_name
      for names in each.called.values():
        for name in names:
          yield from self._op_names(self.module.computations[name])


def _kind(where: Computation, collective: Instruction) -> str:
  """Returns the kind of a collective; a fusion of all-reduce and a slice of it, as XLA's TPU back
  end writes a reduce-scatter, is one.
  """
  kind = collective.opcode.removesuffix("-start")
  sliced = where.root.opcode == "dynamic-slice" and where.root.operands[0] == collective.name
  return "reduce-scatter" if kind == "all-reduce" and sliced else kind
