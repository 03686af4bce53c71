"""A model for the executor's tests, no transformer: all that `Functions` allows, little else.

Each layer is a residual tanh network whose hidden units lie along `tensor`; sequences of the
micro-batch along `expert`. The shared gain is used in the embedding, in every layer and in the
head, so its gradient comes from all three. The head gives loss and outputs, the layers an auxiliary
loss and a report. `reference` is the same model with no mesh and no pipeline.

`python -m tests.pipeline.toy '[case, ...]'` prints the differences of cases as JSON, for meshes
that need more devices than pytest has. Letters: B rows of a micro-batch, D width, F hidden units,
V table entries; b, d, f this device's share.
"""

import json
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.parallel import collectives
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel.axes import ALL, DATA, EXPERT, STAGE, TENSOR, TOKENS
from moe_jax.pipeline import executor
from moe_jax.pipeline.functions import Functions
from moe_jax.pipeline.saving import residual
from moe_jax.pipeline.schedules import SCHEDULES, forward_only
from moe_jax.pipeline.table import Table

NUM_ROWS, WIDTH, HIDDEN, NUM_ENTRIES = 4, 8, 16, 16


class Case(NamedTuple):
  """What is run: the schedule and its sizes, what is saved, ranks along the other axes."""

  schedule: str
  stages: int
  micro_batches: int
  chunks: int = 1
  save: str = "inputs"
  expert: int = 1
  tensor: int = 1
  layers_per_chunk: int = 1

  @property
  def layers(self) -> int:
    return self.stages * self.chunks * self.layers_per_chunk

  def table(self) -> Table:
    return SCHEDULES[self.schedule](self.stages, self.micro_batches, self.chunks)


class Inputs(NamedTuple):
  """Of a micro-batch: tokens [B], int32; targets [B, D]; weights [B]."""

  tokens_B: jax.Array
  targets_BD: jax.Array
  weights_B: jax.Array


LAYER_SPECS = {"into": P(STAGE, None, TENSOR), "back": P(STAGE, TENSOR, None)}
SHARED_SPECS = {"table": P(None, TENSOR), "gain": P(TENSOR)}
INPUT_SPECS = Inputs(P(None, EXPERT), P(None, EXPERT, TENSOR), P(None, EXPERT))


def make(layers: int, micro_batches: int, *, rows=NUM_ROWS, width=WIDTH, hidden=HIDDEN, seed=0):
  """Returns (layers, shared, inputs) as numpy; layers in logical order."""
  random = np.random.default_rng(seed)
  normal = lambda *shape, std=1.0: random.normal(0.0, std, shape).astype(np.float32)
  weights = {
    "into": normal(layers, width, hidden, std=width**-0.5),
    # Deep stacks of larger updates amplify rounding: of 32 layers the reference's own gradients
    # in float32 were 1.4e-5 off those in float64, and are 2e-7 off so.
    "back": normal(layers, hidden, width, std=(hidden * layers) ** -0.5),
  }
  shared = {
    "table": normal(NUM_ENTRIES, width),
    "gain": random.uniform(0.5, 1.5, width).astype(np.float32),
  }
  inputs = Inputs(
    random.integers(0, NUM_ENTRIES, (micro_batches, rows), dtype=np.int32),
    normal(micro_batches, rows, width),
    random.uniform(0.1, 1.0, (micro_batches, rows)).astype(np.float32) / (micro_batches * rows),
  )
  return weights, shared, inputs


def functions(has_outputs: bool = True) -> Functions:
  """Returns the model as per-device functions; the head's outputs are its y, or none."""
  loss_only = lambda shared, y_bd, inputs: (_head(shared, y_bd, inputs)[0], ())
  head = _head if has_outputs else loss_only
  return Functions(_embed, _layer, _auxiliary, head, _add_embed_gradient)


