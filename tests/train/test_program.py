"""The compiled train step: compiled once, flat in micro-batches and layers, no token lost."""

import functools
import time

import jax
import numpy as np
import pytest

from moe_jax.model import transformer
from moe_jax.train import optimizer as optimizer_lib
from moe_jax.train import state, step
from tests import reference
from tests.train import parity

GROWTH = 1.2  # of program size and compile time, 4 -> 16 micro-batches or layers


def settings_of(**different):
  return parity.settings_of((2, 2, 2), model={"layers": 4}, **different)


def lowered(settings):
  mesh = parity.mesh_of(settings)
  shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), settings.model))
  rows = (settings.pipeline.micro_batches, 8, settings.train.sequence)
  integers = jax.ShapeDtypeStruct(rows, np.int32)
  weights = jax.ShapeDtypeStruct(rows, np.float32)
  inputs = transformer.Inputs(*[integers] * 4, weights)
  return jax.jit(step.loss_and_gradients(settings, mesh)).lower(shapes, inputs)


def grown(what, number):
  if what == "layers":
    return parity.settings_of((2, 2, 2), model={"layers": number}, pipeline={"micro_batches": 4})
  return settings_of(pipeline={"micro_batches": number})


@pytest.mark.parametrize("what", ["micro_batches", "layers"])
def test_program_size_is_flat(what):
  small, large = (len(lowered(grown(what, number)).as_text()) for number in (4, 16))
  assert large < GROWTH * small


@pytest.mark.slow
@pytest.mark.parametrize("what", ["micro_batches", "layers"])
def test_compile_time_is_flat(what):
  """In processor time, which other work on the machine moves less than the clock's; a few rounds
  may try.
  """

  def seconds(number):
    program = lowered(grown(what, number))
    start = time.process_time()
    program.compile()
    return time.process_time() - start

  rounds = []
  for _ in range(4):
    rounds.append((seconds(4), seconds(16)))
    if rounds[-1][1] < GROWTH * rounds[-1][0]:
      return
  pytest.fail(f"16 {what} never compiled within {GROWTH} of the time of 4; seconds: {rounds}")


@pytest.mark.slow
def test_memory_of_the_train_step_is_flat_in_micro_batches():
  """Of 1f1b; tests/pipeline/test_cost.py has the other schedules, and that gpipe's is not."""

  def temporary_bytes(micro_batches):
    settings = parity.settings_of((2, 1, 4), pipeline={"micro_batches": micro_batches})
    return lowered(settings).compile().memory_analysis().temp_size_in_bytes

  assert temporary_bytes(64) <= 1.05 * temporary_bytes(16)


@functools.cache
def dropping():
  """Returns two steps' metrics and how often they compiled, of a run that drops tokens."""
  settings = settings_of(moe={"capacity_factor": 0.5}, pipeline={"micro_batches": 2})
  mesh, optimizer = parity.mesh_of(settings), optimizer_lib.make(settings.train)
  order = state.placement(settings, step.table(settings).layer_order)
  run = state.initialiser(settings, mesh, optimizer, order)(jax.random.key(0))
  places = state.shardings(settings, mesh, optimizer)
  train = jax.jit(
    step.train_step(settings, mesh, optimizer), donate_argnums=0, out_shardings=(places, None)
  )
  metrics = []
  for seed in range(2):
    inputs = parity.inputs_on(mesh, settings, reference.random_batch(settings, seed))
    run, found = train(run, inputs)
    metrics.append(jax.device_get(found))
  return settings, metrics, train._cache_size()


def test_second_step_compiles_nothing(standard_dtype_promotion):
  _, metrics, num_programs = dropping()
  assert num_programs == 1
  assert all(found.is_finite for found in metrics)
  assert metrics[0].losses.total != metrics[1].losses.total


def test_tokens_are_conserved_in_a_step_that_drops(standard_dtype_promotion):
  settings, metrics, _ = dropping()
  train, model = settings.train, settings.model
  for found in metrics:
    counts, assigned_LE = found.losses.report.counts, found.losses.report.assigned_E
    every = train.batch * train.sequence * model.experts_per_token
    np.testing.assert_array_equal(counts.sent, np.full(model.layers, every))
    np.testing.assert_array_equal(assigned_LE.sum(1), counts.sent)
    np.testing.assert_array_equal(counts.sent, counts.kept + counts.dropped)
    assert (counts.dropped > 0).all()
    # Each device has half of its even share of rows; what is not kept of them is padding.
    np.testing.assert_array_equal(counts.kept + counts.padded, np.full(model.layers, every // 2))
