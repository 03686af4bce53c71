"""Ticks, steps and their sums against the table and against the counted operations."""

import dataclasses

import jax
import pytest

from moe_jax import config
from moe_jax.model import flash
from moe_jax.plan import cost, machine, memory, phases, program, simulate, steps, units
from moe_jax.plan.hardware import cluster
from tests import runs
from tests.plan import executed

H100 = machine.Machine(cluster("h100:2x4"))
CASES = {
  "1f1b": runs.settings(),
  "interleaved": runs.settings(
    pipeline={"schedule": "interleaved", "chunks": 2, "save": "residuals"}
  ),
  "gpipe": runs.settings(pipeline={"schedule": "gpipe", "save": "everything"}),
  "one stage": runs.settings(mesh={"stage": 1, "expert": 4}, moe={"exchange": "flat"}),
  "streamed": runs.settings(
    mesh={"stage": 1, "expert": 4}, pipeline={"save": "residuals", "prefetch_layers": 1}
  ),
  "four stages": runs.settings(mesh={"stage": 4, "tensor": 1}, moe={"dispatch": "dropless"}),
  "copies": runs.settings(
    mesh={"data": 2}, pipeline={"schedule": "interleaved", "chunks": 2, "save": "exchanges"}
  ),
  "a chunk in a message": runs.settings(
    model={"layers": 4},
    mesh={"data": 2, "expert": 2, "tensor": 1, "stage": 1},
    moe={"dispatch": "dropless", "expert_ranks_per_host": 2},
    train={"batch": 8},
    pipeline={"schedule": "interleaved", "chunks": 2, "micro_batches": 1, "halves": True},
  ),
}
each_case = pytest.mark.parametrize("settings", CASES.values(), ids=CASES)


@each_case
def test_units_run_in_as_many_ticks_as_the_table_says(settings):
  table = memory.table(settings.pipeline, settings.mesh.stage)
  found = program.ticks(table)
  for kind, ticks in table.ticks_by_kind.items():
    assert sum(getattr(runs, kind) for runs in found) == ticks
  counts = program.tick_counts(settings.pipeline, settings.mesh.stage)
  assert sum(times for _, times in counts) == table.num_ticks


@each_case
def test_a_device_multiplies_its_share_of_what_is_executed(settings):
  """Masked cells come on top: a tick runs a unit on every stage if any stage has one."""
  settings = with_attention(settings, flash.BLOCK, flash._NARROWEST)
  table, mesh = memory.table(settings.pipeline, settings.mesh.stage), settings.mesh
  said = executed.train_flops(settings, flash.BLOCK, flash.PRODUCTS[flash.BACKWARD])
  for kind, phases_of in (
    ("head", ("head",)), ("forward", ("attention", "dispatch", "experts")),
  ):  # fmt: skip
    found = 0.0
    for unit in ("forward", "backward") if kind == "forward" else ("head",):
      layers = units.layers_per_unit(settings) if kind == "forward" else 1
      each = sum(step.flops for step in units.unit(settings, unit))
      found += each * layers * table.units_by_kind[unit]
    wanted = sum(getattr(said, phase) for phase in phases_of) / mesh.num_devices
    if settings.moe.dispatch == "dropless":
      assert found == pytest.approx(wanted, rel=0.01)  # rows of a rank are whole ones
    elif settings.pipeline.save == "inputs" or kind == "head":
      assert found == pytest.approx(wanted)
    else:
      assert found <= wanted * 1.0001  # the router's products are kept too


def test_attentions_kernels_are_those_of_a_gpu():
  assert (phases.FLASH_BLOCK, phases.FLASH_NARROWEST) == (flash.BLOCK, flash._NARROWEST)
  products = {phases.FORWARD: flash.FORWARD, phases.BACKWARD: flash.BACKWARD}
  assert {part: flash.PRODUCTS[name] for part, name in products.items()} == phases.FLASH_PRODUCTS


@pytest.mark.parametrize("sequence, head_dim", [(2048, 32), (100, 24), (16, 4)])
def test_attention_multiplies_what_the_kernels_of_a_gpu_do(sequence, head_dim):
  """Beside the four projections; pod64's shape, one that is padded, and tiny's."""
  settings = with_attention(runs.settings(), sequence, head_dim)
  model, mesh, at = settings.model, settings.mesh, steps.sizes(settings)
  heads = at.sequences, sequence, model.heads // mesh.tensor, head_dim
  (b, S, N, H) = jax.eval_shape(flash._tiled, jax.ShapeDtypeStruct(heads, "float32")).shape
  projected = cost.forward_flops(model, [1] * at.sequences * sequence).attention / model.layers
  projected -= 4 * at.sequences * sequence * model.heads * head_dim  # a pair for each token
  passes = {flash.FORWARD: ("forward", 1), flash.BACKWARD: ("backward", 2)}
  for kernel, (unit, times) in passes.items():
    made = [
      step.flops
      for step in units.unit(settings, unit)
      if step.phase == "attention" and step.part == unit
    ]
    kernel_flops = flash.kernel_flops(kernel, b, S, N, H, num_keys=S)
    assert sum(made) == pytest.approx(times * projected / mesh.tensor + kernel_flops)


