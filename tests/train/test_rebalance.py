"""When experts move and where to, and what the folder of a run that moves them says."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax.balance import monitor, packing, placement
from moe_jax.plan import hardware
from moe_jax.train import loop, migration, rebalance, state
from moe_jax.train import optimizer as optimizer_lib
from moe_jax.train.checkpoint import Checkpoints
from tests import runs
from tests.train import parity
from tests.train.test_migration import logical, order_of


@pytest.fixture(autouse=True, scope="module")
def optax_promotes():
  with jax.numpy_dtype_promotion("standard"):
    yield


def balancer_of(mesh=(4, 1, 1), placed=None, steps=1000, **different):
  balance = {"every": 10, **different.pop("balance", {})}
  moe = {"dispatch": "dropless", **different.pop("moe", {})}
  settings = parity.settings_of(mesh, moe=moe, **different)
  settings = dataclasses.replace(
    settings,
    balance=config_lib.Balance(**balance),
    train=dataclasses.replace(settings.train, steps=steps),
  )
  placed = placed or rebalance.begin(settings.model)
  expert_bytes = migration.expert_bytes(settings, optimizer_lib.make(settings.train))
  return settings, rebalance.Balancer(settings, order_of(settings), placed, expert_bytes)


def uneven(num_layers=8, num_experts=8):
  """Returns tokens_LE of which the first rank has most, and no expert more than a rank's share."""
  return np.tile(np.array([90, 80, 60, 50, 30, 20, 15, 10])[:num_experts], (num_layers, 1)) * 100


def test_experts_move_when_due_and_what_is_foreseen_is_what_the_move_brings():
  settings, balancer = balancer_of()
  first_LP = balancer.expert_LP
  assert balancer.look(10) is None  # nothing was seen
  balancer.observe(uneven())
  balancer.observe(uneven())
  assert [balancer.look(num_done) for num_done in (1, 9, 11, 15)] == [None] * 4
  assert balancer.placed.num_steps == 2
  look = balancer.look(20)
  packing.check(balancer.expert_LP, 8, num_ranks=4)
  ratio = lambda expert_LP: monitor.max_over_mean(packing.rank_loads(expert_LP, uneven(), 4))
  np.testing.assert_allclose(look.before_L, ratio(first_LP))
  np.testing.assert_allclose(look.after_L, ratio(balancer.expert_LP))
  assert look.after_L.max() < 1.15 < 1.9 < look.before_L.min()
  assert look.num_slots == placement.moved(first_LP, balancer.expert_LP, 4).sum()
  assert look.moved_bytes == look.num_slots * 3 * 3 * 16 * 16 * 4
  peaks = lambda expert_LP: packing.rank_loads(expert_LP, uneven(), 4).max(1).sum()
  shrunk = (peaks(first_LP) - peaks(balancer.expert_LP)) / settings.pipeline.micro_batches
  assert look.gain_tokens == pytest.approx(shrunk * 10 * settings.pipeline.micro_batches)
  expected = migration.moves(first_LP, balancer.expert_LP, order_of(settings), settings.mesh)
  for found, right in zip(look.moves, expected, strict=True):
    np.testing.assert_array_equal(found, right)
  assert f"{look.num_slots} experts move, {look.moved_bytes:,} bytes: busiest" in str(look)
  assert look.figures()["moved_experts"] == look.num_slots
  # The window begins anew, and an even one moves nothing.
  assert balancer.placed.num_steps == 0 and not balancer.placed.tokens_LE.any()
  balancer.observe(uneven())
  at_LP = balancer.expert_LP
  again = balancer.look(30)
  assert again.moves is None and again.moved_bytes == 0
  assert "experts stay" in str(again)
  assert balancer.expert_LP is at_LP


def test_what_pays_until_the_next_look_is_done_and_no_more():
  tokens_LE = uneven() * 2 ** np.arange(8)[:, None] // 40_000  # of few layers it is worth the while
  looks = {}
  for every in (2 ** np.arange(11)).tolist():
    _, balancer = balancer_of(balance={"every": every}, steps=10_000)
    balancer.observe(tokens_LE)
    looks[every] = look = balancer.look(every)
    assert (look.moves is not None) == (look.gain_tokens > look.cost_tokens)
    assert look.cost_tokens > 0
    assert bool(look.moved_bytes) == (look.moves is not None)
    assert (balancer.expert_LP == np.arange(8)).all() == (look.moves is None)
  assert looks[1].moves is None and "experts stay: to move" in str(looks[1])
  net = lambda look: look.gain_tokens - look.cost_tokens
  assert [net(look) for look in looks.values()] == sorted(net(look) for look in looks.values())
  every, part = next((every, look) for every, look in looks.items() if look.moves is not None)
  whole = looks[1024]
  assert part.num_slots < whole.num_slots
  assert net(part) > whole.gain_tokens * every / 1024 - whole.cost_tokens


