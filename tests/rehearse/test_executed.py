"""The reader against a program that runs: eight virtual devices, a whole train step, traced."""

import collections

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from launch import config_file, stopwatch
from moe_jax import config as config_lib
from moe_jax.moe import capacity
from moe_jax.observe import trace
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.plan.hardware import CHIPS
from moe_jax.rehearse import program, ticks
from moe_jax.rehearse.exposure import Simulator
from moe_jax.rehearse.program import Collective
from moe_jax.train import optimizer as optimizer_lib
from moe_jax.train import state as state_lib
from moe_jax.train import step as step_lib

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(pytestconfig):
  return config_lib.from_mapping(config_file.load(str(pytestconfig.rootpath / "configs/tiny.py")))


@pytest.fixture(scope="module")
def step(tiny, tmp_path_factory):
  """The compiled step's text and mesh, and how often each instruction ran on each device."""
  with jax.numpy_dtype_promotion("standard"):
    mesh = mesh_lib.make(tiny.mesh, jax.devices()[:8])
    optimizer = optimizer_lib.make(tiny.train)
    order = state_lib.placement(tiny, step_lib.table(tiny).layer_order)
    state = state_lib.initialiser(tiny, mesh, optimizer, order)(jax.random.key(0))
    place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
    inputs = jax.tree.map(place, stopwatch.random_inputs(tiny), step_lib.inputs_spec())
    function = jax.jit(step_lib.train_step(tiny, mesh, optimizer), donate_argnums=0)
    compiled = function.lower(state, inputs).compile()
  state, _ = compiled(state, inputs)
  jax.block_until_ready(state)
  folder = tmp_path_factory.mktemp("trace")
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  jax.profiler.start_trace(str(folder), profiler_options=options)
  jax.block_until_ready(compiled(state, inputs))
  jax.profiler.stop_trace()
  ran = collections.Counter((e.op, e.device) for e in trace.read_events(folder))
  return compiled.as_text(), dict(mesh.shape), ran


@pytest.fixture(scope="module")
def found(tiny, step):
  text, mesh, _ = step
  read = program.read(text, mesh, turns=ticks.TURNS)
  taken = ticks.branches_taken(read, step_lib.table(tiny))
  assert read.unknown == taken.unknown == {}
  return Simulator(CHIPS["h100"], 4, taken.branch_of_turn).run(read)


def test_collectives_run_as_often_as_the_reader_says(step, found):
  _, _, ran = step
  read = {unit.name: times for unit, times in found.times.items() if isinstance(unit, Collective)}
  kinds = tuple(program.KINDS)
  executed = collections.defaultdict(dict)
  for (op, device), times in ran.items():
    if op.startswith(kinds) or op in read:
      executed[op][device] = times
  assert len(read) > 20 and {"all-to-all", "all-reduce"} <= {name.split(".")[0] for name in read}
  assert read.keys() == executed.keys()
  for name, by_device in executed.items():
    assert by_device == dict.fromkeys(range(8), read[name]), name


def test_bytes_are_those_of_the_docstrings(tiny, found):
  """Formulas of moe/exchange.py and model/attention.py, times the layers that run."""
  model, mesh, table = tiny.model, tiny.mesh, step_lib.table(tiny)
  layers = model.layers // mesh.stage
  forward = table.ticks_by_kind["forward"] * layers
  backward = table.ticks_by_kind["backward"] * layers
  tokens = tiny.train.batch // 4 // mesh.expert * tiny.train.sequence // mesh.tensor
  rows = model.experts * capacity.rows_per_expert(
    tokens, model.experts_per_token, model.experts, tiny.moe.capacity_factor
  )
  exchanged = (mesh.expert - 1) / mesh.expert * rows * model.d_model * 4
  gathered = (mesh.tensor - 1) * rows * model.d_model * 4
  attended = (mesh.tensor - 1) * tokens * model.d_model * 4
  sent = collections.Counter()
  for unit, times in found.times.items():
    if isinstance(unit, Collective):
      sent[unit.kind, unit.phase] += times * unit.bytes_sent
  # Forward, computed again, and the transposes of both in the backward pass.
  both_ways = forward + 2 * backward
  # The sum of all layers' assignments per expert, which is not differentiated.
  counted = layers * (mesh.expert - 1 + mesh.tensor - 1) * model.experts * 4
  assert sent["all-to-all", "head"] == pytest.approx(table.ticks_by_kind["head"] * counted)
  assert sent["all-to-all", "dispatch"] == pytest.approx(both_ways * exchanged)
  assert sent["all-to-all", "combine"] == pytest.approx(both_ways * exchanged)
  moe = sum(sent["all-gather", p] for p in ("dispatch", "combine", "combine+dispatch"))
  assert moe == pytest.approx(both_ways * gathered)
  # All-gather and reduce-scatter are each other's transpose.
  assert sent["all-gather", "attention"] == pytest.approx(both_ways * attended)
  assert sent["reduce-scatter", "attention"] == pytest.approx(both_ways * attended)


def test_the_reader_counts_the_ticks_of_the_table(tiny, found):
  table = step_lib.table(tiny)
  # Two stages send both ways in one message.
  shifts = [n for u, n in found.times.items() if getattr(u, "kind", "") == "collective-permute"]
  assert tiny.mesh.stage == 2
  assert sum(shifts) == table.num_ticks
  heads = [
    n
    for u, n in found.times.items()
    if isinstance(u, Collective) and (u.phase, u.kind, u.axis) == ("head", "all-gather", "tensor")
  ]
  assert sum(heads) == table.ticks_by_kind["head"]
  assert np.all(np.asarray(list(found.times.values())) > 0)
