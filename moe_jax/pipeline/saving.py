"""What a layer keeps between its forward and its backward unit, by policy.

A layer's backward is `jax.vjp` of its steps, each split in two: the forward unit returns what must
wait, the backward unit takes it. What is a parameter or an input is not kept: the backward unit is
handed those again; what two steps ask for is kept once. Knows a layer as steps; must not know
schedules or models.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.parallel.axes import ALL
from moe_jax.pipeline import noted
from moe_jax.pipeline.steps import Step, is_collective, is_inside

Tree = Any

_RESIDUAL = "residual"
_NAME = "name"  # the primitive that marks a value


def residual(x: jax.Array) -> jax.Array:
  """Returns `x`, marked as what the backward pass needs and is dear to make again.

  Models mark results of matrix products and of exchanges; the policy "residuals" keeps these.
  """
  return checkpoint_name(x, _RESIDUAL)


class SavedLayer(NamedTuple):
  """A layer as two lists of functions, one for each step and direction.

  Attributes:
    forward: of each step, (weights, shared, carry, inputs) -> (carry, kept); `kept` is its part of
      what waits, a list of arrays.
    saved: shapes of what waits, for each step a list of ShapeDtypeStruct.
    restore: (weights, shared, inputs, saved) -> what each step's backward asks for.
    backward: of each step, (weights, shared, inputs, restored, gradients) -> (of_parameters,
      gradients). `restored` is what `restore` returned, `gradients` are those of the floats that
      the step returned, of the last step (gy's leaves, the statistics'); it returns those of the
      floats that the step took, and the gradient of each leaf of (weights, shared) that the step
      reads, by its number. To be called from the last step to the first.
    runs_again: whether `restore` runs steps again.
  """

  forward: tuple[Callable, ...]
  saved: tuple[list[jax.ShapeDtypeStruct], ...]
  restore: Callable
  backward: tuple[Callable, ...]
  runs_again: bool


class _Place(NamedTuple):
  """Where an array that a backward asks for is found: among what is given (step None), or what
  a step kept.
  """

  step: int | None
  index: int


class _Layout(NamedTuple):
  """Of one step: the tree of its vjp, where each leaf lies, and which leaves it keeps itself."""

  tree: Any
  places: list[_Place]
  kept: list[int]


def _keep_all(steps: tuple[Step, ...], example: tuple) -> SavedLayer:
  """Keeps all that differentiation asks for; nothing is computed again."""
  is_last = [False] * (len(steps) - 1) + [True]
  layouts: list[_Layout] = []

  def trace(weights, shared, x, inputs):
    given = jax.tree.leaves((weights, shared, inputs))
    found = {id(leaf): _Place(None, i) for i, leaf in enumerate(given)}
    carry, kept, alive = x, [], []
    for number in range(len(steps)):
      carry, leaves, tree = _split(steps[number], is_last[number], weights, shared, carry, inputs)
      alive.append(leaves)  # an id is an array's only while the array lives
      mine: list[int] = []
      for i, leaf in enumerate(leaves):
        if id(leaf) not in found:
          found[id(leaf)] = _Place(number, len(mine))
          mine.append(i)
      layouts.append(_Layout(tree, [found[id(leaf)] for leaf in leaves], mine))
      kept.append([leaves[i] for i in mine])
    return tuple(kept)

  saved = jax.eval_shape(trace, *example)

  def forward(number):
    def run(weights, shared, carry, inputs):
      carry, leaves, _ = _split(steps[number], is_last[number], weights, shared, carry, inputs)
      return carry, [leaves[i] for i in layouts[number].kept]

    return run

  def backward(number):
    tree, places, _ = layouts[number]

    def run(weights, shared, inputs, restored, gradients):
      given = jax.tree.leaves((weights, shared, inputs))
      leaves = [given[i] if step is None else restored[step][i] for step, i in places]
      of_used, gradients = jax.tree.unflatten(tree, leaves)(gradients)
      return dict(zip(steps[number].uses, of_used, strict=True)), gradients

    return run

  numbers = range(len(steps))
  return SavedLayer(
    tuple(map(forward, numbers)),
    saved,
    lambda weights, shared, inputs, saved: saved,
    tuple(map(backward, numbers)),
    runs_again=False,
  )


def _keep_named(steps: tuple[Step, ...], example: tuple) -> SavedLayer:
  """Keeps the values marked `residual` and what enters a step; computes the cheap rest again."""
  # What is kept comes out of the stash, which XLA cannot see through: barriers against finding in
  # the forward unit what the backward one makes again would only turn arrays to their layout.
  again = functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names(_RESIDUAL),
    prevent_cse=False,
  )
  remade = tuple(step._replace(run=again(step.run)) for step in steps)
  return _keep_all(remade, example)


def _keep_inputs(steps: tuple[Step, ...], example: tuple) -> SavedLayer:
  """Keeps the layer's input only; the backward unit computes the layer again."""
  whole = _keep_all(steps, example)
  x_leaves, x_tree = jax.tree.flatten(example[2])
  nothing_more = ([],) * (len(steps) - 1)

  def first(weights, shared, x, inputs):
    return whole.forward[0](weights, shared, x, inputs)[0], jax.tree.leaves(x)

  def later(run):
    return lambda *arguments: (run(*arguments)[0], [])

  def restore(weights, shared, inputs, saved):
    carry, restored = jax.tree.unflatten(x_tree, saved[0]), []
    for run in whole.forward:
      carry, kept = run(weights, shared, carry, inputs)
      restored.append(kept)
    return tuple(restored)

  forward = (first, *map(later, whole.forward[1:]))
  return SavedLayer(forward, (x_leaves, *nothing_more), restore, whole.backward, runs_again=True)


