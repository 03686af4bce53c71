"""The graph: complete, acyclic, refused when it is not, and readable by other programs."""

import dataclasses
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from moe_jax.plan import export, graph, phases, units
from tests import runs

CASES = {
  "1f1b": runs.settings(),
  "interleaved": runs.settings(pipeline={"schedule": "interleaved", "chunks": 2}),
  "one device": runs.settings(mesh={"expert": 1, "tensor": 1, "stage": 1}),
  "streamed": runs.settings(mesh={"stage": 1, "expert": 4}, pipeline={"prefetch_layers": 2}),
  "four stages": runs.settings(mesh={"stage": 4, "tensor": 1}, moe={"dispatch": "dropless"}),
  "copies": runs.settings(
    mesh={"tensor": 1, "data": 2}, pipeline={"schedule": "interleaved", "chunks": 2}
  ),
  "copies of one device": runs.settings(mesh={"expert": 1, "tensor": 1, "stage": 1, "data": 4}),
}
each_case = pytest.mark.parametrize("settings", CASES.values(), ids=CASES)


@each_case
def test_it_is_whole_and_has_no_cycle(settings):
  built = graph.build(settings)
  graph.check(built)
  mesh = settings.mesh
  assert len(np.unique(built.module)) == mesh.num_devices
  in_unit = lambda kind: [s for s in units.unit(settings, kind) if s.name not in phases.AHEAD]
  layer_steps = len(in_unit("forward")) + len(in_unit("backward"))
  in_layers = np.isin(built.unit, [graph.UNITS.index(k) for k in ("forward", "backward")]).sum()
  micro, layers = settings.pipeline.micro_batches, settings.model.layers
  per_stage = mesh.num_devices // mesh.stage
  assert in_layers == layer_steps * micro * layers * per_stage
  assert set(built.layer[built.layer >= 0]) == set(range(layers))


