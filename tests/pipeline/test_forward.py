"""The forward-only executor against a serial loop: state in place, a carry from head to embed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.parallel import collectives
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel.axes import STAGE
from moe_jax.pipeline import forward
from moe_jax.pipeline.schedules import SCHEDULES, forward_only

L, D = 8, 3
CASES = [
  *(("1f1b", p, m, 1) for p, m in itertools.product((1, 2, 4), (1, 4, 6))),
  ("gpipe", 4, 5, 1),
  ("interleaved", 2, 4, 4),
  ("interleaved", 4, 8, 2),
]


def serial(weights_LD, inputs_U, turns):
  """Returns (outputs, log): one micro-batch after the other; a head's output begins the next turn.

  A layer multiplies, and adds how often its micro-batch's row of the log was written before.
  """
  U = len(inputs_U)
  token_U, log_LU, outputs = inputs_U.copy(), np.zeros((L, U)), []
  for turn in range(turns * U):
    u = turn % U
    x_D = np.full(D, token_U[u])
    for l in range(L):
      x_D = x_D * weights_LD[l] + log_LU[l, u]
      log_LU[l, u] += 1
    token_U[u] = np.tanh(x_D.sum())
    outputs.append(x_D)
  return np.array(outputs), log_LU


@pytest.mark.parametrize(("schedule", "stages", "micro_batches", "chunks"), CASES)
def test_equals_a_serial_loop(schedule, stages, micro_batches, chunks):
  turns = 3 if micro_batches % stages == 0 else 1
  table = forward_only(SCHEDULES[schedule](stages, micro_batches * turns, chunks))
  sizes = config.Mesh(stage=stages)
  mesh = mesh_lib.make(sizes, jax.devices()[:stages])
  per_chunk = L // (stages * chunks)
  order = (table.layer_order[:, None] * per_chunk + np.arange(per_chunk)).reshape(-1)
  random = np.random.default_rng(0)
  weights_LD = random.uniform(0.5, 1.1, (L, D)).astype(np.float32)
  inputs_U = random.normal(size=micro_batches).astype(np.float32)

  def layer(layers, index, shared, x_D, micro, carry, log_lU, runs):
    y_D = x_D * layers[index] + log_lU[index, micro]
    written = log_lU.at[index, jnp.where(runs, micro, micro_batches)].add(1.0, mode="drop")
    return y_D, written, jnp.int32(1)

  def head(shared, y_D, micro, token_U):
    return token_U.at[micro].set(jnp.tanh(y_D.sum())), y_D

  functions = forward.Functions(
    embed=lambda shared, micro, token_U: jnp.full(D, token_U[micro]), layer=layer, head=head
  )

  def region(layers, inputs):
    layers, inputs = collectives.varying((layers, inputs))
    turn = jnp.arange(micro_batches * turns, dtype=jnp.int32) % micro_batches
    log_lU = collectives.varying(jnp.zeros((L // stages, micro_batches)))
    found = forward.run(functions, table, layers, jnp.zeros(()), turn, inputs, log_lU)
    same = lambda leaf: jax.lax.pmax(leaf, mesh.axis_names)
    log_lU, reports_l = (
      jax.lax.pmax(leaf, tuple(name for name in mesh.axis_names if name != STAGE))
      for leaf in (found.state, found.reports)
    )
    return same(found.outputs), log_lU, reports_l, same(found.carry), found.ticks

  run = jax.shard_map(
    region, mesh=mesh, in_specs=(P(STAGE), P()), out_specs=(P(), P(STAGE), P(STAGE), P(), P())
  )
  outputs, log_LU, reports_L, tokens_U, ticks = jax.jit(run)(weights_LD[order], inputs_U)
  expected, expected_log = serial(weights_LD, inputs_U, turns)
  np.testing.assert_allclose(outputs, expected, rtol=1e-5)
  np.testing.assert_array_equal(log_LU, expected_log[order])
  np.testing.assert_array_equal(reports_L, micro_batches * turns)
  np.testing.assert_allclose(tokens_U, np.tanh(expected[-micro_batches:].sum(1)), rtol=1e-5)
  assert ticks == table.num_ticks


def test_decoding_never_drains_the_pipeline():
  """With as many micro-batches as stages, all stages work but for the first and last ticks."""
  for stages, chunks in itertools.product((1, 2, 4), (1, 2)):
    table = forward_only(SCHEDULES["interleaved"](stages, stages * 5, chunks))
    is_made_U, begins_U = table.head_tick_U, table.forward_tick_UW[:, 0]
    assert (is_made_U[:-stages] <= begins_U[stages:]).all()
    work = stages * 5 * chunks
    assert (table.forward_micro_QZ >= 0).sum(0).tolist() == [work] * stages
    assert (table.forward_micro_QZ >= 0).any(1).sum() == work + stages - 1


def test_a_table_with_backward_units_is_refused():
  table = SCHEDULES["1f1b"](1, 1, 1)
  with pytest.raises(ValueError, match="the schedule 1f1b has backward units; give"):
    forward.run(forward.Functions(None, None, None), table, None, None, None)