def test_a_slower_link_makes_a_move_dearer():
  costs = {}
  for chip in ("a100", "h100"):
    _, balancer = balancer_of(balance={"chip": chip}, model={"d_model": 256, "dtype": "bfloat16"})
    balancer.observe(uneven())
    costs[chip] = balancer.look(10).cost_tokens
  # By hand: of one expert 3 x 256 x 16 weights, three times in float32; a token's share of
  # 4 x 256 elements there and back, and 6 operations a weight.
  weights = 3 * 256 * 16
  by_hand = lambda flops, link: weights * 12 / link / (6 * weights / flops + 2048 / link)
  rounds = costs["h100"] / by_hand(989.4e12, 50e9)
  assert rounds == pytest.approx(round(rounds))
  assert costs["a100"] == pytest.approx(rounds * by_hand(312e12, 25e9))
  _, balancer = balancer_of(
    moe={"expert_ranks_per_host": 4}, model={"d_model": 256, "dtype": "bfloat16"}
  )
  balancer.observe(uneven())
  assert balancer.look(10).cost_tokens == pytest.approx(rounds * by_hand(989.4e12, 450e9))


def test_of_two_copies_each_serves_half_and_sends_half():
  looks = {}
  for copies in (1, 2):
    _, balancer = balancer_of(mesh=(4, 1, 1, copies))
    balancer.observe(uneven())
    looks[copies] = balancer.look(10)
  np.testing.assert_array_equal(looks[1].moves[0], looks[2].moves[0])
  assert looks[2].gain_tokens == pytest.approx(looks[1].gain_tokens / 2)
  assert looks[2].cost_tokens == pytest.approx(looks[1].cost_tokens / 2)
  assert looks[2].moved_bytes == looks[1].moved_bytes


def test_no_more_experts_move_than_allowed():
  _, balancer = balancer_of(balance={"most_moved": 4})
  before_LP = balancer.expert_LP
  balancer.observe(uneven())
  look = balancer.look(10)
  assert 0 < look.num_slots <= 4
  assert placement.moved(before_LP, balancer.expert_LP, 4).sum() == look.num_slots
  assert look.after_L.mean() < look.before_L.mean()


def test_where_a_tokens_hosts_are_limited_experts_of_a_host_stay_together():
  _, balancer = balancer_of(moe={"hosts_per_token": 1, "expert_ranks_per_host": 2})
  balancer.observe(uneven())
  look = balancer.look(10)
  hosts_LHe = np.sort(balancer.expert_LP.reshape(8, 2, 4))
  assert look.moves is not None
  np.testing.assert_array_equal(np.sort(hosts_LHe[:, :, 0]), np.tile([0, 4], (8, 1)))
  np.testing.assert_array_equal(hosts_LHe - hosts_LHe[..., :1], np.tile(np.arange(4), (8, 2, 1)))
  # Without the limit the same load is spread over hosts.
  _, free = balancer_of(moe={"expert_ranks_per_host": 2})
  free.observe(uneven())
  assert free.look(10).after_L.mean() < look.after_L.mean()


@pytest.mark.parametrize(
  ("mesh", "every", "num_done"), [((1, 1, 1), 10, 10), ((4, 1, 1), 0, 10), ((4, 1, 1), 10, 1000)]
)
def test_nothing_moves_on_one_rank_or_unasked_or_after_the_last_step(mesh, every, num_done):
  _, balancer = balancer_of(mesh, balance={"every": every})
  balancer.observe(uneven())
  assert balancer.look(num_done) is None


