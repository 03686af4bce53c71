"""Real traces of a sharded program with all six phases, forward, recomputed and backward."""

import glob
import gzip
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.observe import profile, trace

NUM_STEPS = 2


def _loss(x_TD, w_LDD):
  with jax.named_scope("embed"):
    x_TD = x_TD * 2.0

  def layer(x_TD, w_DD):
    with jax.named_scope("attention"):
      # A loop within a phase: its event holds those of its body.
      x_TD, _ = jax.lax.scan(lambda x_TD, _: (jnp.tanh(x_TD @ w_DD), None), x_TD, length=2)
    with jax.named_scope("dispatch"):
      x_TD = jax.lax.all_to_all(x_TD, "expert", 0, 0, tiled=True)
    with jax.named_scope("experts"):
      x_TD = jax.nn.silu(x_TD @ w_DD)
    with jax.named_scope("combine"):
      x_TD = jax.lax.all_to_all(x_TD, "expert", 0, 0, tiled=True)
    return x_TD, None

  x_TD, _ = jax.lax.scan(jax.checkpoint(layer), x_TD, w_LDD)
  with jax.named_scope("head"):
    return jax.lax.psum(jnp.sum(jnp.exp(x_TD @ w_LDD[0])), "expert")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  mesh = Mesh(np.array(jax.devices()[:2]), ("expert",))
  region = jax.shard_map(_loss, mesh=mesh, in_specs=(P("expert"), P()), out_specs=P())
  step = jax.jit(jax.grad(region, argnums=1))
  x_TD, w_LDD = jnp.ones((64, 32)), jnp.full((3, 32, 32), 0.02)
  folder = tmp_path_factory.mktemp("trace")
  profiler = profile.Profiler(folder, 1, 1 + NUM_STEPS)
  for i in range(5):
    profiler.before_step(i)
    profiler.after_step(i, step(x_TD, w_LDD))
  profiler.close()
  return folder


def phase_of(event):
  return trace.phase_of(event.op_name, trace.PHASES)


def phase_seconds(folder):
  """Returns {phase: {device: seconds}}, the time in which the device ran something of the phase."""
  spans = trace._phase_spans(trace.read_events(folder), trace.PHASES)
  seconds = {phase: {} for phase in trace.PHASES}
  for (phase, device), merged in spans.items():
    seconds[phase][device] = sum(stop_s - start_s for start_s, stop_s in merged)
  return seconds


def test_every_phase_has_events_on_every_device_forward_and_backward(folder):
  events = trace.read_events(folder)
  found = {(phase_of(event), event.device) for event in events}
  assert {(phase, device) for phase in trace.PHASES for device in (0, 1)} <= found
  backward = {phase_of(event) for event in events if "transpose" in event.op_name}
  assert {"attention", "dispatch", "experts", "combine", "head"} <= backward


def test_only_the_steps_of_the_window_are_in_the_trace(folder):
  runs = {event.run_id for event in trace.read_events(folder) if phase_of(event) == "experts"}
  assert len(runs) == NUM_STEPS


def test_spans_of_a_phase_count_a_loop_and_its_body_once(folder):
  attention = [e for e in trace.read_events(folder) if phase_of(e) == "attention" and e.device == 0]
  loops = [event for event in attention if event.op.startswith("while")]
  assert loops
  covered_ns = set()
  for event in attention:
    start_ns = round(event.start_s * 1e9)
    covered_ns.update(range(start_ns, start_ns + round(event.duration_s * 1e9)))
  seconds = phase_seconds(folder)
  np.testing.assert_allclose(seconds["attention"][0], len(covered_ns) * 1e-9, rtol=1e-3)
  assert seconds["attention"][0] < sum(event.duration_s for event in attention)
  assert all(set(by_device) == {0, 1} for by_device in seconds.values())


def test_the_written_trace_names_its_phases_and_stays_so(folder):
  def shown():
    (path,) = glob.glob(f"{folder}/plugins/profile/*/*.trace.json.gz")
    with gzip.open(path, "rt") as file:
      return json.load(file)["traceEvents"]

  events = shown()
  named = [event for event in events if "phase" in event.get("args", {})]
  assert {event["args"]["phase"] for event in named} == set(trace.PHASES)
  assert all(event["name"].startswith(event["args"]["phase"] + "/") for event in named)
  tracks = {(e["pid"], e["name"]) for e in events if e["ph"] == "X" and e["name"] in trace.PHASES}
  assert len(tracks) == 2 * len(trace.PHASES)
  trace.annotate(folder)
  assert shown() == events


def test_a_gpu_trace_names_the_device_by_its_plane(tmp_path):
  session = tmp_path / "plugins/profile/now"
  session.mkdir(parents=True)
  text = """planes { name: "/device:GPU:3" lines { name: "Stream #1" timestamp_ns: 5000 events {
      metadata_id: 1 offset_ps: 2000000 duration_ps: 7000000
      stats { metadata_id: 1 str_value: "fusion.1" } stats { metadata_id: 2 str_value: "jit_step" }
      stats { metadata_id: 3 int64_value: 8 } } }
    event_metadata { key: 1 value { id: 1 name: "kernel" } }
    stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
    stat_metadata { key: 2 value { id: 2 name: "hlo_module" } }
    stat_metadata { key: 3 value { id: 3 name: "program_id" } } }"""
  (session / "host.xplane.pb").write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
  (event,) = trace.read_events(tmp_path)
  assert (event.op, event.program, event.device) == ("fusion.1", "jit_step(8)", 3)
  np.testing.assert_allclose([event.start_s, event.duration_s], [7e-6, 7e-6], rtol=1e-12)


@pytest.mark.parametrize(("op_name", "phase"), [
  ("jit(step)/shard_map/while/body/attention/dot_general", "attention"),
  ("jit(step)/transpose(jvp(experts))/mul", "experts"),
  ("jit(step)/jvp()/attention/combine/psum", "combine"),
  ("jit(step)/head", "head"),
  ("jit(step)/jit(head)/dot_general", None),
  ("jit(step)/attention_mask/mul", None),
  ("jit(step)/multi-head/mul", None),
  ("", None),
])  # fmt: skip
def test_phase_is_the_innermost_scope(op_name, phase):
  assert trace.phase_of(op_name, trace.PHASES) == phase


def test_a_folder_without_trace_is_named(tmp_path):
  with pytest.raises(ValueError, match="holds no trace"):
    trace.read_events(tmp_path)


CACHED_RUN = """
import sys, jax, jax.numpy as jnp
from moe_jax.observe import profile
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# Shifts this process's program numbers against those of the one that filled the cache.
for i in range(int(sys.argv[3])):
  jax.jit(lambda x: x + i)(jnp.ones(2))
def step(x):
  with jax.named_scope("experts"):
    return jnp.tanh(x @ x)
profiler = profile.Profiler(sys.argv[2], 0, 1)
profiler.before_step(0)
profiler.after_step(0, jax.jit(step)(jnp.ones((8, 8))))
"""


def test_a_program_from_the_compilation_cache_keeps_its_phases(tmp_path):
  for run, shift in (("cold", 3), ("warm", 0)):
    arguments = [str(tmp_path / "cache"), str(tmp_path / run), str(shift)]
    subprocess.run([sys.executable, "-c", CACHED_RUN, *arguments], check=True)
    assert phase_seconds(tmp_path / run)["experts"][0] > 0
  assert any((tmp_path / "cache").glob("jit_step*"))