def _add_embed_gradient(sums, shared, inputs, gx_bd):
  gx_bd = collectives.broadcast_from(gx_bd, STAGE, 0)
  _, vjp = jax.vjp(lambda shared: _embed(shared, inputs), shared)
  return jax.tree.map(lambda total, more: total + more.astype(total.dtype), sums, vjp(gx_bd)[0])


def _embed(shared, inputs):
  # Each stage looks up every so many-th entry.
  is_mine_b = inputs.tokens_B % jax.lax.axis_size(STAGE) == jax.lax.axis_index(STAGE)
  rows_bd = shared["table"][inputs.tokens_B] * shared["gain"][None, :]
  return jax.lax.psum(jnp.where(is_mine_b[:, None], rows_bd, 0.0), STAGE)


def _layer(weights, shared, x_bd, inputs):
  hidden_bf = residual(jnp.tanh(collectives.gather(x_bd, TENSOR, 1) @ weights["into"]))
  update_bd = collectives.reduce_scatter(hidden_bf @ weights["back"], TENSOR, 1)
  scale_bd = shared["gain"][None, :] * (1.0 + inputs.weights_B)[:, None]
  y_bd = x_bd + update_bd * scale_bd
  statistics = jnp.sum(jnp.sin(y_bd) * shared["gain"][None, :], dtype=jnp.float32)
  report = {"positive": jnp.sum(y_bd > 0, dtype=jnp.int32), "sum": jnp.sum(y_bd)}
  return y_bd, statistics, report


def _auxiliary(statistics_n):
  return 0.01 * statistics_n.sum(), statistics_n


def _head(shared, y_bd, inputs):
  error_bd = y_bd * shared["gain"][None, :] - inputs.targets_BD
  loss = jnp.sum(inputs.weights_B[:, None] * error_bd**2, dtype=jnp.float32)
  return loss / jax.lax.axis_size(STAGE), y_bd


def reference(weights, shared, inputs: Inputs):
  """Returns (total loss, {loss, auxiliary_loss, reports, outputs}): no mesh and no pipeline.

  All micro-batches at once, since no row meets another.
  """
  gain_UBD = shared["gain"][None, None, :]
  weights_UBD = inputs.weights_B[:, :, None]
  x_UBD = shared["table"][inputs.tokens_B] * gain_UBD
  statistics, positive, total = [], [], []
  for into_DF, back_FD in zip(weights["into"], weights["back"], strict=True):
    x_UBD = x_UBD + (jnp.tanh(x_UBD @ into_DF) @ back_FD) * gain_UBD * (1.0 + weights_UBD)
    statistics.append(jnp.sum(jnp.sin(x_UBD) * gain_UBD))
    positive.append(jnp.sum(x_UBD > 0))
    total.append(jnp.sum(x_UBD))
  loss = jnp.sum(weights_UBD * (x_UBD * gain_UBD - inputs.targets_BD) ** 2)
  auxiliary_loss = 0.01 * sum(statistics)
  parts = {
    "loss": loss,
    "auxiliary_loss": auxiliary_loss,
    "auxiliary": jnp.stack(statistics),
    "reports": {"positive": jnp.stack(positive), "sum": jnp.stack(total)},
    "outputs": x_UBD,
  }
  return loss + auxiliary_loss, parts


def placement(table: Table, layers: int) -> np.ndarray:
  """Returns the logical layer at each place of the stored order."""
  per_chunk = layers // table.num_virtual_stages
  return (table.layer_order[:, None] * per_chunk + np.arange(per_chunk)).reshape(-1)


def place(mesh, table: Table, weights, shared, inputs: Inputs):
  """Returns the arrays on the mesh, layers in the table's order."""
  order = placement(table, weights["into"].shape[0])
  put = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
  return (
    {name: put(leaf[order], LAYER_SPECS[name]) for name, leaf in weights.items()},
    {name: put(leaf, SHARED_SPECS[name]) for name, leaf in shared.items()},
    jax.tree.map(put, inputs, INPUT_SPECS),
  )


