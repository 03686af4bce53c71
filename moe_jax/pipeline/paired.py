"""A layer that works its micro-batch as two halves, side by side.

While one half exchanges tokens the other multiplies matrices, also in a unit that has no other
beside it. Both halves are cut into the same steps; a step of the pair is a slot of them, as `tie`
lays two streams beside each other, and ends when both are through. Its backward pass is such a slot
as well. Between layers the halves stay apart: the first, which is ahead, begins the next layer
beside the second one's last exchange. Knows layers as functions; must not know units, schedules or
models.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.pipeline import tie
from moe_jax.pipeline.functions import Functions, Halves
from moe_jax.pipeline.steps import Step, cut

Tree = Any


def of_pairs(functions: Functions) -> Functions:
  """Returns the functions with pairs in place of x and y, those of either half."""
  halves = functions.halves

  def layer(weights, shared, x, inputs):
    of_half = zip(x, halves.split(inputs), strict=True)
    return _joined(halves, *(functions.layer(weights, shared, *half) for half in of_half))

  return functions._replace(
    embed=lambda shared, inputs: halves.split(functions.embed(shared, inputs)),
    layer=layer,
    head=lambda shared, y, inputs: functions.head(shared, halves.join(*y), inputs),
    add_embed_gradient=lambda sums, shared, inputs, gx: functions.add_embed_gradient(
      sums, shared, inputs, halves.join(*gx)
    ),
  )


def steps(functions: Functions, example: tuple) -> tuple[Step, ...]:
  """Returns a layer as steps of both halves.

  Args:
    functions: of a micro-batch that is worked whole; their layer is here that of one half.
    example: (weights, shared, x, inputs) as `steps.cut` takes them, x a pair.
  """
  layer, halves = functions.layer, functions.halves
  weights, shared, x, inputs = example
  of_half = jax.eval_shape(lambda whole: halves.split(whole)[0], inputs)
  singles = cut(layer, (weights, shared, x[0], of_half), inside=functions.inside)
  costs = [tie.cost(step, False) for step in singles]
  slots = tie.side_by_side(costs, costs)
  if slots[0][0] < slots[0][1]:  # the first half is to be ahead
    slots = tuple((other, one) for one, other in slots)

  def slot(number: int, parts: tuple[tuple[Step, ...], tuple[Step, ...]]) -> Step:
    is_last = number == len(slots) - 1

    def run(weights, shared, carries, inputs):
      carries = list(carries)
      for half, given in enumerate(halves.split(inputs)):
        for step in parts[half]:
          carries[half] = step.run(weights, shared, carries[half], given)
      # What follows the last slot may begin with the half that is through.
      return _joined(halves, *carries) if is_last else _tied(carries)

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


def _joined(halves: Halves, one: tuple, other: tuple) -> tuple:
  """Returns (y, statistics, report) of the micro-batch, y a pair, from those of either half."""
  (y, *found), (more_y, *more_found) = one, other
  return (y, more_y), *halves.merge(found, more_found)


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