def test_a_placement_comes_back_from_a_checkpoint_as_it_was():
  settings, balancer = balancer_of()
  balancer.observe(uneven())
  balancer.look(10)
  balancer.observe(uneven())
  meta = json.loads(json.dumps(rebalance.as_meta(balancer.placed)))
  found, is_kept = rebalance.from_meta(meta, settings)
  assert is_kept
  for mine, its in zip(found, balancer.placed, strict=True):
    np.testing.assert_array_equal(mine, its)
  _, resumed = balancer_of(placed=found)
  assert resumed.look(20).gain_tokens == balancer.look(20).gain_tokens
  old, is_kept = rebalance.from_meta(None, settings)
  assert is_kept and old.num_steps == 0
  np.testing.assert_array_equal(old.expert_LP, np.tile(np.arange(8), (8, 1)))


def test_a_placement_over_other_hosts_than_a_token_may_choose_is_left():
  settings, balancer = balancer_of()
  balancer.observe(uneven())
  balancer.look(10)
  limited = dataclasses.replace(settings, moe=dataclasses.replace(settings.moe, hosts_per_token=2))
  found, is_kept = rebalance.from_meta(rebalance.as_meta(balancer.placed), limited)
  assert not is_kept
  np.testing.assert_array_equal(found.expert_LP, np.tile(np.arange(8), (8, 1)))
  assert rebalance.from_meta(rebalance.as_meta(rebalance.begin(settings.model)), limited)[1]


@pytest.mark.parametrize(
  ("expert_LP", "message"),
  [
    (np.tile(np.arange(8), (4, 1)), r"shape \(4, 8\), expected \(8, 8\)"),
    (np.zeros((8, 8), int), "no slot of layer 0 holds expert 1"),
  ],
)
def test_what_is_no_placement_is_refused(expert_LP, message):
  settings, _ = balancer_of()
  meta = rebalance.as_meta(rebalance.begin(settings.model)._replace(expert_LP=expert_LP))
  with pytest.raises(ValueError, match=message) as error:
    rebalance.from_meta(meta, settings)
  assert "\n" not in str(error.value)


def test_the_chips_of_the_config_are_those_of_the_table():
  assert tuple(hardware.CHIPS) == config_lib.CHIPS
  with pytest.raises(ValueError, match=r"balance\.chip='h1000' is not one of .* did you mean h100"):
    config_lib.Balance(chip="h1000")
  with pytest.raises(ValueError, match=r"balance\.every=-1 is negative"):
    config_lib.Balance(every=-1)
  with pytest.raises(ValueError, match="planned has no peak for dtype 'float32'"):
    balancer_of(balance={"chip": "planned"})


PIPELINE = {"schedule": "interleaved", "chunks": 2, "micro_batches": 4}
RUN = {"pipeline": PIPELINE, "moe": {"dispatch": "dropless"}}


def train(workdir, **different):
  stream = io.StringIO()
  outcome = loop.train(runs.settings(**{**RUN, **different}), workdir, stream=stream)
  return outcome, stream.getvalue()


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
  """A run of 8 steps, saved after 4 and 8, whose experts move every other step."""
  workdir = tmp_path_factory.mktemp("rebalance") / "moving"
  return workdir, *train(workdir, balance={"every": 2})


