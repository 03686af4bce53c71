"""Parity machinery: the oracle's weights and batch on a mesh, production's answers as its tree.

`python -m tests.train.parity '{"mesh": {...}, ...}'` prints the differences of one case as JSON,
for meshes that need more devices than pytest has. Knows tests/reference.py and the train step; it
must not know which cases are tested.
"""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.model import transformer
from moe_jax.model.transformer import Inputs, Parameters
from moe_jax.parallel import collectives
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel.axes import DATA, EXPERT, STAGE, TENSOR
from moe_jax.pipeline import executor
from moe_jax.pipeline.schedules import forward_only
from moe_jax.train import state, step
from tests import reference

TOLERANCE = 1e-5  # relative L2, float32
BFLOAT16_TOLERANCE = 3e-2  # likewise, of logits against float32 ones
MODEL = {
  "layers": 8, "d_model": 16, "heads": 8, "kv_heads": 8, "head_dim": 4, "experts": 8,
  "experts_per_token": 2, "expert_hidden": 16, "vocab": 256, "dtype": "float32",
}  # fmt: skip
# Each expert has room for every token of a rank: the oracle drops none.
MOE = {"capacity_factor": 4.0}


def settings_of(mesh, *, batch=None, sequence=16, model=None, pipeline=None, moe=None):
  """Returns the small Config of a case; `batch` defaults to 8 sequences a micro-batch."""
  pipeline = {"schedule": "1f1b", "micro_batches": 2, **(pipeline or {})}
  return config.from_mapping(
    {
      "model": {**MODEL, **(model or {})},
      "mesh": dict(zip(("expert", "tensor", "stage", "data"), mesh, strict=False)),
      "pipeline": pipeline,
      "moe": {**MOE, **(moe or {})},
      "train": {"batch": batch or 8 * pipeline["micro_batches"], "sequence": sequence},
    }
  )


def mesh_of(settings: config.Config) -> jax.sharding.Mesh:
  """Returns the mesh on as many of the first devices as it needs."""
  return mesh_lib.make(settings.mesh, jax.devices()[: settings.mesh.num_devices])


def parameters_on(mesh, settings: config.Config, params: dict) -> Parameters:
  """Returns the oracle's tree as production's parameters, placed and in the pipeline's order."""
  template = jax.eval_shape(lambda: transformer.init(jax.random.key(0), settings.model))
  layers = jax.tree_util.tree_map_with_path(
    lambda path, _: np.asarray(_find(params["layers"], path))[_order(settings)], template.layers
  )
  shared = jax.tree_util.tree_map_with_path(
    lambda path, _: np.asarray(_find(params, path)), template.shared
  )
  specs = transformer.specs(settings.model)
  place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
  return jax.tree.map(place, Parameters(layers, shared), specs)


def inputs_on(mesh, settings: config.Config, batch: dict) -> Inputs:
  """Returns the oracle's batch [B, S] as production's inputs [U, B / U, S]."""
  micro_batches = settings.pipeline.micro_batches
  leaves = [
    np.asarray(batch[name]).reshape(micro_batches, -1, batch[name].shape[-1])
    for name in ("tokens", "targets", "positions", "segments", "weights")
  ]
  place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
  return jax.tree.map(place, Inputs(*leaves), step.inputs_spec())


def as_reference(settings: config.Config, gradients: Parameters) -> dict:
  """Returns production's tree as numpy in logical order, {"layers/attention/query": array, ...}."""
  logical = np.argsort(_order(settings))
  return {
    name: np.asarray(leaf)[logical] if name.startswith("layers/") else np.asarray(leaf)
    for name, leaf in named(gradients).items()
  }


def named(parameters: Parameters) -> dict:
  """Returns the leaves of production's tree by the oracle's names."""
  layers = jax.tree.leaves_with_path(parameters.layers)
  shared = jax.tree.leaves_with_path(parameters.shared)
  return {f"layers/{_name(path)}": leaf for path, leaf in layers} | {
    _name(path): leaf for path, leaf in shared
  }


