"""Experts in other slots: every leaf that has them moves, only they travel, and steps with moves
between them equal those without.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import config as config_lib
from moe_jax.train import figures, migration, rebalance, state, step
from moe_jax.train import optimizer as optimizer_lib
from tests import reference
from tests.train import parity
from tests.train.test_stealing import skewed

COLLECTIVES = ("all-", "collective-", "reduce-scatter")


@pytest.fixture(autouse=True, scope="module")
def optax_promotes():
  with jax.numpy_dtype_promotion("standard"):
    yield


def shuffled(seed, num_layers, num_experts, num_groups=1):
  """Returns expert_LP at random, with neighbouring experts of a group on neighbouring slots."""
  rng, size = np.random.default_rng(seed), num_experts // num_groups
  of_layer = lambda: [group * size + rng.permutation(size) for group in rng.permutation(num_groups)]
  return np.stack([np.concatenate(of_layer()) for _ in range(num_layers)])


def logical(state_, order, expert_LP):
  """Returns the leaves of a state by path, layers and experts in logical order, by hand."""
  layers, experts = np.argsort(order), np.argsort(expert_LP, 1)
  found = {}
  for path, leaf in jax.tree.leaves_with_path(state_):
    name, values = jax.tree_util.keystr(path), np.asarray(leaf)
    if ".layers[" in name:
      values = values[layers]
    if "['experts']" in name:
      values = np.stack([each[e] for each, e in zip(values, experts, strict=True)])
    if "['router']" in name:
      values = np.stack([each[..., e] for each, e in zip(values, experts, strict=True)])
    found[name] = values
  return found


def order_of(settings):
  return state.placement(settings, step.table(settings).layer_order)


@pytest.mark.parametrize("mesh", [(2, 2, 2), (4, 1, 2), (8, 1, 1), (1, 2, 1)])
def test_rounds_are_the_most_that_any_rank_sends_so_far(mesh):
  settings = parity.settings_of(mesh, model={"experts": 16})
  before_LP, after_LP = shuffled(0, 8, 16), shuffled(1, 8, 16)
  order = np.arange(8)[::-1]
  found = migration.moves(before_LP, after_LP, order, settings.mesh)
  num_ranks, num_stages = mesh[0], mesh[2]
  slow = np.zeros((8 // num_stages, num_ranks - 1), int)
  for place in range(8):
    sent = np.zeros((num_ranks, num_ranks), int)
    for slot, expert in enumerate(after_LP[order[place]]):
      source = found.source_LP[place, slot]
      assert before_LP[order[place]][source] == expert
      sent[source * num_ranks // 16, slot * num_ranks // 16] += 1
    for rank in range(num_ranks):
      for by in range(1, num_ranks):
        far = sent[rank, (rank + by) % num_ranks]
        at = (place % (8 // num_stages), by - 1)
        slow[at] = max(slow[at], far)
  np.testing.assert_array_equal(found.rounds_lW, slow)
  assert migration.num_rounds(found) == slow.sum()
  nowhere = migration.moves(before_LP, before_LP, order, settings.mesh)
  assert migration.num_rounds(nowhere) == 0


def abstract_state(settings, places, optimizer):
  struct = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
  return jax.tree.map(struct, state.abstract(settings.model, optimizer), places)


def random_state(settings, mesh, optimizer):
  """Returns a state of which no two numbers of a leaf are the same, and its abstract twin."""
  places = state.shardings(settings, mesh, optimizer)
  abstract = abstract_state(settings, places, optimizer)
  count = lambda leaf: np.arange(leaf.size).reshape(leaf.shape).astype(leaf.dtype)
  put = lambda leaf, place: jax.device_put(count(leaf), place)
  return jax.tree.map(put, abstract, places), abstract


@pytest.mark.parametrize("mesh", [(2, 2, 2), (4, 1, 2), (4, 1, 1, 2)])
@pytest.mark.parametrize("router_bias", [False, True])
def test_every_leaf_with_experts_moves_and_nothing_else(mesh, router_bias):
  settings = parity.settings_of(mesh, model={"layers": 4, "router_bias": router_bias})
  devices, optimizer = parity.mesh_of(settings), optimizer_lib.make(settings.train)
  now, abstract = random_state(settings, devices, optimizer)
  order, at_LP = np.array([2, 0, 3, 1]), rebalance.begin(settings.model).expert_LP
  expected = logical(now, order, at_LP)
  move = migration.program(settings, devices, optimizer, abstract)
  for seed in range(2):
    to_LP = shuffled(seed, 4, 8)
    before = now
    now = move(now, migration.moves(at_LP, to_LP, order, settings.mesh))
    at_LP = to_LP
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.parameters))
    found = logical(now, order, at_LP)
    for name, values in expected.items():
      np.testing.assert_array_equal(found[name], values, err_msg=name)
  unmoved = logical(now, order, rebalance.begin(settings.model).expert_LP)
  moved = {name for name, values in expected.items() if (unmoved[name] != values).any()}
  assert len(moved) == 3 * (3 + router_bias)  # parameters and two moments


def test_only_experts_travel_and_few_wait_on_a_device():
  settings = parity.settings_of(
    (8, 1, 1), model={"experts": 16, "d_model": 64, "expert_hidden": 64}
  )
  devices, optimizer = parity.mesh_of(settings), optimizer_lib.make(settings.train)
  _, abstract = random_state(settings, devices, optimizer)
  told = migration.on_devices(
    migration.moves(shuffled(0, 8, 16), shuffled(1, 8, 16), np.arange(8), settings.mesh), devices
  )
  places = state.shardings(settings, devices, optimizer)
  move = migration.permute(settings, devices, optimizer)
  jitted = jax.jit(move, donate_argnums=0, out_shardings=places)
  compiled = jitted.lower(abstract, told).compile()
  text = compiled.as_text()
  sent = re.findall(r"= (\S+) ([a-z]+-[a-z-]+)(?:-start)?\(", text)
  sent = {(shape.split("{")[0], kind) for shape, kind in sent if kind.startswith(COLLECTIVES)}
  permutes = {(shape, "collective-permute") for shape in ("f32[64,2,64]", "f32[64,64]")}
  assert sent == permutes  # an expert's gate and up, and its down
  one = migration.expert_bytes(settings, optimizer)
  assert one == 3 * 3 * 64 * 64 * 4
  memory = compiled.memory_analysis()
  layer_bytes = 16 // 8 * one
  assert memory.temp_size_in_bytes <= 2.2 * layer_bytes
  told_bytes = sum(values.nbytes for values in told)
  assert memory.alias_size_in_bytes > 0.99 * (memory.argument_size_in_bytes - told_bytes)


def test_an_optimizer_whose_state_is_laid_out_otherwise_is_refused():
  settings = parity.settings_of((2, 2, 2), model={"layers": 4})
  factored = optax.scale_by_factored_rms(min_dim_size_to_factor=8)
  with pytest.raises(ValueError, match=r"expected .* as its parameter") as error:
    migration.expert_bytes(settings, factored)
  assert "\n" not in str(error.value)


# (expert, tensor, stage), pipeline, moe; every expert has room for all tokens of a rank.
CASES = {
  "2x2x2-1f1b-dropless-bias": (
    (2, 2, 2), {"micro_batches": 3, "save": "residuals"},
    {"dispatch": "dropless", "router_balance": "bias"},
  ),
  "4x1x2-interleaved-dropless-hosts": (
    (4, 1, 2), {"schedule": "interleaved", "chunks": 2},
    {"dispatch": "dropless", "hosts_per_token": 1, "expert_ranks_per_host": 2},
  ),
  "8x1x1-gpipe-stealing": (
    (8, 1, 1), {"schedule": "gpipe"}, {"dispatch": "stealing", "shadows": 2},
  ),
  "1x1x1-1f1b-dropless-quantile": (
    (1, 1, 1), {}, {"dispatch": "dropless", "router_balance": "quantile"},
  ),
}  # fmt: skip
NUM_STEPS = 4


class Steps:
  """A case's train step, compiled once, from skewed parameters."""

  def __init__(self, name):
    mesh, pipeline, moe = CASES[name]
    has_bias = moe.get("router_balance") in ("bias", "quantile")
    experts = 16 if mesh[0] == 8 else 8
    model = {"layers": 4, "experts": experts, "router_bias": has_bias}
    settings = parity.settings_of(mesh, model=model, pipeline=pipeline, moe=moe)
    train = dataclasses.replace(settings.train, steps=100, warmup_steps=0, learning_rate=1e-3)
    balance = config_lib.Balance(every=10)
    self.settings = dataclasses.replace(settings, train=train, balance=balance)
    self.devices, self.order = parity.mesh_of(settings), order_of(settings)
    self.optimizer = optimizer_lib.make(train)
    self.places = state.shardings(settings, self.devices, self.optimizer)
    params, batch = reference.fixture(settings)
    self.params = skewed(params, towards_first=True)
    self.inputs = parity.inputs_on(self.devices, settings, batch)
    abstract = abstract_state(self.settings, self.places, self.optimizer)
    self.move = migration.program(self.settings, self.devices, self.optimizer, abstract)
    self.take = jax.jit(
      step.train_step(self.settings, self.devices, self.optimizer),
      donate_argnums=0, out_shardings=(self.places, None),
    )  # fmt: skip

  def begin(self):
    parameters = parity.parameters_on(self.devices, self.settings, self.params)
    zero = jnp.zeros((), jnp.int32)
    begun = state.State(zero, parameters, self.optimizer.init(parameters), zero, zero)
    # By the host: a buffer that two leaves share cannot be donated twice.
    return jax.tree.map(lambda leaf, at: jax.device_put(np.array(leaf), at), begun, self.places)

  def run(self, moves_after):
    """Returns losses, logical leaves and each step's figures; `moves_after` names the next
    placement after each step but the last.
    """
    now, at_LP = self.begin(), rebalance.begin(self.settings.model).expert_LP
    losses, rows, tokens = [], [], []
    for step_id in range(NUM_STEPS):
      now, metrics = self.take(now, self.inputs)
      metrics = jax.device_get(metrics)
      losses.append(float(metrics.losses.total))
      rows.append(figures.row(metrics, self.order, at_LP, self.settings))
      tokens.append(figures.expert_tokens(metrics, self.order, at_LP))
      assert int(metrics.losses.report.counts.dropped.sum()) == 0
      to_LP = moves_after(step_id, at_LP, tokens[-1])
      if to_LP is not None:
        now = self.move(now, migration.moves(at_LP, to_LP, self.order, self.settings.mesh))
        at_LP = to_LP
    return np.array(losses), logical(now, self.order, at_LP), rows, tokens


