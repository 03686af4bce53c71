"""Every shipped config builds, says how it is run, and holds the facts that DESIGN.md gives."""

import ast
import dataclasses
import importlib
import pathlib
import shlex

import pytest

from launch import config_file
from moe_jax import config as config_lib

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
NAMES = sorted(f.stem for f in FOLDER.glob("*.py") if f.stem != "__init__")


def build(name, **sections):
  """The Config of a shipped file, with fields of some sections replaced."""
  values = config_lib.as_dict(config_lib.from_mapping(config_file.load(str(FOLDER / f"{name}.py"))))
  for section, fields in sections.items():
    values[section].update(fields)
  return config_lib.from_mapping(values)


def num_parameters(model):
  """Counted from the shapes of a Mixtral block, one term a matrix."""
  attention = model.d_model * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
  experts = model.experts * 3 * model.d_model * model.expert_hidden
  router = model.d_model * model.experts
  norms = 2 * model.d_model
  ends = 2 * model.vocab * model.d_model + model.d_model
  return model.layers * (attention + experts + router + norms) + ends


def test_the_shipped_files_are_those_the_readme_can_rely_on():
  assert {"laptop", "tiny", "pod64", "pod64_10b"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_builds_and_its_first_line_runs_it(name):
  build(name)
  words = shlex.split(
    ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())).split("\n")[0]
  )
  assert words[words.index("-m") + 1].startswith("launch.")
  assert f"--config=configs/{name}.py" in words


@pytest.mark.parametrize("name", ["laptop", "tiny"])
def test_it_fits_the_virtual_devices_of_its_command(name):
  module = importlib.import_module(f"configs.{name}")
  assert "--virtual_devices=8" in module.__doc__.split("\n")[0]
  assert build(name).mesh.num_devices == 8


def test_laptop_is_what_make_train_promises():
  laptop = build("laptop")
  assert laptop.mesh == config_lib.Mesh(expert=2, tensor=2, stage=2)
  assert laptop.pipeline.micro_batches == 16
  assert (laptop.data.paths, laptop.data.tokenizer) == ("", "bytes")


def test_pod64_is_the_reference_deployment():
  pod = build("pod64")
  assert pod.mesh.num_devices == 64
  model, mesh = pod.model, pod.mesh
  assert (model.experts // mesh.expert, model.expert_hidden // mesh.tensor) == (2, 256)
  assert (model.heads // mesh.tensor, model.layers // mesh.stage) == (4, 8)
  assert pod.train.batch // pod.pipeline.micro_batches == 8  # sequences: one per expert rank
  p, m, v = mesh.stage, pod.pipeline.micro_batches, pod.pipeline.chunks
  assert (p - 1) / (v * m + p - 1) < 0.02  # the bubble that the plan asks for
  assert (pod.train.sequence, pod.moe.capacity_factor, pod.data.tokenizer) == (2048, 1.25, "bpe")
  assert num_parameters(model) == pytest.approx(0.45e9, rel=0.02)
  build("pod64", moe={"dispatch": "dropless"}, train={"sequence": 10_240})  # as it serves


def test_copies_are_the_same_model_and_batch_with_experts_inside_hosts():
  pod, copies = build("pod64"), build("pod64_copies")
  assert copies.model == pod.model
  assert (copies.train, copies.moe.capacity_factor) == (pod.train, pod.moe.capacity_factor)
  mesh = copies.mesh
  assert (mesh.num_devices, mesh.expert * mesh.tensor, mesh.data) == (64, 4, 16)  # 16 hosts x 4
  assert copies.moe.expert_ranks_per_host == mesh.expert
  assert copies.pipeline.halves  # of the two sequences that each rank has
  assert copies.train.batch // mesh.sequence_shares == 2


@pytest.mark.parametrize("name", ["pod64", "pod64_10b"])
def test_the_same_model_is_served_by_a_copy_on_each_gpu(name):
  pod, served = build(name), build(f"{name}_serve")
  assert served.model == pod.model
  assert served.mesh == config_lib.Mesh(data=64)
  prompts = [
    each.mesh.sequence_shares * each.serve.prefill_rows * each.serve.prefill_micro_batches
    for each in (pod, served)
  ]
  slots = [each.mesh.sequence_shares * each.serve.slots * each.mesh.stage for each in (pod, served)]
  assert prompts == slots == [128, 128]


def test_pod64_10b_differs_in_three_widths_only():
  pod, wide = build("pod64"), build("pod64_10b")
  assert num_parameters(wide.model) == pytest.approx(10e9, rel=0.02)
  widths = {"d_model": 2048, "head_dim": 128, "expert_hidden": 6144}
  assert wide == dataclasses.replace(pod, model=dataclasses.replace(pod.model, **widths))


def test_halves_are_the_same_model_and_batch_without_stages():
  wide, halved = build("pod64_10b"), build("pod64_10b_halves")
  assert (halved.model, halved.train, halved.moe) == (wide.model, wide.train, wide.moe)
  assert halved.mesh == config_lib.Mesh(expert=16, tensor=4, stage=1)  # an expert on each host
  assert halved.pipeline.halves
  assert halved.train.batch // halved.mesh.sequence_shares == 8
  serve, ranks = halved.serve, halved.mesh.sequence_shares
  assert ranks * serve.prefill_rows * serve.prefill_micro_batches == ranks * serve.slots == 128


@pytest.mark.parametrize(
  ("mesh", "layers"),
  [
    ((1, 1, 1), 4), ((2, 2, 2), 4), ((4, 2, 1), 4), ((2, 1, 4), 4), ((8, 1, 1), 4), ((1, 8, 1), 4),
    ((1, 1, 8), 8), ((8, 4, 2), 4),
  ],
)  # fmt: skip
def test_tiny_fits_every_mesh_that_tests_use(mesh, layers):
  shape = dict(zip(("expert", "tensor", "stage"), mesh, strict=True))
  tiny = build("tiny", mesh=shape, model={"layers": layers})
  # Each expert has room for every token, so that no router and no mesh drops one.
  assert tiny.moe.capacity_factor * tiny.model.experts_per_token >= tiny.model.experts