def make_mesh(case: Case) -> jax.sharding.Mesh:
  sizes = config.Mesh(expert=case.expert, tensor=case.tensor, stage=case.stages)
  return mesh_lib.make(sizes, jax.devices()[: sizes.num_devices])


def pipelined(mesh, table: Table, save: str = "inputs", has_outputs: bool = True):
  """Returns (layers, shared, inputs) -> Result of global arrays, by the executor.

  The outputs of all stages stand beside each other, [U, B, stages * D].
  """
  model = functions(has_outputs)

  def region(weights, shared, inputs):
    weights, shared = collectives.varying((weights, shared))
    result = executor.run(model, table, weights, shared, inputs, save=save)
    every = ALL
    gradients = result.gradients
    if gradients is not None:
      gradients = (
        jax.lax.psum(gradients[0], (DATA, EXPERT)),
        jax.lax.psum(gradients[1], (DATA, STAGE, EXPERT)),
      )
    return result._replace(
      loss=jax.lax.psum(result.loss, every),
      auxiliary_loss=jax.lax.psum(result.auxiliary_loss, every),
      auxiliary=jax.lax.psum(result.auxiliary, TOKENS),
      reports=jax.lax.psum(result.reports, TOKENS),
      gradients=gradients,
    )

  out_specs = executor.Result(
    loss=P(),
    auxiliary_loss=P(),
    auxiliary=P(STAGE),
    reports=P(STAGE),
    outputs=P(None, (DATA, EXPERT), (STAGE, TENSOR)) if has_outputs else (),
    gradients=None if table.is_forward_only else (LAYER_SPECS, SHARED_SPECS),
    left=[],
    ticks=P(),
  )
  return jax.shard_map(
    region, mesh=mesh, in_specs=(LAYER_SPECS, SHARED_SPECS, INPUT_SPECS), out_specs=out_specs
  )


def differences(case: Case, is_forward_only: bool = False) -> dict[str, float]:
  """Returns the relative L2 of all that a step returns against `reference`.

  Raises:
    AssertionError: the ticks or the integer reports differ.
  """
  table = forward_only(case.table()) if is_forward_only else case.table()
  arrays = make(case.layers, case.micro_batches)
  gradient = jax.value_and_grad(reference, argnums=(0, 1), has_aux=True)
  (_, expected), gradients = jax.jit(gradient)(*arrays)
  mesh = make_mesh(case)
  result = jax.jit(pipelined(mesh, table, case.save))(*place(mesh, table, *arrays))
  assert int(result.ticks) == table.num_ticks
  logical = np.argsort(placement(table, case.layers))
  reports = {name: np.asarray(leaf)[logical] for name, leaf in result.reports.items()}
  np.testing.assert_array_equal(reports["positive"], expected["reports"]["positive"])
  found = {
    "loss": _relative_l2(result.loss, expected["loss"]),
    "auxiliary_loss": _relative_l2(result.auxiliary_loss, expected["auxiliary_loss"]),
    "auxiliary": _relative_l2(np.asarray(result.auxiliary)[logical], expected["auxiliary"]),
    "report": _relative_l2(reports["sum"], expected["reports"]["sum"]),
    "outputs": _relative_l2(result.outputs, np.tile(expected["outputs"], (1, 1, case.stages))),
  }
  if is_forward_only:
    assert result.gradients is None
    return found
  for name, leaf in result.gradients[0].items():
    found[f"layers/{name}"] = _relative_l2(np.asarray(leaf)[logical], gradients[0][name])
  for name, leaf in result.gradients[1].items():
    found[name] = _relative_l2(leaf, gradients[1][name])
  return found


def _relative_l2(found, expected) -> float:
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  assert found.shape == expected.shape, (found.shape, expected.shape)
  return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
  print(json.dumps([differences(Case(**case)) for case in json.loads(sys.argv[1])]))
