"""Ways to even the router, selected per run: the step against the oracle, how the bias moves, and
that nothing else moves it.
"""

import functools
import io

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.balance import bias as bias_rule
from moe_jax.balance import monitor
from moe_jax.train import loop, optimizer, state, step
from tests import reference, runs
from tests.train import parity
from tests.train.test_step import check

# (expert, tensor, stage), then what differs from the defaults of `parity.settings_of`.
CASES = {
  "2x2x2-interleaved-residuals": (
    (2, 2, 2),
    {
      "model": {"layers": 4, "normalize_choices": False},
      "pipeline": {"schedule": "interleaved", "chunks": 2, "save": "residuals"},
      "moe": {"router_balance": "quantile"},
    },
  ),
  "4x2x1-dropless": (
    (4, 2, 1),
    {"model": {"layers": 2}, "moe": {"router_balance": "bias", "dispatch": "dropless"}},
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_loss_logits_and_gradients_with_a_bias_equal_the_oracle(name):
  mesh, different = CASES[name]
  model = {**different["model"], "router_bias": True}
  # The oracle always adds the loss; here it is not the rule.
  moe = {**different["moe"], "load_balance_weight": 0.0}
  check(parity.differences(parity.settings_of(mesh, **{**different, "model": model, "moe": moe})))


def settings_of(rule, mesh=(1, 1, 1), **moe):
  model = {"layers": 2, "router_bias": True}
  moe = {"router_balance": rule, **moe}
  pipeline = {"micro_batches": 2}
  return parity.settings_of(mesh, model=model, moe=moe, pipeline=pipeline, sequence=32)


class Run:
  """The train step of a rule on a mesh, from skewed routers."""

  def __init__(self, settings: config.Config):
    train = config.Train(
      batch=settings.train.batch, sequence=settings.train.sequence, steps=1000, warmup_steps=0
    )
    self.settings, mesh = settings, parity.mesh_of(settings)
    made = optimizer.make(train)
    params = reference.init_params(jax.random.key(0), settings.model)
    batch = reference.random_batch(settings, 0)
    params["layers"]["router"]["bias"] = np.tile(
      -np.log1p(np.arange(8.0, dtype=np.float32)), (2, 1)
    )
    self.inputs = parity.inputs_on(mesh, settings, batch)
    parameters = parity.parameters_on(mesh, settings, params)
    zero = jax.device_put(np.int32(0), NamedSharding(mesh, P()))
    places = state.shardings(settings, mesh, made)
    begin = jax.jit(lambda p: state.State(zero, p, made.init(p), zero, zero), out_shardings=places)
    self.state = begin(parameters)
    self.step = jax.jit(step.train_step(settings, mesh, made), out_shardings=(places, None))

  @property
  def bias_LE(self):
    return np.asarray(self.state.parameters.layers["router"]["bias"][...])

  def advance(self, inputs=None):
    """Returns the step's counts [L, E]."""
    self.state, metrics = self.step(self.state, self.inputs if inputs is None else inputs)
    return np.asarray(metrics.losses.report.assigned_E), metrics


@functools.cache
def run_of(rule, mesh):
  with jax.numpy_dtype_promotion("standard"):
    run = Run(settings_of(rule, mesh))
    run.before_LE = run.bias_LE
    run.counts_LE, run.metrics = run.advance()
    run.after_LE = run.bias_LE
    return run


@pytest.mark.parametrize("rule", ["bias", "quantile"])
def test_every_mesh_moves_the_bias_alike(rule):
  one, many = run_of(rule, (1, 1, 1)), run_of(rule, (2, 2, 2))
  np.testing.assert_array_equal(one.counts_LE, many.counts_LE)
  np.testing.assert_allclose(one.after_LE, many.after_LE, atol=1e-6)
  assert abs(one.after_LE - one.before_LE).max() > 1e-3


def test_the_step_moves_the_bias_by_its_counts_alone():
  # Neither learning rate nor weight decay, which moves an entry of 2 by 6e-4.
  run = run_of("bias", (2, 2, 2))
  expected_LE = bias_rule.update(run.before_LE, run.counts_LE, run.settings.moe.bias_speed)
  np.testing.assert_allclose(run.after_LE, expected_LE, atol=1e-6)


@pytest.mark.parametrize("rule", ["bias", "quantile"])
def test_the_optimizer_holds_nothing_of_the_bias(rule):
  run = run_of(rule, (2, 2, 2))
  found = [
    leaf
    for path, leaf in jax.tree.leaves_with_path(run.state.optimizer)
    if "['bias']" in jax.tree_util.keystr(path)
  ]
  assert len(found) == 2 and not any(np.asarray(leaf).any() for leaf in found)  # both moments


@pytest.mark.parametrize(
  ("rule", "num_steps", "most"), [("bias", 250, 1.15), ("quantile", 4, 1.15)]
)
def test_a_skewed_load_becomes_even(rule, num_steps, most, standard_dtype_promotion):
  run = run_of(rule, (1, 1, 1))
  first = monitor.max_over_mean(run.counts_LE)
  for _ in range(num_steps):
    counts_LE, _ = run.advance()
  assert first.min() > 1.5
  assert monitor.max_over_mean(counts_LE).max() < most


def test_a_step_that_is_not_finite_leaves_the_bias(standard_dtype_promotion):
  run = run_of("bias", (2, 2, 2))
  before_LE = run.bias_LE
  weights_bS = run.inputs.weights_bS * np.float32(np.nan)
  _, metrics = run.advance(run.inputs._replace(weights_bS=weights_bS))
  assert not metrics.is_finite
  np.testing.assert_array_equal(run.bias_LE, before_LE)


def test_a_run_keeps_its_bias_in_checkpoints(tmp_path, standard_dtype_promotion):
  settings = runs.settings(
    model={"router_bias": True, "layers": 2},
    moe={"router_balance": "bias"},
    mesh={"expert": 1, "tensor": 1, "stage": 1},
    train={"steps": 2, "checkpoint_every": 2, "eval_every": 2},
  )
  # The second finds the first's checkpoint, and has nothing left to do but to evaluate it.
  first, second = (
    loop.train(settings, tmp_path, stream=io.StringIO(), devices=jax.devices()[:1])
    for _ in range(2)
  )
  biases = [
    np.asarray(each.state.parameters.layers["router"]["bias"][...]) for each in (first, second)
  ]
  np.testing.assert_array_equal(*biases)
  assert biases[0].any() and first.eval_loss == second.eval_loss
