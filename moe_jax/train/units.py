"""The units of a tick as programs of their own, so that each can be timed alone.

A schedule's bubble is counted in the time of its units (`pipeline.table.Table.bubble_fraction`);
these are the same functions that the executor calls, one micro-batch and one chunk at a time. Must
not know clocks or files.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.model import transformer
from moe_jax.parallel import collectives
from moe_jax.parallel.axes import ALL, STAGE
from moe_jax.pipeline.saving import SAVE
from moe_jax.pipeline.steps import whole
from moe_jax.train import step


def programs(settings: config.Config, mesh: Mesh) -> dict[str, Callable]:
  """Returns jitted unit programs by kind, in an order in which each can take what others returned.

  Each takes (parameters in the compute dtype, inputs of the step) and arrays that stand one to a
  device along a leading dimension, [devices, ...]; so do the results:

    embed() -> x;  forward(x) -> (y, saved);  head(y) -> (loss, gradient, gy);
    backward(saved, gy) -> (gradient, gx);  embed_gradient(gx) -> gradient

  Communication: that of the unit; the head's includes the broadcast of `y` from stage 0, of a
  tied table the embedding gradient's that of `gx`. Transfers between stages, which hide behind
  units, are in none.
  """
  unit = _Units(settings)
  specs = (transformer.specs(settings.model), step.inputs_spec())

  def program(function):
    def region(parameters, inputs, *arrays):
      layers, shared = collectives.varying(parameters)
      first = lambda leaf: leaf[0]
      arrays = jax.tree.map(first, arrays)
      result = function(layers, shared, jax.tree.map(first, inputs), *arrays)
      return jax.tree.map(lambda leaf: leaf[None], collectives.varying(result))

    def call(parameters, inputs, *arrays):
      in_specs = (*specs, *[P(ALL)] * len(arrays))
      mapped = jax.shard_map(region, mesh=mesh, in_specs=in_specs, out_specs=P(ALL))
      return mapped(parameters, inputs, *arrays)

    return jax.jit(call)

  return {
    kind: program(getattr(unit, kind))
    for kind in ("embed", "forward", "head", "backward", "embed_gradient")
  }


class _Units:
  """The units as per-device functions."""

  def __init__(self, settings: config.Config):
    self.settings = settings
    self.functions = transformer.loss_functions(settings)
    self.num_layers = settings.model.layers // (settings.mesh.stage * settings.pipeline.chunks)

  def embed(self, layers, shared, inputs):
    return self.functions.embed(shared, inputs)

  def forward(self, layers, shared, inputs, x):
    layer = self._layer(layers, shared, inputs, x)

    def body(x, weights):
      (y, _, _), kept = layer.forward[0](weights, shared, x, inputs)
      return y, (kept,)

    return jax.lax.scan(body, x, self._chunk(layers))

  def head(self, layers, shared, inputs, y):
    y = collectives.broadcast_from(y, STAGE, 0)
    head = lambda shared, y: self.functions.head(shared, y, inputs)[0]
    loss, vjp = jax.vjp(head, shared, y)
    return loss, *vjp(collectives.varying(jnp.ones((), loss.dtype)))

  def backward(self, layers, shared, inputs, saved, gy):
    layer = self._layer(layers, shared, inputs, gy)
    one = jax.tree.map(lambda leaf: leaf[0], layers)
    _, of_layer, _ = jax.eval_shape(self.functions.layer, one, shared, gy, inputs)
    # Not zeros, which XLA would see through.
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), of_layer)
    g_statistics = jax.tree.leaves(collectives.varying(ones))

    def body(gy, given):
      weights, saved = given
      leaves, tree = jax.tree.flatten(gy)
      restored = layer.restore(weights, shared, inputs, saved)
      of_parameters, gradients = layer.backward[0](
        weights, shared, inputs, restored, [*leaves, *g_statistics]
      )
      num_weights = len(jax.tree.leaves(weights))
      return jax.tree.unflatten(tree, gradients), [of_parameters[i] for i in range(num_weights)]

    gx, gradient = jax.lax.scan(body, gy, (self._chunk(layers), saved), reverse=True)
    return gradient, gx

  def embed_gradient(self, layers, shared, inputs, gx):
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shared)
    return self.functions.add_embed_gradient(zeros, shared, inputs, gx)

  def _chunk(self, layers):
    return jax.tree.map(lambda leaf: leaf[: self.num_layers], layers)

  def _layer(self, layers, shared, inputs, x):
    one = jax.tree.map(lambda leaf: leaf[0], layers)
    example = jax.eval_shape(lambda: (one, shared, x, inputs))
    return SAVE[self.settings.pipeline.save]((whole(self.functions.layer, example),), example)
