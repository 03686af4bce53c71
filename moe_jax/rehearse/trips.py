"""How often a loop turns, by what its text says.

XLA's GPU back end writes the number beside the loop. Its TPU back end does not; there it follows
from a counter that begins at a constant, grows by a constant and is compared with one. Knows HLO;
must not know what loops are for.
"""

import math

from moe_jax.rehearse.hlo import Computation, Instruction, Module

_SAME = ("copy", "bitcast")


def known(module: Module, computation: Computation, loop: Instruction) -> int | None:
  """Returns the turns of a loop of `computation`, or None where the text does not say."""
  written = loop.backend_config.get("known_trip_count", {}).get("n")
  return _counted(module, computation, loop) if written is None else int(written)


def _counted(module: Module, computation: Computation, loop: Instruction) -> int | None:
  """Returns the turns of `for (i = first; i < end; i += step)`."""
  condition, body = module.called(loop, "condition"), module.called(loop, "body")
  test = condition.root
  if test.opcode != "compare" or test.attribute("direction") != "LT":
    return None
  place, end = _sides(condition, test)
  step_place, step = _step(body, place)
  start = _source(computation, computation.operands_of(loop)[0])
  if place is None or end is None or step_place != place or start.opcode != "tuple":
    return None
  first = _constant(computation, computation.operands_of(start)[place])
  if first is None or not step or step < 0:
    return None
  return max(0, math.ceil((end - first) / step))


def _step(body: Computation, place: int | None) -> tuple[int | None, int | None]:
  """Returns which part of the loop's state the next value of part `place` is made of, and what is
  added to it.
  """
  if place is None or body.root.opcode != "tuple":
    return None, None
  following = _source(body, body.operands_of(body.root)[place])
  return _sides(body, following) if following.opcode == "add" else (None, None)


def _sides(computation: Computation, pair: Instruction) -> tuple[int | None, int | None]:
  """Returns the part of the loop's state on the left of an instruction, and the constant on the
  right; None for what is something else.
  """
  left, right = computation.operands_of(pair)
  return _place(computation, left), _constant(computation, right)


def _place(computation: Computation, value: Instruction) -> int | None:
  found = _source(computation, value)
  if found.opcode != "get-tuple-element":
    return None
  whole = computation.operands_of(found)[0]
  return int(found.attribute("index")) if whole.opcode == "parameter" else None


def _constant(computation: Computation, value: Instruction) -> int | None:
  found = _source(computation, value)
  is_number = found.opcode == "constant" and found.arguments.lstrip("-").isdigit()
  return int(found.arguments) if is_number else None


def _source(computation: Computation, value: Instruction) -> Instruction:
  while value.opcode in _SAME:
    value = computation.operands_of(value)[0]
  return value