@pytest.mark.parametrize("name", CASES)
def test_steps_with_moves_between_equal_those_without(name):
  steps = Steps(name)
  model, num_ranks = steps.settings.model, steps.settings.mesh.expert
  is_limited = steps.settings.moe.hosts_per_token > 0
  looks = []

  def moves_after(step_id, at_LP, tokens_LE):
    if step_id == NUM_STEPS - 1:
      return None
    if step_id == 0 and num_ranks > 1:
      placed = rebalance.Placed(at_LP, tokens_LE, 1)
      balancer = rebalance.Balancer(
        steps.settings, steps.order, placed, migration.expert_bytes(steps.settings, steps.optimizer)
      )
      looks.append(balancer.look(10))
      return balancer.expert_LP
    return shuffled(step_id, model.layers, model.experts, 2 if is_limited else 1)

  losses, leaves, rows, tokens = steps.run(moves_after)
  without_losses, without, without_rows, without_tokens = steps.run(lambda *_: None)
  assert steps.take._cache_size() == 1
  np.testing.assert_allclose(losses, without_losses, rtol=parity.TOLERANCE)
  # The optimizer's first moments are the gradients of all steps so far.
  found = {
    path: parity.relative_l2(leaves[path], values)
    for path, values in without.items()
    if np.linalg.norm(values.astype(np.float64))
  }
  assert len(found) >= 3 * (len(without) - 4) / 3
  assert not {path: far for path, far in found.items() if not far <= parity.TOLERANCE}
  # What is reported per expert is that of the same expert, wherever it sat.
  for with_LE, without_LE in zip(tokens, without_tokens, strict=True):
    np.testing.assert_array_equal(with_LE, without_LE)
  for with_row, without_row in zip(rows, without_rows, strict=True):
    np.testing.assert_array_equal(with_row["load_max_over_mean"], without_row["load_max_over_mean"])
  if looks:
    ratio = lambda row: row["rank_load_max_over_mean"].mean()
    np.testing.assert_allclose(rows[0]["rank_load_max_over_mean"], looks[0].before_L)
    # The same batch again, so what was foreseen comes true, up to what one step has learnt.
    assert ratio(rows[1]) < 0.75 * ratio(rows[0]) < ratio(without_rows[1]) or is_limited
    assert ratio(rows[1]) == pytest.approx(looks[0].after_L.mean(), rel=0.03)
