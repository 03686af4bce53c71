"""Memory: what follows from shapes, against the program's arrays; the rest by its properties."""

import dataclasses
import importlib.util
import subprocess
import sys

import jax
import pytest

from moe_jax import config
from moe_jax.model import kv_cache
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.pipeline.saving import SAVE
from moe_jax.plan import memory, saving, steps, units, workspace
from moe_jax.plan.leaves import DTYPE_BYTES
from moe_jax.rehearse import lowering
from moe_jax.train import optimizer as optimizer_lib
from tests import runs


@pytest.mark.parametrize(
  "sections",
  [
    {},
    {"mesh": {"expert": 4, "tensor": 1}, "model": {"qk_norm": "projection"}},
    {"mesh": {"expert": 1, "tensor": 8, "stage": 1}, "model": {"tied_embeddings": True}},
    {"mesh": {"tensor": 1, "data": 2}},
    {"mesh": {"expert": 1, "stage": 1, "data": 4}, "model": {"qk_norm": "head"}},
  ],
)
def test_state_and_inputs_are_the_launchers(sections):
  settings = runs.settings(**sections)
  mesh = mesh_lib.make(settings.mesh, jax.devices()[:8])
  with jax.numpy_dtype_promotion("standard"):
    optimizer = optimizer_lib.make(settings.train)
    state = lowering.abstract_state(settings, mesh, optimizer)
  held = lambda tree: sum(
    leaf.dtype.itemsize * _size(leaf.sharding.shard_shape(leaf.shape))
    for leaf in jax.tree.leaves(tree)
  )
  found = memory.train(settings)
  assert found.parameters == held(state.parameters)
  assert found.optimizer + 8 == held(state.optimizer)  # and two counters
  assert found.inputs == held(lowering.abstract_inputs(settings, mesh))


def _size(shape):
  return 1 if not shape else shape[0] * _size(shape[1:])


@pytest.mark.slow
@pytest.mark.skipif(
  not importlib.util.find_spec("jax_plugins"), reason="the rehearse extra is not installed"
)
def test_the_total_is_the_compiled_programs():
  """Unequal meshes, schedules, policies and dispatches; `python -m tests.plan.agreement memory` has
  them all.
  """
  names = ["laptop 1x2x4, gpipe", "laptop, dropless", "laptop, stealing", "pod64"]
  words = [sys.executable, "-m", "tests.plan.agreement", "memory", *names]
  found = subprocess.run(words, cwd=runs.ROOT, capture_output=True, text=True, timeout=900)
  assert found.returncode == 0, found.stdout + found.stderr
  assert all(name in found.stdout for name in names)


def test_every_policy_of_the_executor_has_its_bytes():
  assert set(SAVE) == set(config.SAVE)
  found = [_train(pipeline={"save": save}).stash for save in config.SAVE]
  assert found == sorted(set(found))


def test_the_stash_is_what_is_in_flight():
  """1F1B on 2 stages keeps 3 micro-batches whatever their number; gpipe keeps all 4, then 8."""
  at = steps.sizes(runs.settings())
  activation = at.tokens * 16 * 4
  layers = 2
  assert _train().stash == 3 * layers * activation
  gpipe = {"schedule": "gpipe"}
  assert _train(pipeline=gpipe).stash == 4 * layers * activation
  more = {"micro_batches": 8}
  assert _train(pipeline=more).stash == 3 * layers * activation / 2  # half as large each
  assert _train(pipeline=gpipe | more).stash == 8 * layers * activation / 2


def test_the_cache_by_hand():
  """4 layers of 8 heads x 4 in float32, keys and values: 1,024 bytes a token.

  2 x 2 x 2 devices hold half of the layers, heads and sequences each: of 6 sequences x 100 tokens
  76,800 bytes.
  """
  found = memory.serve(runs.settings(), sequences=6, cache_tokens=100, prompt_tokens=16)
  assert found.kv_cache == 4 * 2 * 8 * 4 * 4 * 600 // 8 == 76_800
  # Two copies of the mesh serve twice as many.
  twice = memory.serve(runs.settings(mesh={"data": 2}), 12, cache_tokens=100, prompt_tokens=16)
  assert (twice.kv_cache, twice.compute_copies) == (found.kv_cache, found.compute_copies)
  assert found.parameters == found.optimizer == found.gradients == found.stash == 0
  assert found.total > found.kv_cache + found.compute_copies