def logits(settings: config.Config, mesh):
  """Returns (parameters, inputs) -> production's logits [U, B / U, S, V], run forward only."""
  functions = transformer.logits_functions(settings)
  schedule = forward_only(step.table(settings))

  def region(parameters, inputs):
    layers, shared = collectives.varying(parameters)
    return executor.run(functions, schedule, layers, shared, inputs).outputs

  return jax.shard_map(
    region,
    mesh=mesh,
    in_specs=(transformer.specs(settings.model), step.inputs_spec()),
    out_specs=P(None, (DATA, EXPERT), None, (STAGE, TENSOR)),
  )


def relative_l2(found, expected) -> float:
  """Returns the norm of the difference over that of `expected`, in float64."""
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  assert found.shape == expected.shape, (found.shape, expected.shape)
  return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


class Oracle:
  """The reference's fixture of a case and what it makes of it."""

  def __init__(self, settings: config.Config):
    self.params, self.batch = reference.fixture(settings)
    self.margin = reference.margin(self.params, settings.model, self.batch)
    gradient = jax.value_and_grad(reference.loss, has_aux=True)
    (self.loss, self.parts), tree = gradient(self.params, settings, self.batch)
    self.gradients = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    names = ("tokens", "positions", "segments")
    inputs = (self.batch[name] for name in names)
    self.logits = np.asarray(reference.logits(self.params, settings.model, *inputs))


def oracle(settings: config.Config) -> Oracle:
  """Returns the oracle of a case; meshes, schedules and save policies share it."""
  moe = dataclasses.replace(
    config.Moe(),
    load_balance_weight=settings.moe.load_balance_weight,
    router_z_weight=settings.moe.router_z_weight,
  )
  pipeline = config.Pipeline(micro_batches=settings.pipeline.micro_batches)
  return _oracle(
    config.Config(model=settings.model, train=settings.train, pipeline=pipeline, moe=moe)
  )


@functools.cache
def _oracle(settings: config.Config) -> Oracle:
  return Oracle(settings)


def differences(settings: config.Config) -> dict[str, float]:
  """Returns the relative L2 of loss, logits and every gradient leaf, and `margin`.

  Raises:
    AssertionError: production's gradients are not the oracle's leaves, or its experts' loads, its
      dropped tokens or its number of ticks differ.
  """
  expected, mesh = oracle(settings), mesh_of(settings)
  parameters = parameters_on(mesh, settings, expected.params)
  inputs = inputs_on(mesh, settings, expected.batch)
  gradient = step.loss_and_gradients(settings, mesh)
  losses, tree, norm = jax.jit(lambda p, i: gradient(p, step.normalised(i)))(parameters, inputs)
  gradients = as_reference(settings, tree)
  assert set(gradients) == set(expected.gradients)
  logical = np.argsort(_order(settings))
  loads = np.asarray(losses.report.assigned_E)[logical]
  np.testing.assert_array_equal(loads, np.asarray(expected.parts["counts"]))
  assert int(losses.report.counts.dropped.sum()) == 0
  assert int(losses.ticks) == step.table(settings).num_ticks
  if settings.model.router_bias:  # no gradient reaches it: exactly zero in both
    assert not gradients.pop("layers/router/bias").any()
    assert not np.asarray(expected.gradients["layers/router/bias"]).any()
  found = {name: relative_l2(gradients[name], expected.gradients[name]) for name in gradients}
  squares = sum(np.square(np.float64(each)).sum() for each in expected.gradients.values())
  found["norm"] = relative_l2(norm, np.sqrt(squares))
  found["loss"] = relative_l2(losses.total, expected.loss)
  found["cross_entropy"] = relative_l2(losses.cross_entropy, expected.parts["cross_entropy"])
  logits_UBSV = np.asarray(jax.jit(logits(settings, mesh))(parameters, inputs))
  found["logits"] = relative_l2(logits_UBSV.reshape(expected.logits.shape), expected.logits)
  return found | {"margin": expected.margin}


def _order(settings):
  return state.placement(settings, step.table(settings).layer_order)


def _find(tree, path):
  for key in _keys(path):
    tree = tree[key]
  return tree


def _name(path):
  return "/".join(_keys(path))


def _keys(path):
  """Returns the names of a path, without the nnx.Variable that holds the leaf."""
  return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]


if __name__ == "__main__":
  case = json.loads(sys.argv[1])
  print(json.dumps(differences(settings_of(**case))))
