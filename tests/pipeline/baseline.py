"""The pipeline one writes without an executor: a scan over ticks, differentiated by `jax.grad`.

GPipe: each stage runs forward what its neighbour sent, in micro-batches + stages - 1 ticks, every
layer recomputed in the backward pass (`jax.checkpoint`); embeddings before, heads after the scan.
The bar that the executor's speed is held against, of the same `Functions`.
"""

import jax
import jax.numpy as jnp

from moe_jax.parallel import collectives
from moe_jax.parallel.axes import ALL, EXPERT, STAGE
from moe_jax.pipeline.executor import Functions
from tests.pipeline import toy


def pipelined(mesh, functions: Functions, num_micro_batches: int):
  """Returns (layers, shared, inputs) -> (total loss, gradients of layers and shared)."""

  def region(weights, shared, inputs):
    trees = collectives.varying((weights, shared))
    share = lambda trees: _loss(functions, num_micro_batches, *trees, inputs)
    loss, (g_layers, g_shared) = jax.value_and_grad(share)(trees)
    gradients = (jax.lax.psum(g_layers, EXPERT), jax.lax.psum(g_shared, (STAGE, EXPERT)))
    return jax.lax.psum(loss, ALL), gradients

  specs = (toy.LAYER_SPECS, toy.SHARED_SPECS)
  return jax.shard_map(
    region,
    mesh=mesh,
    in_specs=(*specs, toy.INPUT_SPECS),
    out_specs=(jax.sharding.PartitionSpec(), specs),
  )


def _loss(functions: Functions, num_micro_batches: int, weights, shared, inputs):
  """Returns this device's share of the loss, auxiliary losses included."""
  stage, num_stages = jax.lax.axis_index(STAGE), jax.lax.axis_size(STAGE)
  x_U = jax.lax.map(lambda micro: collectives.varying(functions.embed(shared, micro)), inputs)
  run_layer = jax.checkpoint(functions.layer)

  def tick(carry, t):
    arrived, auxiliary_loss = carry
    micro = t - stage
    runs = (micro >= 0) & (micro < num_micro_batches)
    here = jax.tree.map(lambda leaf: leaf[jnp.clip(micro, 0, num_micro_batches - 1)], inputs)
    x = jnp.where(stage == 0, x_U[jnp.minimum(t, num_micro_batches - 1)], arrived)

    def layer(carry, layer_weights):
      x, total = carry
      y, auxiliary, _ = run_layer(layer_weights, shared, x, here)
      return (y, total + jnp.where(runs, auxiliary, 0.0)), None

    (y, auxiliary_loss), _ = jax.lax.scan(layer, (x, auxiliary_loss), weights)
    return (collectives.shift(y, STAGE, 1), auxiliary_loss), y

  start = collectives.varying((jnp.zeros(x_U.shape[1:]), jnp.zeros(())))
  ticks = jnp.arange(num_micro_batches + num_stages - 1)
  (_, auxiliary_loss), y_Q = jax.lax.scan(tick, start, ticks)

  @jax.checkpoint
  def head(y, micro):
    return functions.head(shared, collectives.broadcast_from(y, STAGE, num_stages - 1), micro)[0]

  def add_head(total, y_and_micro):
    return total + head(*y_and_micro), None

  zero = collectives.varying(jnp.zeros(()))
  loss, _ = jax.lax.scan(add_head, zero, (y_Q[num_stages - 1 :], inputs))
  return loss + auxiliary_loss
