"""A layer that works its micro-batch as two halves, side by side.

While one half exchanges tokens the other multiplies matrices, also in a unit that has no other
beside it. Both halves are cut into the same steps; a step of the pair is a slot of them, as `tie`
lays two streams beside each other, and ends when both are through. Its backward pass is such a slot
as well. Knows a layer as a function; must not know units, schedules or models.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.pipeline import tie
from moe_jax.pipeline.functions import Halves
from moe_jax.pipeline.steps import Step, cut

Tree = Any


def steps(
  layer: Callable, example: tuple, halves: Halves, inside: tuple[str, ...]
) -> tuple[Step, ...]:
  """Returns the layer as steps of both halves.

  Args:
    layer, example, inside: as `steps.cut` takes them.
    halves: how a micro-batch falls into them.
  """
  weights, shared, x, inputs = example
  of_half = jax.eval_shape(lambda whole: halves.split(whole)[0], (x, inputs))
  singles = cut(layer, (weights, shared, *of_half), inside=inside)
  costs = [tie.cost(step, False) for step in singles]
  slots = tie.side_by_side(costs, costs)

  def slot(number: int, parts: tuple[tuple[Step, ...], tuple[Step, ...]]) -> Step:
    def run(weights, shared, carry, inputs):
      carries = list(halves.split(carry) if number == 0 else carry)
      for half, given in enumerate(halves.split(inputs)):
        for step in parts[half]:
          carries[half] = step.run(weights, shared, carries[half], given)
      carries = _tied(carries)
      return halves.join(*carries) if number == len(slots) - 1 else carries

    both = [*parts[0], *parts[1]]
    uses = {leaf for each in both for leaf in each.uses}
    total = lambda name: sum(getattr(each, name) for each in both)
    return Step(
      run, tuple(sorted(uses)), total("flops"), total("made_bytes"), total("num_equations"),
      total("inside_bytes"), total("between_bytes"),
    )  # fmt: skip

  found, one, other = [], 0, 0
  for number, (more, more_other) in enumerate(slots):
    parts = singles[one : one + more], singles[other : other + more_other]
    found.append(slot(number, parts))
    one, other = one + more, other + more_other
  return tuple(found)


def _tied(tree: Tree) -> Tree:
  """Returns `tree`, of which no float is there before all are. Integers pass: a barrier has them
  differentiated, which they are not.
  """
  leaves, structure = jax.tree.flatten(tree)
  is_float = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
  floats = [leaf for leaf, f in zip(leaves, is_float, strict=True) if f]
  there = iter(jax.lax.optimization_barrier(floats))
  tied = [next(there) if f else leaf for leaf, f in zip(leaves, is_float, strict=True)]
  return jax.tree.unflatten(structure, tied)