@pytest.fixture(scope="module")
def staying(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("rebalance") / "staying"
  return workdir, *train(workdir)


def is_moved(outcome):
  return (outcome.expert_LP != np.arange(8)).any()


def leaves_of(outcome, settings):
  return logical(outcome.state, order_of(settings), outcome.expert_LP)


def test_a_run_that_moves_experts_computes_what_one_that_does_not(moving, staying):
  (workdir, outcome, text), (plain, without, _) = moving, staying
  assert is_moved(outcome) and not is_moved(without)
  assert "after step 2: " in text and "experts move" in text and "x the mean, worth" in text
  rows, plain_rows = runs.rows(workdir), runs.rows(plain)
  figure = lambda rows, name: [row[name] for row in rows]
  for name in ("loss", "grad_norm", "load_balance_loss"):
    assert figure(rows, name) == pytest.approx(figure(plain_rows, name), rel=1e-5)
  assert figure(rows, "load_max_over_mean") == figure(plain_rows, "load_max_over_mean")
  assert (workdir / "load.jsonl").read_text() == (plain / "load.jsonl").read_text()
  assert outcome.eval_loss == pytest.approx(without.eval_loss, rel=1e-5)
  moved = [row["moved_experts"] for row in rows if row.get("moved_experts") is not None]
  assert len(moved) == 3 and any(moved)  # looks after 2, 4, 6; none after the last step
  assert sum(row.get("moved_bytes") or 0 for row in rows) == sum(moved) * 3 * 3 * 16 * 16 * 4
  settings = runs.settings(**RUN)
  found, expected = leaves_of(outcome, settings), leaves_of(without, settings)
  parameters = [name for name in expected if name.startswith(".parameters")]
  far = {name: parity.relative_l2(found[name], expected[name]) for name in parameters}
  assert not {name: each for name, each in far.items() if not each <= parity.TOLERANCE}


def saved_leaves(workdir, outcome, step_id):
  """Returns a checkpoint's leaves and meta, on the devices of an outcome's state."""
  checkpoints = Checkpoints(workdir / "checkpoints", keep=9, report=pytest.fail)
  struct = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
  try:
    found_step, leaves, meta = checkpoints.restore(
      state.by_name(jax.tree.map(struct, outcome.state))
    )
  finally:
    checkpoints.close()
  assert found_step == step_id
  return leaves, meta


def test_checkpoints_hold_experts_in_logical_order_and_where_they_were(moving):
  workdir, outcome, _ = moving
  leaves, meta = saved_leaves(workdir, outcome, 8)
  np.testing.assert_array_equal(meta["experts"]["expert_LP"], outcome.expert_LP)
  expected = leaves_of(outcome, runs.settings(**RUN)).values()
  for name, values in zip(state.by_name(outcome.state), expected, strict=True):
    np.testing.assert_array_equal(np.asarray(leaves[name]), values, err_msg=name)


def test_resumed_on_the_same_mesh_it_is_bit_identical(moving, tmp_path):
  workdir, never_stopped, _ = moving
  copy = shutil.copytree(workdir, tmp_path / "copy")
  shutil.rmtree(copy / "checkpoints" / "8")
  outcome, text = train(copy, balance={"every": 2})
  assert "resumed after step 4" in text and "changed" not in text
  np.testing.assert_array_equal(outcome.expert_LP, never_stopped.expert_LP)
  for mine, its in zip(
    jax.tree.leaves(outcome.state), jax.tree.leaves(never_stopped.state), strict=True
  ):
    np.testing.assert_array_equal(np.asarray(mine), np.asarray(its))
  timed = ("tokens_per_s", "look_s")
  figures_of = lambda folder: [
    {name: value for name, value in row.items() if name not in timed} for row in runs.rows(folder)
  ]
  assert figures_of(copy) == figures_of(workdir)


@pytest.mark.slow
def test_resumed_on_another_number_of_ranks_it_goes_on_to_float_tolerance(moving, tmp_path):
  workdir, never_stopped, _ = moving
  copy = shutil.copytree(workdir, tmp_path / "copy")
  shutil.rmtree(copy / "checkpoints" / "8")
  mesh, pipeline = {"expert": 4, "tensor": 2, "stage": 1}, {"schedule": "gpipe", "chunks": 1}
  outcome, text = train(
    copy, mesh=mesh, pipeline={**PIPELINE, **pipeline}, balance={"every": 2, "most_moved": 4}
  )
  assert "mesh.expert 2 -> 4" in text and is_moved(outcome)
  losses = lambda folder: [row["loss"] for row in runs.rows(folder)]
  assert losses(copy) == pytest.approx(losses(workdir), rel=1e-5)
  assert outcome.eval_loss == pytest.approx(never_stopped.eval_loss, rel=1e-5)


def test_a_checkpoint_from_before_experts_moved_has_them_where_they_began(staying, tmp_path):
  workdir, outcome, _ = staying
  copy = shutil.copytree(workdir, tmp_path / "copy")
  leaves, meta = saved_leaves(copy, outcome, 8)
  del meta["experts"], meta["config"]["balance"]
  checkpoints = Checkpoints(copy / "checkpoints", keep=9, report=pytest.fail)
  checkpoints.save(8, leaves, meta)
  checkpoints.close()
  again, text = train(copy)
  assert "holds a finished run: 8 steps" in text and "changed" not in text
  assert not is_moved(again) and again.eval_loss == outcome.eval_loss
  for mine, its in zip(jax.tree.leaves(again.state), jax.tree.leaves(outcome.state), strict=True):
    np.testing.assert_array_equal(np.asarray(mine), np.asarray(its))
