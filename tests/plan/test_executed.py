"""The plan against the program that it plans: compiled for eight virtual devices, and read back.

Bytes along each axis from the compiled text, what a layer saves from the executor's own shapes.
Meshes, schedules, dispatches and policies are unlike each other; nothing here is a frozen figure.
"""

import collections

import jax
import jax.numpy as jnp
import pytest

from moe_jax.model import transformer
from moe_jax.moe import grouped, router, two_level
from moe_jax.moe import plan as plan_lib
from moe_jax.parallel import collectives
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.pipeline import executor, weights
from moe_jax.plan import links, program, saving, simulate, steps, units
from moe_jax.plan.hardware import CHIPS, Cluster
from moe_jax.plan.machine import Machine
from moe_jax.rehearse import lowering, ticks
from moe_jax.rehearse import program as rehearsed
from moe_jax.rehearse.exposure import Simulator
from moe_jax.rehearse.program import Collective
from moe_jax.train import step as step_lib
from tests import runs

CASES = {
  "1f1b 2x2x2": {},
  "interleaved 4x1x2, residuals": {
    "mesh": {"expert": 4, "tensor": 1},
    "pipeline": {"schedule": "interleaved", "chunks": 2, "save": "residuals"},
  },
  "interleaved 2x2x2, exchanges": {
    "pipeline": {"schedule": "interleaved", "chunks": 2, "save": "exchanges"},
  },
  "gpipe 1x2x4, everything": {
    "mesh": {"expert": 1, "stage": 4},
    "pipeline": {"schedule": "gpipe", "save": "everything"},
  },
  "one stage 4x2x1, flat, tied": {
    "mesh": {"expert": 4, "stage": 1},
    "moe": {"exchange": "flat"},
    "model": {"tied_embeddings": True},
  },
  "4x2x1, float8": {
    "mesh": {"expert": 4, "stage": 1},
    "moe": {"exchange": "hierarchical_float8"},
  },
  "1x8x1, fewer keys": {
    "mesh": {"expert": 1, "tensor": 8, "stage": 1},
    "pipeline": {"micro_batches": 8, "save": "residuals"},
  },
  "8x1x1, even rows": {
    "mesh": {"expert": 8, "tensor": 1, "stage": 1},
    "pipeline": {"save": "residuals"},
    "moe": {"capacity_factor": 1.0},
  },
  "2x2x1, 2 copies": {"mesh": {"stage": 1, "data": 2}},
  "interleaved 2x1x2, 2 copies": {
    "mesh": {"tensor": 1, "data": 2},
    "pipeline": {"schedule": "interleaved", "chunks": 2, "save": "residuals"},
  },
  # So many micro-batches that the last layers' gathers, which XLA leaves out, are few.
  "1x2x1, 4 copies, gathered ahead": {
    "mesh": {"expert": 1, "stage": 1, "data": 4},
    "pipeline": {"prefetch_layers": 1, "micro_batches": 32},
    "train": {"batch": 128},
  },
  "2x1x1, 4 copies, gathered ahead": {
    "mesh": {"tensor": 1, "stage": 1, "data": 4},
    "pipeline": {"prefetch_layers": 2, "micro_batches": 32, "save": "exchanges"},
    "train": {"batch": 256},
  },
  "one device, 8 copies": {"mesh": {"expert": 1, "tensor": 1, "stage": 1, "data": 8}},
}


# Of dispatches in rounds XLA:CPU makes loops of its own, whose turns no text says and in which
# nothing is sent.
DISPATCHED = {
  "dropless, two rounds": {
    "moe": {"dispatch": "dropless", "capacity_factor": 0.5}, "pipeline": {"save": "residuals"},
  },
  # A round of even shares is full, so that XLA:CPU, which sends all of it, sends no more than GPUs.
  "ragged, exchanges": {
    "moe": {"dispatch": "ragged", "capacity_factor": 1.0}, "pipeline": {"save": "exchanges"},
  },
  "flat, exchanges": {"moe": {"exchange": "flat"}, "pipeline": {"save": "exchanges"}},
  "gathered, inputs": {"moe": {"dispatch": "gathered"}},
  "two_level, two rounds, inputs": {
    "mesh": {"expert": 4, "tensor": 2, "stage": 1},
    "moe": {"dispatch": "two_level", "expert_ranks_per_host": 2, "capacity_factor": 0.5},
  },
  "two_level, two rounds, exchanges": {
    "mesh": {"expert": 4, "tensor": 2, "stage": 1},
    "moe": {"dispatch": "two_level", "expert_ranks_per_host": 2, "capacity_factor": 0.5},
    "pipeline": {"save": "exchanges"},
  },
}  # fmt: skip


def planned_bytes(settings):
  """Bytes sent by one device in a step, by the axes along which they go."""
  sent = collections.Counter()
  for times, blocks in program.counted(settings):
    for block in blocks:
      for op in block:
        size = steps.group_size(settings, op.step)
        if op.step.is_communication and size > 1:
          along = "+".join(a for a in op.step.axes if getattr(settings.mesh, a) > 1)
          sent[along] += times * links.bytes_sent(op.step.kind, op.step.operand_bytes, size)
  return sent


