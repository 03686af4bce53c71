"""What a pipeline asks of a model: embed, layer and head, as per-device functions.

Knows shapes of calls; must not know schedules or models.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Tree = Any


class Functions(NamedTuple):
  """The model, as per-device functions; a loss is this device's share, to be summed over devices.

  Layers may add to the loss by a function of statistics that other devices' tokens enter too. Those
  of all layers of a stage are asked for at once, when the micro-batch is at its head: in one
  message, where each layer would send one, and before any backward unit needs the gradient.

  Attributes:
    embed: (shared, inputs) -> x, the same on every stage.
    layer: (weights of one layer, shared, x, inputs) -> (y, statistics, report); `statistics` is a
      small tree of floats, `report` one of numbers, summed over micro-batches and not
      differentiated.
    auxiliary: (statistics of n layers of one micro-batch, leaves [n, ...]) -> (loss, report of the
      layers, leaves [n, ...], not differentiated).
    head: (shared, y, inputs) -> (loss, outputs); `y` is the same on every stage, and `outputs` a
      tree that is returned for every micro-batch.
    add_embed_gradient: (sums, shared, inputs, gx) -> sums of gradients of `shared` and what this
      device has of the embedding's; `gx` counts on stage 0 alone. It may write where the sums lie.
  """

  embed: Callable[[Tree, Tree], Tree]
  layer: Callable[[Tree, Tree, Tree, Tree], tuple[Tree, Tree, Tree]]
  auxiliary: Callable[[Tree], tuple[jax.Array, Tree]]
  head: Callable[[Tree, Tree, Tree], tuple[jax.Array, Tree]]
  add_embed_gradient: Callable[[Tree, Tree, Tree, Tree], Tree]
