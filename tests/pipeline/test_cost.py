"""What the executor costs in memory and program size; in time: `python -m tests.pipeline.speed`."""

import functools

import jax
import numpy as np
import pytest

from launch import environment
from moe_jax.pipeline.saving import SAVE
from tests.pipeline import baseline, toy
from tests.pipeline.toy import Case

SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2}  # and the chunks they are measured with
STAGES = 4


def compiled(case: Case, **sizes):
  mesh, table = toy.make_mesh(case), case.table()
  arrays = toy.make(case.layers, case.micro_batches, **sizes)
  structs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arrays)
  lowered = jax.jit(toy.pipelined(mesh, table, case.save, has_outputs=False)).lower(*structs)
  # As the launchers do; without it XLA:CPU copies stashes that are read and written in place.
  name = "xla_cpu_copy_insertion_use_region_analysis"
  options = {name: environment.XLA_FLAGS["cpu"][name] == "true"}
  return lowered, lowered.compile(compiler_options=options)


@functools.cache
def temporary_bytes(schedule: str, micro_batches: int, save: str = "inputs") -> int:
  case = Case(schedule, STAGES, micro_batches, SCHEDULES[schedule], save)
  _, program = compiled(case, rows=64, width=64, hidden=64)
  return program.memory_analysis().temp_size_in_bytes


@pytest.fixture(scope="module")
def memory():
  """Temporary bytes by (schedule, micro-batches)."""
  return {(name, m): temporary_bytes(name, m) for name in SCHEDULES for m in (16, 64)}


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_memory_is_flat_in_micro_batches(memory, schedule):
  assert memory[schedule, 64] <= 1.05 * memory[schedule, 16]
  assert memory["gpipe", 64] > 3 * memory["gpipe", 16]  # what it is flat against


@pytest.mark.parametrize("save", SAVE)
def test_stash_of_1f1b_is_what_the_program_allocates(save):
  """Slots: 2 * 4 - 1 of gpipe's 16. Bytes: gpipe's program is larger by the nine slots' bytes, so
  neither holds a second copy of its stash.
  """
  slots = {name: Case(name, STAGES, 16).table().peak_in_flight for name in ("gpipe", "1f1b")}
  assert slots == {"gpipe": 16, "1f1b": 7}
  sizes = {name: temporary_bytes(name, 16, save) for name in slots}
  grown = temporary_bytes("gpipe", 64, save)
  assert Case("gpipe", STAGES, 64).table().peak_in_flight == 64
  slot_bytes = (grown - sizes["gpipe"]) / (64 - 16)
  assert sizes["gpipe"] - sizes["1f1b"] > 0.8 * (16 - 7) * slot_bytes


def test_policies_trade_memory_for_recomputation():
  sizes = [temporary_bytes("1f1b", 16, save) for save in ("inputs", "residuals", "everything")]
  assert sizes == sorted(sizes)
  assert sizes[0] < sizes[-1]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("grows", ["micro_batches", "layers_per_chunk"])
def test_program_is_flat_in_micro_batches_and_layers(schedule, grows):
  def size(number):
    sizes = {"micro_batches": 4, "layers_per_chunk": 1, grows: number}
    case = Case(schedule, 2, chunks=SCHEDULES[schedule], **sizes)
    return len(compiled(case)[0].as_text())

  assert size(16) < 1.2 * size(4)


def test_baseline_is_a_pipeline_of_the_same_model():
  case = Case("gpipe", 2, 4, expert=2, tensor=2, layers_per_chunk=2)
  mesh, arrays = toy.make_mesh(case), toy.make(case.layers, 4)
  (expected, _), gradients = jax.value_and_grad(toy.reference, (0, 1), has_aux=True)(*arrays)
  step = baseline.pipelined(mesh, toy.functions(has_outputs=False), case.table())
  loss, found = jax.jit(step)(*toy.place(mesh, case.table(), *arrays))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  for each, expected_each in zip(jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True):
    assert np.linalg.norm(each - expected_each) <= 1e-5 * np.linalg.norm(expected_each)