def _keep_exchanges(steps: tuple[Step, ...], example: tuple) -> SavedLayer:
  """Keeps the layer's input, what its collectives brought and where rows lie; the backward unit
  computes the rest again, and sends nothing but gathers inside a host.
  """
  whole = _keep_all(steps, example)
  num_x, x_tree = len(jax.tree.leaves(example[2])), jax.tree.structure(example[2])

  def again(weights, shared, x, inputs):
    """Returns what every step of `whole` keeps."""
    restored = []
    for run in whole.forward:
      x, kept = run(weights, shared, x, inputs)
      restored.append(kept)
    return tuple(restored)

  is_read = noted.is_read(again, example, _is_exchange)
  starts = [0]  # of each step's results among those of all

  def forward(number):
    run = noted.take(lambda *given: whole.forward[number](*given)[0], _is_exchange)

    def with_kept(weights, shared, carry, inputs):
      out, results = run(weights, shared, carry, inputs)
      if number + 1 == len(starts):
        starts.append(starts[number] + len(results))
      first = jax.tree.leaves(carry) if number == 0 else []
      mine = is_read[starts[number] : starts[number] + len(results)]
      return out, [*first, *(each for each, read in zip(results, mine, strict=True) if read)]

    return with_kept

  def restore(weights, shared, inputs, saved):
    x = jax.tree.unflatten(x_tree, saved[0][:num_x])
    kept = iter([*saved[0][num_x:], *itertools.chain(*saved[1:])])
    results = [next(kept) if read else None for read in is_read]
    return noted.put(again, _is_exchange, results)(weights, shared, x, inputs)

  forwards = tuple(map(forward, range(len(steps))))

  def trace(weights, shared, carry, inputs):
    saved = []
    for run in forwards:
      carry, kept = run(weights, shared, carry, inputs)
      saved.append(kept)
    return tuple(saved)

  saved = jax.eval_shape(trace, *example)
  return SavedLayer(forwards, saved, restore, whole.backward, runs_again=True)


def _is_exchange(eqn) -> bool:
  """Says whether an equation makes what `_keep_exchanges` keeps: a collective's result, but of a
  gather inside a host, or marked integers. Sums that are typed as the same on several devices are
  not: what comes out of the stash is typed as different.
  """
  if any(len(v.aval.manual_axis_type.varying) < len(ALL) for v in eqn.outvars):
    return False
  if eqn.primitive.name == _NAME:
    return eqn.params["name"] == _RESIDUAL and eqn.outvars[0].aval.dtype.kind in "iub"
  return is_collective(eqn) and not (eqn.primitive.name == "all_gather" and is_inside(eqn))


SAVE: dict[str, Callable[[tuple[Step, ...], tuple], SavedLayer]] = {
  "inputs": _keep_inputs,
  "exchanges": _keep_exchanges,
  "residuals": _keep_named,
  "everything": _keep_all,
}


def _split(step, is_last, weights, shared, carry, inputs):
  """Returns the step's carry, and the leaves and tree of its vjp; of the last step's carry the
  report is not differentiated.
  """
  leaves, carry_tree = jax.tree.flatten(carry)
  parameters, parameters_tree = jax.tree.flatten((weights, shared))
  is_float = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
  layout: dict[str, Any] = {}

  def differentiable(used, floats):
    given = iter(floats)
    merged = [next(given) if f else leaf for f, leaf in zip(is_float, leaves, strict=True)]
    of_step = dict(zip(step.uses, used, strict=True))
    filled = [of_step.get(i, leaf) for i, leaf in enumerate(parameters)]
    weights, shared = jax.tree.unflatten(parameters_tree, filled)
    out = step.run(weights, shared, jax.tree.unflatten(carry_tree, merged), inputs)
    end = len(jax.tree.leaves(out[:2] if is_last else out))
    out_leaves, layout["tree"] = jax.tree.flatten(out)
    layout["is_float"] = [
      i < end and jnp.issubdtype(leaf.dtype, jnp.inexact) for i, leaf in enumerate(out_leaves)
    ]
    pick = lambda wanted: [
      leaf for f, leaf in zip(layout["is_float"], out_leaves, strict=True) if f == wanted
    ]
    return pick(True), pick(False)

  used = [parameters[i] for i in step.uses]
  floats = [leaf for f, leaf in zip(is_float, leaves, strict=True) if f]
  out_floats, vjp, out_others = jax.vjp(differentiable, used, floats, has_aux=True)
  out_floats, out_others = iter(out_floats), iter(out_others)
  out = [next(out_floats) if f else next(out_others) for f in layout["is_float"]]
  return jax.tree.unflatten(layout["tree"], out), *jax.tree.flatten(vjp)
