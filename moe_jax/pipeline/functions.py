"""What a pipeline asks of a model, as per-device functions, and what it makes of them.

Knows shapes of calls; must not know schedules or models.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from moe_jax.parallel import collectives
from moe_jax.parallel.axes import TENSOR
from moe_jax.pipeline import buffers

Tree = Any


class Halves(NamedTuple):
  """How a micro-batch falls into two halves that need nothing of each other.

  Attributes:
    split: of x or inputs -> those of either half.
    join: of either half's y -> that of the micro-batch.
    merge: (statistics, report) of either half -> those of the micro-batch.
  """

  split: Callable[[Tree], tuple[Tree, Tree]]
  join: Callable[[Tree, Tree], Tree]
  merge: Callable[[tuple, tuple], tuple]


class Functions(NamedTuple):
  """The model, as per-device functions; a loss is this device's share, to be summed over devices.

  Layers may add to the loss by a function of statistics that other devices' tokens enter too. Those
  of all layers of a stage are asked for at once, when the micro-batch is at its head: in one
  message, where each layer would send one, and before any backward unit needs the gradient. Without
  backward units those of all micro-batches are.

  Attributes:
    embed: (shared, inputs) -> x, the same on every stage.
    layer: (weights of one layer, shared, x, inputs) -> (y, statistics, report); `statistics` is a
      small tree of floats, `report` one of numbers, summed over micro-batches and not
      differentiated.
    auxiliary: (statistics, leaves [n, ...], each of a layer and micro-batch) -> (loss, report of
      each, leaves [n, ...], not differentiated).
    head: (shared, y, inputs) -> (loss, outputs); `y` is the same on every stage, and `outputs` a
      tree that is returned for every micro-batch.
    add_embed_gradient: (sums, shared, inputs, gx) -> sums of gradients of `shared` and what this
      device has of the embedding's; `gx` counts on stage 0 alone. It may write where the sums lie.
    halves: how a layer works a micro-batch as two halves; None where it works it as a whole.
    inside: mesh axes along which all devices share a host.
    with_stack: (inputs, weights of all layers of the stage, a layer's number) -> what the layer
      takes for inputs, where it reads weights in their stack too; None where it does not.
  """

  embed: Callable[[Tree, Tree], Tree]
  layer: Callable[[Tree, Tree, Tree, Tree], tuple[Tree, Tree, Tree]]
  auxiliary: Callable[[Tree], tuple[jax.Array, Tree]]
  head: Callable[[Tree, Tree, Tree], tuple[jax.Array, Tree]]
  add_embed_gradient: Callable[[Tree, Tree, Tree, Tree], Tree]
  halves: Halves | None = None
  inside: tuple[str, ...] = (TENSOR,)
  with_stack: Callable[[Tree, Tree, jax.Array], Tree] | None = None

  def inputs_of(self, inputs: Tree, layers: Tree, number: jax.Array | int) -> Tree:
    """Returns what a layer takes for inputs.

    Args:
      inputs: of the micro-batch.
      layers: weights of all layers of the stage.
      number: of the layer.
    """
    return inputs if self.with_stack is None else self.with_stack(inputs, layers, number)


class Result(NamedTuple):
  """What a step leaves on this device.

  Attributes:
    loss: this device's share of the loss without auxiliary losses, float32.
    auxiliary_loss: this device's share of the auxiliary losses, float32.
    auxiliary: what those reported of each layer, [layers of this stage, ...], summed over
      micro-batches.
    reports: the layers' reports, likewise.
    outputs: the head's outputs, [micro-batches, ...].
    gradients: (layers, shared) as the parameters, in `gradient_dtype`, this device's share; of
      layers that left the sum. None if forward-only.
    left: of the gradients that the pipeline sums, those of the layers that are not summed yet
      (`reduction.completed`).
    ticks: how many ticks ran, int32.
  """

  loss: jax.Array
  auxiliary_loss: jax.Array
  auxiliary: Tree
  reports: Tree
  outputs: Tree
  gradients: tuple[Tree, Tree] | None
  left: list[jax.Array]
  ticks: jax.Array


def example(functions: Functions, weights: Any, shared: Callable[[], Tree], inputs: Tree) -> tuple:
  """Returns shapes of what `Functions.layer` takes.

  Args:
    functions: the model.
    weights: of a stage, as a class of `weights` holds them.
    shared: gives the parameters outside the layers.
    inputs: leaves [micro-batches, ...].
  """
  embed = lambda: functions.embed(shared(), buffers.at(inputs, 0))
  x = jax.eval_shape(lambda: collectives.varying(embed()))
  first = lambda: functions.inputs_of(buffers.at(inputs, 0), weights.layers, 0)
  of_layer = lambda: (weights.layer(0), shared(), collectives.varying(first()))
  weights, shared, inputs = jax.eval_shape(of_layer)
  return weights, shared, x, inputs
