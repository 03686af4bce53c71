"""No device of XLA:CPU may start two collectives in an order of its own."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.parallel import collectives
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel.axes import ALL
from moe_jax.rehearse import lowering
from moe_jax.train import optimizer, step
from tests import runs
from tests.contracts import overtaking

CASES = [
  {},
  {"mesh": {"expert": 1, "stage": 4}},  # one layer a chunk, so none of its collectives in a loop
  {"pipeline": {"schedule": "interleaved", "chunks": 2}},
  {"mesh": {"expert": 8, "tensor": 1, "stage": 1}},
  # Copies: beside the loop over a chunk's four layers weights come, or gradients leave.
  {
    "model": {"layers": 8},
    "mesh": {"expert": 2, "tensor": 1, "stage": 1, "data": 4},
    "pipeline": {"schedule": "interleaved", "chunks": 2, "micro_batches": 1, "halves": True},
    "moe": {"expert_ranks_per_host": 2},
    "train": {"batch": 16},
  },
]


@pytest.mark.parametrize("sections", CASES)
def test_a_train_step(sections):
  settings = runs.settings(**sections)
  mesh = mesh_lib.make(settings.mesh, jax.devices()[:8])
  with jax.numpy_dtype_promotion("standard"):  # as optax wants it
    text = lowering.train(settings, mesh).text
  assert overtaking.pairs(text) == []


@pytest.mark.parametrize("sections", CASES[1:2])
def test_an_evaluation_and_the_engines_programs(sections):
  settings = runs.settings(**sections)
  mesh = mesh_lib.make(settings.mesh, jax.devices()[:8])
  state = lowering.abstract_state(settings, mesh, optimizer.make(settings.train))
  inputs = lowering.abstract_inputs(settings, mesh)
  evaluation = jax.jit(step.evaluate_step(settings, mesh)).lower(state, inputs).compile()
  assert overtaking.pairs(evaluation.as_text()) == []
  assert overtaking.pairs(lowering.prefill(settings, mesh).text) == []
  assert overtaking.pairs(lowering.decode(settings, mesh).text) == []


PROGRAM = """HloModule two_sums, is_scheduled=true

%body (turn: (f32[4], f32[4])) -> (f32[4], f32[4]) {
  %turn = (f32[4]{0}, f32[4]{0}) parameter(0)
  %a.1 = f32[4]{0} get-tuple-element(%turn), index=0
  %b.1 = f32[4]{0} get-tuple-element(%turn), index=1
  %sum.1 = f32[4]{0} all-reduce(%a.1), replica_groups={{0,1}}, to_apply=%add
  ROOT %next = (f32[4]{0}, f32[4]{0}) tuple(%sum.1, %b.1)
}

ENTRY %main (a: f32[4], b: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %b = f32[4]{0} parameter(1)
  %start = (f32[4]{0}, f32[4]{0}) tuple(%a, %b)
  %loop = (f32[4], f32[4]) while(%start), condition=%c, body=%body, metadata={op_name="loop"}
  %found = f32[4]{0} get-tuple-element(%loop), index=INDEX
  ROOT %sum = f32[4]{0} all-reduce(%found), to_apply=%add, metadata={op_name="sum"}
}

%c (turn: (f32[4], f32[4])) -> pred[] {
  %turn.1 = (f32[4]{0}, f32[4]{0}) parameter(0)
  ROOT %always = pred[] constant(true)
}
"""


@pytest.mark.parametrize(("element", "found"), [(0, []), (1, [("loop", "sum")])])
def test_what_a_loop_only_hands_through_does_not_wait_for_it(element, found):
  assert overtaking.pairs(PROGRAM.replace("INDEX", str(element))) == found


def waiting(num_devices):
  """Returns `collectives.after` inside a region on so many devices."""
  mesh = mesh_lib.make(config.Mesh(expert=num_devices), jax.devices()[:num_devices])
  after = lambda first, then: collectives.after(*collectives.varying((first, then)))
  return jax.shard_map(after, mesh=mesh, in_specs=(P(), P()), out_specs=P(ALL))


@pytest.mark.parametrize("value", [0.0, -1.5, float("inf"), float("nan")])
def test_to_wait_changes_nothing(value):
  found = jax.jit(waiting(2))(jnp.full(3, value), jnp.arange(4))
  assert found.tolist() == [0, 1, 2, 3] * 2


@pytest.mark.parametrize(("num_devices", "adds"), [(1, False), (2, True)])
def test_one_device_waits_for_nothing(num_devices, adds):
  text = jax.jit(waiting(num_devices)).lower(jnp.zeros(3), jnp.arange(4)).as_text()
  assert ("stablehlo.add" in text) == adds
