"""What one layer keeps between its forward and its backward unit, by policy.

A layer's backward is `jax.vjp` of that layer, split in two: the forward unit returns what must
wait, the backward unit takes it. What is a parameter or an input is not kept: the backward unit is
handed those again. Knows a layer as a function; must not know schedules or models.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

_RESIDUAL = "residual"


def residual(x: jax.Array) -> jax.Array:
  """Returns `x`, marked as what the backward pass needs and is dear to make again.

  Models mark results of matrix products and of exchanges; the policy "residuals" keeps these.
  """
  return checkpoint_name(x, _RESIDUAL)


class SavedLayer(NamedTuple):
  """A layer as two functions.

  Attributes:
    forward: (weights, shared, x, inputs) -> (y, auxiliary_loss, report, saved).
    backward: (weights, shared, inputs, saved, gy, g_auxiliary) -> (g_weights, g_shared, gx).
    saved: shapes of what waits, a list of ShapeDtypeStruct.
  """

  forward: Callable
  backward: Callable
  saved: list[jax.ShapeDtypeStruct]


def _save_inputs(layer: Callable, example: tuple) -> SavedLayer:
  """Keeps the layer's input only; the backward unit computes the layer again."""
  _, _, x, _ = example
  x_leaves, x_tree = jax.tree.flatten(x)

  def forward(weights, shared, x, inputs):
    return *layer(weights, shared, x, inputs), jax.tree.leaves(x)

  def backward(weights, shared, inputs, saved, gy, g_auxiliary):
    def differentiable(weights, shared, x):
      y, auxiliary_loss, _ = layer(weights, shared, x, inputs)
      return y, auxiliary_loss

    _, vjp = jax.vjp(differentiable, weights, shared, jax.tree.unflatten(x_tree, saved))
    return vjp((gy, g_auxiliary))

  return SavedLayer(forward, backward, x_leaves)


def _save_named(layer: Callable, example: tuple) -> SavedLayer:
  """Keeps the values marked `residual` and the layer's input; computes the cheap rest again."""
  policy = jax.checkpoint_policies.save_only_these_names(_RESIDUAL)
  return _save_everything(jax.checkpoint(layer, policy=policy), example)


def _save_everything(layer: Callable, example: tuple) -> SavedLayer:
  """Keeps all that differentiation asks for; nothing is computed again."""
  layout: dict[str, Any] = {}

  def split(weights, shared, x, inputs):
    def differentiable(weights, shared, x):
      y, auxiliary_loss, report = layer(weights, shared, x, inputs)
      return (y, auxiliary_loss), report

    (y, auxiliary_loss), vjp, report = jax.vjp(differentiable, weights, shared, x, has_aux=True)
    leaves, tree = jax.tree.flatten(vjp)
    given = jax.tree.leaves((weights, shared, inputs))
    # A residual that is one of the arguments is found again by its place among them.
    places = [next((i for i, g in enumerate(given) if g is leaf), None) for leaf in leaves]
    saved = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
    layout.update(tree=tree, places=places)
    return y, auxiliary_loss, report, saved

  saved = jax.eval_shape(split, *example)[3]
  tree, places = layout["tree"], layout["places"]

  def backward(weights, shared, inputs, saved, gy, g_auxiliary):
    given, waiting = jax.tree.leaves((weights, shared, inputs)), iter(saved)
    leaves = [next(waiting) if place is None else given[place] for place in places]
    return jax.tree.unflatten(tree, leaves)((gy, g_auxiliary))

  return SavedLayer(split, backward, saved)


SAVE: dict[str, Callable[[Callable, tuple], SavedLayer]] = {
  "inputs": _save_inputs,
  "residuals": _save_named,
  "everything": _save_everything,
}