def compiled_bytes(settings):
  """The same of the compiled step, and what of it is unknown."""
  mesh = mesh_lib.make(settings.mesh, jax.devices()[: settings.mesh.num_devices])
  with jax.numpy_dtype_promotion("standard"):
    compiled = lowering.train(settings, mesh)
  read = rehearsed.read(compiled.text, dict(mesh.shape), turns=ticks.turns("train", settings))
  taken = ticks.branches_taken(read, step_lib.table(settings))
  run = Simulator(CHIPS["h100"], 4, taken.branch_of_turn).run(read)
  sent = collections.Counter()
  for unit, times in run.times.items():
    if isinstance(unit, Collective):
      sent[unit.axis.removeprefix("part of ")] += times * unit.bytes_sent
  return sent, {**read.unknown, **taken.unknown}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_compiled_step_sends_what_was_planned(name):
  settings = runs.settings(**CASES[name])
  found, unknown = compiled_bytes(settings)
  assert unknown == {}
  planned = planned_bytes(settings)
  for axis in planned | found:
    assert planned[axis] * 0.99 <= found[axis] <= planned[axis] * 1.01, axis


@pytest.mark.slow
@pytest.mark.parametrize("name", DISPATCHED)
def test_a_compiled_dispatch_sends_what_was_planned(name):
  sections = {"mesh": {"expert": 2, "tensor": 2, "stage": 1}, **DISPATCHED[name]}
  settings = runs.settings(model={"layers": 2}, **sections)
  found, _ = compiled_bytes(settings)
  planned = planned_bytes(settings)
  for axis in planned | found:
    assert planned[axis] * 0.999 <= found[axis] <= planned[axis] * 1.001, axis


def test_a_layer_reports_as_many_numbers_as_are_planned():
  counts, losses = len(plan_lib.Counts._fields), len(router.Losses._fields)
  assert (counts, losses) == (units.COUNTS, units.LOSSES)


@pytest.mark.parametrize(
  "dispatch,exchange",
  [
    ("capacity", "hierarchical"),
    ("capacity", "flat"),
    ("capacity", "hierarchical_float8"),
    ("dropless", "hierarchical"),
    ("dropless", "flat"),
    ("dropless", "hierarchical_float8"),
    ("stealing", "hierarchical"),
    ("ragged", "hierarchical"),
  ],
)
@pytest.mark.parametrize("save", ["inputs", "exchanges", "residuals", "everything"])
@pytest.mark.parametrize("mesh", [(2, 2, 2, 1), (4, 1, 2, 1), (2, 2, 1, 2)], ids=str)
def test_a_layer_saves_what_was_planned(mesh, save, dispatch, exchange):
  settings = runs.settings(
    mesh=dict(zip(("expert", "tensor", "stage", "data"), mesh, strict=True)),
    model={"kv_heads": 4, "expert_hidden": 64},
    pipeline={"save": save},
    moe={"dispatch": dispatch, "exchange": exchange, "capacity_factor": 1.5},
    train={"batch": runs.settings().train.batch * mesh[-1]},
  )
  found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved_by(settings)))
  planned = saving.saved_bytes(settings, steps.sizes(settings))
  # What elementwise steps keep is not listed to the last scalar.
  off = {"inputs": 0, "exchanges": 0.01, "residuals": 0.005, "everything": 0.05}[save]
  assert planned == pytest.approx(found, rel=off)


def saved_by(settings):
  """Shapes of what the executor's layer keeps, on one device."""
  mesh, found = mesh_lib.make(settings.mesh, jax.devices()[:8]), {}

  def region(parameters, inputs):
    layers, shared = collectives.varying(parameters)
    made = executor._Executor(
      transformer.loss_functions(settings), step_lib.table(settings), weights.Whole(layers), shared,
      inputs, settings.pipeline.save, jnp.float32,
    )  # fmt: skip
    found["saved"] = made.layers.steps.saved
    return jnp.zeros(())

  parameters = jax.eval_shape(lambda: transformer.init(jax.random.key(0), settings.model))
  specs = (transformer.specs(settings.model), step_lib.inputs_spec())
  mapped = jax.shard_map(region, mesh=mesh, in_specs=specs, out_specs=jax.P())
  jax.eval_shape(mapped, parameters, lowering.abstract_inputs(settings, mesh))
  return found["saved"]


@pytest.mark.parametrize("ranks,hosts_per_token", [(1, 0), (2, 0), (4, 0), (2, 1), (4, 1)])
def test_rows_between_and_inside_hosts_are_those_of_two_levels(ranks, hosts_per_token):
  settings = runs.settings(
    mesh={"expert": 8, "tensor": 1, "stage": 1},
    moe={"dispatch": "two_level", "capacity_factor": 1.25, "expert_ranks_per_host": ranks,
         "hosts_per_token": hosts_per_token},
  )  # fmt: skip
  model, moe = settings.model, settings.moe
  setting = plan_lib.Setting(
    2048, model.experts_per_token, model.experts, moe.capacity_factor, False, None, ranks,
    hosts_per_token,
  )  # fmt: skip
  assert steps.two_level_rows(settings, 2048) == two_level.rows_per_round(setting, 8)


def test_blocks_of_rows_are_those_of_the_grouped_products():
  assert saving.ROWS_PER_BLOCK == grouped.ROWS_PER_BLOCK


def test_the_bubble_is_that_of_the_executed_table():
  for sections in CASES.values():
    settings = runs.settings(**sections)
    run = simulate.train(settings, Machine(Cluster(CHIPS["h100"], 2, 4)))
    executed = step_lib.table(settings)
    assert run.bubble_fraction == executed.bubble_fraction(run.unit_s)
