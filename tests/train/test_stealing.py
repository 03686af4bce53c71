"""The train step with stealing is that of dropless without: loss and every gradient leaf, under
skewed routing; and whatever the load, one program.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.train import step
from tests import reference
from tests.train import parity

# (expert, tensor, stage), then the pipeline.
CASES = {
  "2x2x2-1f1b-residuals": ((2, 2, 2), {"micro_batches": 3, "save": "residuals"}),
  "4x1x2-interleaved-everything": (
    (4, 1, 2), {"schedule": "interleaved", "chunks": 2, "save": "everything"},
  ),
}  # fmt: skip
SHADOWS = 3


def settings_of(name, dispatch):
  mesh, pipeline = CASES[name]
  moe = {"dispatch": dispatch, "capacity_factor": 1.25, "shadows": SHADOWS}
  return parity.settings_of(mesh, model={"layers": 4}, pipeline=pipeline, moe=moe)


def skewed(params, towards_first):
  """Returns parameters whose routers prefer the first experts, so the first rank, or the last."""
  num_experts = params["layers"]["router"]["kernel"].shape[2]
  popular_E = -1.0 * np.log1p(np.arange(num_experts, dtype=np.float32))
  popular_E = popular_E if towards_first else popular_E[::-1]
  layers, embedding = params["layers"], params["embedding"]
  # Every token has the same part along the first axis, which the routers read.
  table_VD = jnp.asarray(embedding["table"]).at[:, 0].set(3.0)
  kernel_LDE = jnp.asarray(layers["router"]["kernel"]).at[:, 0].set(popular_E)
  return {
    **params,
    "embedding": {**embedding, "table": table_VD},
    "layers": {**layers, "router": {**layers["router"], "kernel": kernel_LDE}},
  }


def run(settings, all_params, batch):
  """Returns losses and gradients for each of the parameters, and how often it compiled."""
  mesh = parity.mesh_of(settings)
  gradient = step.loss_and_gradients(settings, mesh)
  jitted = jax.jit(lambda parameters, inputs: gradient(parameters, step.normalised(inputs)))
  inputs = parity.inputs_on(mesh, settings, batch)
  found = []
  for params in all_params:
    losses, tree, _ = jitted(parity.parameters_on(mesh, settings, params), inputs)
    found.append((jax.device_get(losses), parity.as_reference(settings, tree)))
  return found, jitted._cache_size()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_those_without(name):
  settings = settings_of(name, "stealing")
  params, batch = reference.fixture(settings)
  all_params = [skewed(params, True), skewed(params, False), params]
  for each in all_params:  # no choice is so close that rounding flips it
    assert reference.margin(each, settings.model, batch) > reference.MARGIN
  stolen, compiled = run(settings, all_params, batch)
  without, _ = run(settings_of(name, "dropless"), all_params, batch)
  assert compiled == 1
  for (losses, gradients), (losses_without, gradients_without) in zip(stolen, without, strict=True):
    found = {"loss": parity.relative_l2(losses.total, losses_without.total)}
    for leaf, gradient in gradients_without.items():
      assert np.linalg.norm(gradient) > 0
      found[leaf] = parity.relative_l2(gradients[leaf], gradient)
    assert not {leaf: far for leaf, far in found.items() if not far <= parity.TOLERANCE}
    counts = losses.report.counts
    assert (counts.kept == counts.sent).all() and not losses_without.report.counts.stolen.any()
  for (losses, _), (losses_without, _) in zip(stolen[:2], without[:2], strict=True):
    check_stolen(settings, losses.report, losses_without.report)


def check_stolen(settings, report, report_without):
  """Checks that idle ranks took what the busy ones had above the mean, to a token for each source
  and expert that is split, and that even ranks need fewer exchanges.
  """
  model, mesh = settings.model, settings.mesh
  load_LX = report.assigned_E.reshape(model.layers, mesh.expert, -1).sum(2)
  excess_L = np.maximum(load_LX - load_LX.mean(1, keepdims=True), 0).sum(1)
  slack = settings.pipeline.micro_batches * mesh.expert * mesh.tensor * SHADOWS
  assert (excess_L > 3 * slack).all()
  assert (abs(report.counts.stolen - excess_L) <= slack).all()
  rounds_L, without_L = report.counts.rounds, report_without.counts.rounds
  assert (rounds_L <= without_L).all() and rounds_L.sum() < 0.7 * without_L.sum()
