"""Policies over streams: tokens conserved, legal rows, the figures that the issue asks of them."""

import numpy as np
import pytest

from launch import recording
from moe_jax.balance import monitor, packing, policies, workloads
from tests import runs

SIZES = workloads.Sizes(layers=2, experts=16, choices=2, tokens=2048, micro_batches=40)
SETTING = policies.Setting(
  num_experts=16, num_ranks=8, num_choices=2, capacity_factor=1.25, num_slots=24, num_shadows=6,
  window=8, horizon=64, token_s=1e-6, shadow_bytes=1e3, slot_bytes=1e4, link_bytes_per_s=1e9,
)  # fmt: skip


def made(name, sizes=SIZES):
  """Returns the stream of a workload as policies see it."""
  stream = list(workloads.stream(name, sizes))
  ahead = lambda u: sum(each.tokens_V for each in stream[u : u + SETTING.window])
  return [
    policies.Seen(
      workloads.choose(each.scores_LTE, sizes.choices), each.tokens_V, ahead(u), each.scores_LTE
    )
    for u, each in enumerate(stream)
  ]


def run(policy, stream, setting=SETTING):
  balancer = policies.POLICIES[policy](setting)
  return [balancer.take(seen) for seen in stream]


def late_ratio(taken, first=16):
  return np.mean([monitor.max_over_mean(each.served_LX) for each in taken[first:]])


@pytest.mark.parametrize("workload", ["zipf 1", "jumping"])
@pytest.mark.parametrize("policy", policies.POLICIES)
def test_every_token_is_served_or_counted_as_dropped(policy, workload):
  stream = made(workload)[:18]
  for seen, taken in zip(stream, run(policy, stream), strict=True):
    assert taken.served_LX.shape == taken.rows_LX.shape == (2, 8)
    assert (taken.rows_LX >= taken.served_LX - 1e-9).all()
    served = taken.served_LX.sum()
    assert served + taken.dropped == pytest.approx(seen.counts_LE.sum())
    assert taken.dropped == 0 or policy == "capacity"
    assert taken.moved_bytes >= 0 and taken.decision_s >= 0


@pytest.mark.parametrize("workload", ["even", "zipf 0.5", "zipf 1", "zipf 1.5", "per layer"])
def test_placement_and_stealing_leave_2_percent(workload):
  taken = run("placement+stealing", made(workload))
  assert late_ratio(taken) <= 1.02


@pytest.mark.parametrize("policy", ["stealing", "placement+stealing"])
def test_a_hot_expert_that_jumps_leaves_10_percent(policy):
  stream = made("jumping")
  assert late_ratio(run("none", stream)) > 2
  assert late_ratio(run(policy, stream)) <= 1.10


@pytest.mark.parametrize("policy", ["stealing", "placement+stealing"])
def test_recorded_routing_leaves_2_percent(policy):
  found = recording.load(str(runs.ROOT / "configs" / "laptop_routing.npz"))
  stream = [
    policies.Seen(counts_LE.astype(np.int64), tokens_V, tokens_V, None)
    for counts_LE, tokens_V in zip(found.counts_ULE, found.tokens_UV, strict=True)
  ]
  assert late_ratio(run("none", stream)) > 1.5
  assert late_ratio(run(policy, stream)) <= 1.02


def test_without_a_gain_nothing_moves():
  setting = SETTING._replace(slot_bytes=1e15)
  for policy in ("placement", "forecast"):
    assert not any(each.moved_bytes for each in run(policy, made("zipf 1"), setting))
  setting = SETTING._replace(shadow_bytes=1e15)
  stream = made("zipf 1")[:4]
  for seen, each in zip(stream, run("stealing if it pays", stream, setting), strict=True):
    assert each.moved_bytes == 0
    np.testing.assert_array_equal(each.served_LX, seen.counts_LE.reshape(2, 8, 2).sum(-1))


def test_moves_are_paid_for():
  taken = run("placement", made("zipf 1.5"))
  moved = [each.moved_bytes for each in taken]
  assert max(moved) > 0 and not any(moved[: SETTING.window])
  first = next(u for u, each in enumerate(moved) if each)
  busiest = taken[first].rows_LX.max(1).sum() * SETTING.token_s
  expected = busiest + moved[first] / SETTING.link_bytes_per_s
  assert policies.seconds(taken[first], SETTING) == pytest.approx(expected)


def test_priced_stealing_is_never_slower_than_nothing():
  setting = SETTING._replace(shadow_bytes=3e5)
  stream = made("bursts")
  nothing, stealing, priced = (
    np.array([policies.seconds(each, setting) for each in run(policy, stream, setting)])
    for policy in ("none", "stealing", "stealing if it pays")
  )
  assert (priced <= nothing + 1e-12).all()
  assert priced.sum() < 0.99 * min(nothing.sum(), stealing.sum())


def test_capacity_computes_its_padding_and_drops_the_rest():
  stream = made("zipf 1.5")[:2]
  taken = run("capacity", stream)[0]
  rows = np.ceil(1.25 * 2048 * 2 / 16)
  assert (taken.rows_LX == 2 * rows).all()
  assert taken.dropped == np.maximum(stream[0].counts_LE - rows, 0).sum() > 0
  assert run("spill", stream)[0].dropped == 0


def test_the_placement_to_begin_with_is_legal_for_any_number_of_slots():
  for num_slots in (16, 24, 32, 40, 128):
    placed = policies.Placement(SETTING._replace(num_slots=num_slots))._first(2)
    packing.check(placed, 16, 8)
    assert placed.shape == (2, num_slots)


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_workloads_follow_from_their_seed(name):
  small = SIZES._replace(tokens=64, micro_batches=3)
  first, again, other = (
    [each.scores_LTE for each in workloads.stream(name, small, seed)] for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)
  assert np.isfinite(first).all() and first[0].shape == (2, 64, 16)


def test_workloads_are_as_uneven_as_they_say():
  ratio = {
    name: np.mean([monitor.max_over_mean(seen.counts_LE) for seen in made(name)])
    for name in workloads.WORKLOADS
  }
  zipf = [ratio[f"zipf {s}"] for s in ("0.5", "1", "1.5", "2")]
  assert ratio["even"] < 1.2 < zipf[0] < zipf[1] < zipf[2] and zipf[3] > 4
  assert ratio["jumping"] > 3


def test_choose_counts_the_largest_scores():
  scores_LTE = np.array([[[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]]])
  assert workloads.choose(scores_LTE, 1).tolist() == [[1, 1, 0]]
  assert workloads.choose(scores_LTE, 2).tolist() == [[1, 1, 2]]
  assert scores_LTE.max() == 5.0  # untouched


def test_an_unknown_workload_is_named():
  with pytest.raises(ValueError, match="workload='zpf' is not one of even"):
    next(workloads.stream("zpf", SIZES))