@each_case
@pytest.mark.parametrize("tied", [False, True])
def test_alike_ticks_once_are_all_ticks(settings, tied):
  whole = sum(
    machine.run_block(block, settings, H100).end_s
    for _, blocks in program.train(settings, tied)
    for block in blocks
  )
  run = simulate.train(settings, H100, tied)
  assert run.step_s == pytest.approx(whole)
  assert simulate.step_seconds(settings, H100, tied) == pytest.approx(run.step_s)
  end_s = max(event.end_s for event in simulate.events(settings, H100, tied))
  assert end_s == pytest.approx(whole)


@each_case
def test_the_bubble_is_the_executed_tables(settings):
  run = simulate.train(settings, H100)
  table = memory.table(settings.pipeline, settings.mesh.stage)
  assert run.bubble_fraction == table.bubble_fraction(run.unit_s)
  if settings.mesh.stage == 1:
    assert run.bubble_fraction == 0


@each_case
def test_untied_ticks_are_the_sum_of_their_units_and_transfers(settings):
  """With nothing beside each other but transfers, messages between copies, head and embedding, a
  step is never shorter than its units in the table's ticks, and longer by no more than its
  transfers, messages and ends."""
  table = memory.table(settings.pipeline, settings.mesh.stage)
  run = simulate.train(settings, H100, tied=False)
  kernels_of = {kind: s for kind, s in run.unit_s.items() if kind not in ("embed",)}
  least = sum(s * table.ticks_by_kind[kind] for kind, s in kernels_of.items())
  sent_s = sum(run.seconds_by_stream.get(f"{axis} link", 0.0) for axis in ("stage", "data"))
  ends_s = sum(machine.run_block(b, settings, H100).end_s for b in program.ends(settings))
  embed_s = run.unit_s["embed"] * table.ticks_by_kind["embed"]
  assert least <= run.step_s <= least + sent_s + ends_s + embed_s


def with_attention(settings, sequence, head_dim):
  """Returns the settings with other sequences and heads."""
  return dataclasses.replace(
    settings,
    model=dataclasses.replace(settings.model, head_dim=head_dim),
    train=dataclasses.replace(settings.train, sequence=sequence),
  )


def test_tying_never_costs_and_only_moves_what_is_hidden():
  for settings in CASES.values():
    tied, untied = (simulate.train(settings, H100, tied=t) for t in (True, False))
    assert tied.step_s <= untied.step_s * (1 + 1e-9)
    assert tied.compute_s == pytest.approx(untied.compute_s)
    assert tied.bytes_by_link == pytest.approx(untied.bytes_by_link)


def test_streaming_sends_a_layer_with_each_layer_of_a_unit():
  """The mesh has 4 x 2 devices, the model 4 layers: in each of 4 micro-batches' ticks, forwards and
  backwards, 4 layers of attention come as (4 - 1) / 4 of 16 x 32 x 4 float32 on 2 tensor ranks, and
  1 for each direction before the ticks; which those of all layers then no longer do.
  """
  settings = CASES["streamed"]
  pipeline = dataclasses.replace(settings.pipeline, prefetch_layers=0)
  whole = dataclasses.replace(settings, pipeline=pipeline)
  table = memory.table(settings.pipeline, 1)
  ticks = table.ticks_by_kind["forward"] + table.ticks_by_kind["backward"]
  of_layer = 3 / 4 * 16 * (4 * 8) * 4 * 4 / 2
  streamed, before = (simulate.train(each, H100) for each in (settings, whole))
  sent = lambda run: sum(run.bytes_by_link.values())
  layers = settings.model.layers
  assert (layers, table.num_micro_batches) == (4, 4)
  assert sent(streamed) - sent(before) == pytest.approx((ticks * layers + 2 - layers) * of_layer)
  # Step by step; tied, gathers ahead hide where those before the first tick do not.
  untied = (simulate.train(each, H100, tied=False).step_s for each in (settings, whole))
  assert next(untied) > next(untied)


def test_every_policy_saves_what_it_does_not_run_again():
  again = {}
  for save in config.SAVE:
    pipeline = dataclasses.replace(CASES["1f1b"].pipeline, save=save)
    settings = dataclasses.replace(CASES["1f1b"], pipeline=pipeline)
    again[save] = {s.name for s in units.unit(settings, "backward") if s.part == "again"}
    assert len(units.unit(settings, "forward")) >= len(again[save])
  assert again["inputs"] > again["residuals"] >= again["everything"] == set()
