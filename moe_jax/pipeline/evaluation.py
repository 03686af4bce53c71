"""The forward passes of a step alone: losses and reports, by a forward-only schedule.

Losses add up in what `pipeline.forward` hands on from head to head, and statistics of layers in
its state. Must not know the model: it is given `functions.Functions`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.parallel import collectives
from moe_jax.pipeline import buffers, forward
from moe_jax.pipeline.functions import Functions, Result, example
from moe_jax.pipeline.table import Table
from moe_jax.pipeline.weights import Whole

Tree = Any


def evaluate(
  functions: Functions, table: Table, layers: Tree, shared: Tree, inputs: Tree
) -> Result:
  """Returns the result of the forward units; the auxiliary losses of all micro-batches are asked
  for at once, at the end.

  Args:
    functions: the model.
    table, layers, shared, inputs: as `forward.run` takes them.

  Communication: that of `forward.run` and of `Functions.auxiliary`.
  """

  def layer(layers, index, shared, x, inputs, loss, statistics, runs):
    inputs, micro = inputs
    inputs = functions.inputs_of(inputs, layers, index)
    y, new, report = functions.layer(buffers.at(layers, index), shared, x, inputs)
    return y, buffers.put_packed(statistics, (micro, index), new, runs), report

  def head(shared, y, inputs, loss):
    more, outputs = functions.head(shared, y, inputs[0])
    return loss + more, outputs

  def embed(shared, inputs, loss):
    return functions.embed(shared, inputs[0])

  num_micro_batches, num_layers = table.num_micro_batches, jax.tree.leaves(layers)[0].shape[0]
  given = example(functions, Whole(layers), lambda: shared, inputs)
  _, of_layer, _ = jax.eval_shape(functions.layer, *given)
  stacked = buffers.stacked(jax.eval_shape(buffers.packed, of_layer), num_micro_batches, num_layers)
  numbered = (inputs, jnp.arange(num_micro_batches, dtype=jnp.int32))
  found = forward.run(
    forward.Functions(embed, layer, head), table, layers, shared, numbered,
    carry=jnp.zeros((), jnp.float32), state=collectives.zeros_like(stacked),
  )  # fmt: skip
  # Each array as of so many layers.
  flat = [array.reshape(-1, array.shape[-1]) for array in found.state]
  flat = collectives.after((found.carry, found.outputs), flat)
  auxiliary_loss, auxiliary = functions.auxiliary(buffers.unpacked(flat, of_layer))
  of_micro_batches = lambda leaf: leaf.reshape(num_micro_batches, num_layers, *leaf.shape[1:])
  auxiliary = jax.tree.map(lambda leaf: of_micro_batches(leaf).sum(0), auxiliary)
  return Result(
    found.carry, auxiliary_loss, auxiliary, found.reports, found.outputs, None, [], found.ticks
  )
