"""Collectives that a device of XLA:CPU may start before a loop ahead of them has ended.

XLA:CPU runs thunks one after the other where an array leads from one to the next. A loop that
needs nothing of a collective, nor it of the loop, runs beside it, and so the devices start the
loop's collectives and the other in an order of their own: they hang, or one meets another's. Found
in the text of a compiled program, whose order is that in which XLA:CPU starts what is ready.
"""

import functools

from moe_jax.rehearse import hlo

_COLLECTIVES = (
  "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute",
  "ragged-all-to-all", "reduce-scatter",
)  # fmt: skip


def pairs(text: str) -> list[tuple[str, str]]:
  """Returns (loop or branch, what may overtake it) by op_name, over a program compiled for CPUs."""
  module = hlo.parse(text)

  @functools.cache
  def communicates(computation: str) -> bool:
    return any(map(is_collective, module.computations[computation].instructions))

  def is_collective(each: hlo.Instruction) -> bool:
    return each.opcode in _COLLECTIVES or is_nest(each)

  def is_nest(each: hlo.Instruction) -> bool:
    names = [name for group in each.called.values() for name in group]
    return each.opcode in ("while", "conditional", "call") and any(map(communicates, names))

  found = []
  for computation in module.computations.values():
    needs = _needs(module, computation)
    begun = [each for each in computation.instructions if is_collective(each)]
    for place, first in enumerate(begun):
      later = begun[place + 1 :] if is_nest(first) else ()
      found += [
        (first.op_name, each.op_name) for each in later if first.name not in needs[each.name]
      ]
  return found


def _needs(module: hlo.Module, computation: hlo.Computation) -> dict[str, set[str]]:
  """Returns the instructions whose results lead to each."""
  needs: dict[str, set[str]] = {}
  for each in computation.instructions:
    is_element = each.opcode == "get-tuple-element"
    operands = [_maker(module, computation, each)] if is_element else each.operands
    needs[each.name] = set().union(*({name} | needs[name] for name in operands))
  return needs


def _maker(module: hlo.Module, computation: hlo.Computation, each: hlo.Instruction) -> str:
  """Returns what makes an element of a tuple; what a loop hands through, its operand did."""
  loop = computation.by_name[each.operands[0]]
  if loop.opcode != "while":
    return loop.name
  index = int(each.attribute("index"))
  body = module.called(loop, "body")
  last = body.by_name[body.root.operands[index]] if body.root.opcode == "tuple" else None
  start = computation.by_name[loop.operands[0]]
  is_same = last is not None and last.opcode == "get-tuple-element"
  is_same = is_same and int(last.attribute("index")) == index
  is_same = is_same and body.by_name[last.operands[0]].opcode == "parameter"
  return start.operands[index] if is_same and start.opcode == "tuple" else loop.name