@pytest.mark.parametrize("kv_dtype", config.KV_DTYPES)
def test_the_cache_is_the_servers(kv_dtype):
  """In bfloat16, so that no dtype of the cache is the computation's by chance."""
  settings = runs.settings(model={"dtype": "bfloat16", "kv_heads": 4})
  settings = dataclasses.replace(settings, serve=config.Serve(kv_dtype=kv_dtype, max_tokens=64))
  held = kv_cache.abstract(settings)
  tokens = held.key_lAgJH.shape[1] * settings.serve.page
  found = memory.serve(settings, sequences=tokens // 64, cache_tokens=64, prompt_tokens=16)
  whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))
  assert found.kv_cache * settings.mesh.num_devices == whole
  # A decode step reads what of it is in its context: the step over a context without one.
  read = lambda context: sum(
    step.num_bytes
    for step in units.unit(settings, "forward", steps.sizes(settings, 1, context))
    if step.name == "attention"
  )
  layers, sequences = settings.model.layers, steps.sizes(settings, 1).sequences
  share = settings.mesh.tensor * layers * tokens
  assert read(32) - read(0) == sequences * 32 * whole / share


def test_parts_make_the_total():
  found = _train()
  parts = (
    found.parameters, found.optimizer, found.inputs, found.gradients, found.compute_copies,
    found.activations_and_buffers,
  )  # fmt: skip
  assert found.total == sum(parts)
  fields = [f.name for f in dataclasses.fields(found) if f.name != "peak_unit"]
  assert found.total == sum(getattr(found, name) for name in fields)


def test_rows_that_arrived_are_copied_between_loops_where_the_stash_is_large():
  many = {"save": "residuals", "micro_batches": 8, "schedule": "gpipe"}
  found = _train(pipeline=many, train={"batch": 512, "sequence": 64})
  assert found.peak_unit == "between loops"
  at = steps.sizes(runs.settings(pipeline=many, train={"batch": 512, "sequence": 64}))
  arrived = 2 * at.rows * 16 * 4  # of both tensor ranks, float32
  embedding = 256 * 16 * 4 // 2  # of a tensor rank, gathered, and used up
  copies_of_a_layer = 2 * 2  # in two loops of ticks, each with a loop over layers and one behind
  small = copies_of_a_layer * workspace.SMALL_BYTES
  next_layer = saving.saved_bytes(runs.settings(pipeline=many), at)  # a backward unit begins with
  assert found.workspace == 8 * 2 * arrived - embedding + small + next_layer


def test_weights_that_the_optimizer_holds_whole_have_no_copy():
  one = {"expert": 1, "tensor": 4, "stage": 2}
  assert _train(mesh=one).compute_copies == 0
  assert _train(mesh=one, model={"dtype": "bfloat16"}).compute_copies > 0
  assert 0 < _train().compute_copies < _train().gradients


def test_streamed_weights_by_hand():
  """Attention of a layer, 16 x (8 + 8 + 8 + 8) x 4 float32 on 2 tensor ranks: 4,096 bytes.

  Of 4 layers whole copies take 16,384 bytes. Streamed, the optimizer's own shares are what the step
  computes with, and one layer is whole for each direction; 3 layers ahead that is more than all.
  """
  mesh = {"expert": 4, "tensor": 2, "stage": 1}
  whole, one, three = (
    _train(mesh=mesh, model={"layers": 4}, pipeline={"prefetch_layers": k}) for k in (0, 1, 3)
  )
  of_layer = 16 * (8 + 8 + 8 + 8) * 4 * 4 // 2
  assert of_layer == 4_096
  assert whole.compute_copies - one.compute_copies == (4 - 2 * 1) * of_layer
  assert whole.compute_copies - three.compute_copies == (4 - 2 * 3) * of_layer
  assert (one.parameters, one.gradients) == (whole.parameters, whole.gradients)
  narrow = {"layers": 4, "dtype": "bfloat16"}
  whole, one = (_train(mesh=mesh, model=narrow, pipeline={"prefetch_layers": k}) for k in (0, 1))
  saved = whole.compute_copies - one.compute_copies
  assert saved == (4 - 4 / 4 - 2) * of_layer / 2  # a share of the cast copy stays


def test_a_larger_vocabulary_makes_the_head_the_most_demanding():
  assert _train().peak_unit == "backward"
  assert _train(model={"vocab": 65_536}).peak_unit == "head"


def test_sizes_of_dtypes_are_jaxs():
  assert set(DTYPE_BYTES) == set(config.DTYPES)
  for name, num_bytes in DTYPE_BYTES.items():
    assert jax.numpy.dtype(name).itemsize == num_bytes


def _train(**sections):
  return memory.train(runs.settings(**sections))
