"""What the executor costs: memory in micro-batches, time against gpipe and a plain pipeline, size.

`python -m tests.pipeline.test_cost` prints the figures.
"""

import functools
import time

import jax
import numpy as np
import pytest

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
  return lowered, lowered.compile()


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


def programs():
  """Returns {name: (compiled step, its arrays)} of a layer heavy enough to be timed."""
  cases = {
    name: Case(name, STAGES, 16, chunks, expert=2, layers_per_chunk=2 // chunks)
    for name, chunks in SCHEDULES.items()
  }
  arrays = toy.make(2 * STAGES, 16, rows=128, width=256, hidden=512)
  mesh, gpipe = toy.make_mesh(cases["gpipe"]), cases["gpipe"].table()
  steps = {
    name: (toy.pipelined(mesh, case.table(), has_outputs=False), case.table())
    for name, case in cases.items()
  }
  steps["baseline"] = (baseline.pipelined(mesh, toy.functions(has_outputs=False), 16), gpipe)
  result = {}
  for name, (step, table) in steps.items():
    placed = toy.place(mesh, table, *arrays)
    result[name] = (jax.jit(step).lower(*placed).compile(), placed)
  return result


def step_seconds(steps, repeats: int = 11) -> dict[str, float]:
  """Returns the median of each step's seconds, the steps taking turns."""
  seconds = {name: [] for name in steps}
  for repeat in range(repeats + 1):
    # Each goes first as often as the others.
    for name in np.roll(list(steps), repeat):
      program, arrays = steps[name]
      start = time.perf_counter()
      jax.block_until_ready(program(*arrays))
      seconds[name].append(time.perf_counter() - start)
  return {name: float(np.median(each[1:])) for name, each in seconds.items()}


def test_baseline_is_a_pipeline_of_the_same_model():
  case = Case("gpipe", 2, 4, expert=2, tensor=2, layers_per_chunk=2)
  mesh, arrays = toy.make_mesh(case), toy.make(case.layers, 4)
  (expected, _), gradients = jax.value_and_grad(toy.reference, (0, 1), has_aux=True)(*arrays)
  step = baseline.pipelined(mesh, toy.functions(has_outputs=False), 4)
  loss, found = jax.jit(step)(*toy.place(mesh, case.table(), *arrays))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  for each, expected_each in zip(jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True):
    assert np.linalg.norm(each - expected_each) <= 1e-5 * np.linalg.norm(expected_each)


@pytest.mark.slow
def test_1f1b_is_as_fast_as_gpipe_and_as_a_plain_pipeline():
  """The bars: 1f1b <= 1.02 x gpipe, and no slower than `jax.grad` through a scan.

  Other work on the machine moves a median by more than 2%, so a few rounds may try.
  """
  steps, rounds = programs(), []
  for _ in range(8):
    seconds = step_seconds(steps)
    rounds.append(seconds)
    if seconds["1f1b"] <= min(1.02 * seconds["gpipe"], seconds["baseline"]):
      return
  pytest.fail(f"in no round was 1f1b <= 1.02 x gpipe and <= the baseline; seconds: {rounds}")


if __name__ == "__main__":
  for schedule in SCHEDULES:
    for save in SAVE:
      found = [temporary_bytes(schedule, m, save) for m in (16, 64)]
      print(f"{schedule} {save}: {found[0]:,} temporary bytes at m=16, {found[1]:,} at m=64")
  timed = programs()
  print({name: round(each, 4) for name, each in step_seconds(timed).items()})
