"""The pipeline one writes without an executor: a scan over ticks, differentiated by `jax.grad`.

GPipe: each stage runs forward what its neighbour sent, in micro-batches + stages - 1 ticks, every
layer recomputed in the backward pass (`jax.checkpoint`); embeddings before, heads after the scan.
The bar that the executor's speed is held against, of the same `Functions`.
"""

import jax
import jax.numpy as jnp

from moe_jax.parallel import collectives
from moe_jax.parallel.axes import ALL, SEQUENCES, STAGE
from moe_jax.pipeline.executor import Functions, Result
from tests.pipeline import toy


def run(functions: Functions, table, layers, shared, inputs, *, save="inputs", gradient_dtype=None):
  """Returns what `executor.run` does of a model without reports, for it to stand in its place.

  Args:
    table: of gpipe, of which the number of micro-batches counts.
    save, gradient_dtype: as this pipeline has them, layer inputs and the parameters' own.
  """
  assert save == "inputs" and gradient_dtype in (None, jax.tree.leaves(layers)[0].dtype)
  num_micro_batches, zero = table.num_micro_batches, collectives.varying(jnp.zeros(()))
  share = lambda trees: _loss(functions, num_micro_batches, *trees, inputs)
  loss, gradients = jax.value_and_grad(share)((layers, shared))
  ticks = jnp.asarray(num_micro_batches + jax.lax.axis_size(STAGE) - 1, jnp.int32)
  return Result(loss, zero, (), (), (), gradients, [], ticks)


def pipelined(mesh, functions: Functions, table):
  """Returns (layers, shared, inputs) of the toy -> (total loss, gradients of layers and shared)."""

  def region(weights, shared, inputs):
    found = run(functions, table, *collectives.varying((weights, shared)), inputs)
    g_layers, g_shared = found.gradients
    gradients = (jax.lax.psum(g_layers, SEQUENCES), jax.lax.psum(g_shared, (STAGE, *SEQUENCES)))
    return jax.lax.psum(found.loss, ALL), gradients

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

    def layer(x, layer_weights):
      y, statistics, _ = run_layer(layer_weights, shared, x, here)
      return y, statistics

    y, statistics = jax.lax.scan(layer, x, weights)
    auxiliary_loss += jnp.where(runs, functions.auxiliary(statistics)[0], 0.0)
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