@each_case
def test_each_stage_runs_its_own_layers(settings):
  built, mesh = graph.build(settings), settings.mesh
  chunk = units.layers_per_unit(settings)
  there = built.layer >= 0
  assert (built.stage[there] == built.layer[there] // chunk % mesh.stage).all()


def test_a_unit_waits_for_the_weights_of_its_layers_and_they_for_no_unit():
  settings = CASES["streamed"]
  built = graph.build(settings)
  number = graph.UNITS.index
  ends_at = built.unit[built.target[built.unit[built.source] == number("prefetch")]]
  assert set(ends_at.tolist()) == {number("prefetch"), number("forward"), number("backward")}
  before = built.unit[built.source[built.unit[built.target] == number("prefetch")]]
  assert set(before.tolist()) == {number("prefetch"), number("begin")}
  gathers = [step.name for step in built.steps].index("gather ahead")
  micro, layers, mesh = settings.pipeline.micro_batches, settings.model.layers, settings.mesh
  assert (built.step == gathers).sum() == 2 * micro * layers * mesh.expert * mesh.tensor


def test_a_collective_waits_for_all_of_its_group():
  settings = CASES["1f1b"]
  built = graph.build(settings)
  number = next(i for i, s in enumerate(built.steps) if s.name == "to experts")
  node = np.flatnonzero((built.step == number) & (built.unit == graph.UNITS.index("forward")))[0]
  before = built.source[(built.target == node) & (built.kind != graph.PREFETCH)]
  assert set(built.expert[before]) == set(range(settings.mesh.expert))
  assert set(built.tensor[before]) == {built.tensor[node]}


def test_copies_meet_where_gradients_are_summed_and_nowhere_in_a_layer():
  settings = CASES["copies"]
  built = graph.build(settings)
  there = built.kind != graph.PREFETCH
  source, target = built.source[there], built.target[there]
  crossing = built.data[source] != built.data[target]
  names = {built.steps[i].name for i in np.unique(built.step[target[crossing]])}
  assert {
    "gather ahead from copies", "scatter ahead to copies", "scatter gradients over data",
    "gather the first parameters over data", "count over data",
  } < names  # fmt: skip
  in_layers = np.isin(built.unit, [graph.UNITS.index(k) for k in ("forward", "backward")])
  assert not in_layers[target[crossing]].any()
  number = next(i for i, s in enumerate(built.steps) if s.name == "scatter gradients over data")
  node = np.flatnonzero(built.step == number)[-1]
  before = source[target == node]
  assert set(built.data[before]) == {0, 1} and set(built.module[before]) == {
    built.module[node], built.module[node] - settings.mesh.num_devices // 2
  }  # fmt: skip


def test_a_cycle_is_named():
  built = graph.build(CASES["one device"])
  backwards = dataclasses.replace(
    built,
    source=np.append(built.source, built.target[-1]),
    target=np.append(built.target, built.source[-1]),
    kind=np.append(built.kind, np.int8(graph.DATA)),
  )
  with pytest.raises(ValueError, match=r"has a cycle: \d+ of \d+ nodes .* on stage 0 expert 0"):
    graph.check(backwards)


@each_case
@pytest.mark.parametrize("seed", range(3))
def test_a_missing_dependency_is_named(settings, seed):
  """Take away all edges between two units of which one needs the other."""
  built = graph.build(settings)
  table = graph.memory.table(settings.pipeline, settings.mesh.stage)
  pairs = graph.required(table)
  source, target = pairs[np.random.default_rng(seed).integers(len(pairs))]
  of = lambda nodes, unit: (
    (built.unit[nodes] == graph.UNITS.index(unit[0]))
    & (built.micro[nodes] == unit[1])
    & (built.virtual[nodes] == unit[2])
  )
  keep = ~(of(built.source, source) & of(built.target, target))
  assert not keep.all()
  cut = dataclasses.replace(
    built, source=built.source[keep], target=built.target[keep], kind=built.kind[keep]
  )
  with pytest.raises(ValueError, match=f"lacks the dependency of .*{target[0]}.* on .*{source[0]}"):
    graph.check(cut)


def test_the_reference_deployment_has_64_modules(pytestconfig):
  from launch import config_file
  from moe_jax import config as config_lib

  path = pytestconfig.rootpath / "configs/pod64.py"
  settings = config_lib.from_mapping(config_file.load(str(path)))
  built = graph.build(settings)
  graph.check(built)
  assert len(np.unique(built.module)) == settings.mesh.num_devices == 64
  assert set(np.unique(built.kind)) == set(range(len(graph.EDGE_KINDS)))


@each_case
def test_exports_hold_the_graph(settings):
  built = graph.build(settings)
  read = json.loads(export.to_json(built))
  assert len(read["nodes"]["unit"]) == built.num_nodes
  assert len(read["edges"]["source"]) == built.num_edges
  assert len(read["steps"]) == len(built.steps)
  space = "{http://graphml.graphdrawing.org/xmlns}"
  tree = ElementTree.fromstring(export.to_graphml(built))
  ids = {node.get("id") for node in tree.iter(f"{space}node")}
  edges = [(e.get("source"), e.get("target")) for e in tree.iter(f"{space}edge")]
  table = graph.memory.table(settings.pipeline, settings.mesh.stage)
  per_module = table.num_micro_batches * settings.pipeline.chunks
  assert len(ids) >= 2 * per_module * settings.mesh.num_devices
  assert {end for edge in edges for end in edge} <= ids
  dot = export.to_dot(built)
  assert dot.count("{") == dot.count("}")
  assert set(re.findall(r"\bm\d+\b", dot)) == {f"m{i}" for i in range(settings.mesh.num_devices)}
  picture = ElementTree.fromstring(export.picture(settings))
  boxes = list(picture.iter("{http://www.w3.org/2000/svg}rect"))
  assert len(boxes) == settings.mesh.num_devices
  texts = " ".join(text.text for text in picture.iter("{http://www.w3.org/2000/svg}text"))
  assert ("copies" in texts) == ("of gradients a step" in texts) == (settings.mesh.data > 1)
