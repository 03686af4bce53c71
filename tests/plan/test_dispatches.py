"""What each dispatch sends and computes: two_level, ragged and stealing beside dropless."""

import collections
import dataclasses

import pytest

from moe_jax import config
from moe_jax.config import Mesh
from moe_jax.plan import cost, graph, links, load, machine, search, simulate, skew, steps, units
from moe_jax.plan.calibration import NONE
from moe_jax.plan.hardware import cluster
from tests import runs

# Two hosts of four GPUs; four ranks of `expert` share a host.
EIGHT = cluster("h100:2x4")
ON = machine.Machine(EIGHT)
D_BYTES = 16 * 4


def settings(dispatch, **moe):
  return runs.settings(
    mesh={"expert": 8, "tensor": 1, "stage": 1},
    moe={"dispatch": dispatch, "capacity_factor": 1.25, **moe},
    train={"batch": 64, "sequence": 64},
  )


TWO_LEVEL = settings("two_level", expert_ranks_per_host=4)
DROPLESS = settings("dropless")


def forward(of):
  return {step.name: step for step in units.unit(of, "forward")}


def sent(of, link):
  return simulate.train(of, ON).bytes_by_link.get(link, 0.0)


def test_two_levels_by_hand():
  """A device has 64 sequences / 4 micro-batches / 8 ranks x 64 = 128 tokens, two choices each."""
  found = forward(TWO_LEVEL)
  # Without a limit a token may go to both hosts: 128 rows to each of two, padded no further.
  assert found["to hosts"].operand_bytes == found["to tokens"].operand_bytes == 2 * 128 * D_BYTES
  # Inside: ceil(1.25 x 256 / 4) = 80 rows to each of four ranks.
  assert found["to ranks"].operand_bytes == found["from ranks"].operand_bytes == 4 * 80 * D_BYTES
  between = machine.wires(found["to hosts"], TWO_LEVEL, ON)
  inside = machine.wires(found["to ranks"], TWO_LEVEL, ON)
  assert (between.size, between.num_hosts, between.link) == (2, 2, links.BETWEEN)
  assert (inside.size, inside.num_hosts, inside.link) == (4, 1, links.INSIDE)
  # A limit of one host: ceil(1.25 x 128 / 2) = 80 rows to each.
  limited = forward(settings("two_level", expert_ranks_per_host=4, hosts_per_token=1))
  assert limited["to hosts"].operand_bytes == 2 * 80 * D_BYTES


def test_two_levels_send_less_between_hosts_and_more_inside():
  assert sent(TWO_LEVEL, links.BETWEEN) < sent(DROPLESS, links.BETWEEN)
  assert sent(TWO_LEVEL, links.INSIDE) > sent(DROPLESS, links.INSIDE)


def test_ragged_sends_the_filled_rows_of_dropless():
  filled, padded = (forward(of)["to experts"] for of in (settings("ragged"), DROPLESS))
  assert filled.operand_bytes == 256 * D_BYTES
  assert padded.operand_bytes == 8 * 40 * D_BYTES
  rest = lambda of: [
    s for s in units.unit(of, "forward") if s.name not in ("to experts", "to tokens")
  ]
  assert rest(settings("ragged")) == rest(DROPLESS)


@pytest.mark.parametrize("dispatch", ["capacity", "dropless", "stealing", "dense"])
def test_float8_rows_cross_as_their_elements_and_a_scale(dispatch):
  mesh = {"expert": 4, "tensor": 2, "stage": 1}
  of = lambda exchange: runs.settings(mesh=mesh, moe={"dispatch": dispatch, "exchange": exchange})
  small, whole = (of(exchange) for exchange in ("hierarchical_float8", "hierarchical"))
  for kind in ("forward", "backward"):
    before = {step.name: step.operand_bytes for step in units.unit(whole, kind)}
    after = {step.name: step.operand_bytes for step in units.unit(small, kind)}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.startswith(("to experts", "to tokens"))}
    for name in changed:
      assert after[name] * D_BYTES == before[name] * (16 + 4)


def test_stealing_under_an_even_load_counts_and_decides():
  stealing, dropless = forward(settings("stealing", shadows=3)), forward(DROPLESS)
  assert set(stealing) - set(dropless) == {"count before stealing", "decide"}
  assert set(dropless) <= set(stealing)
  # Of one expert of its own, of three shadows, and of the longest queue.
  assert stealing["announce"].operand_bytes / 5 == dropless["announce"].operand_bytes / 2
  assert simulate.step_seconds(settings("stealing"), ON) > simulate.step_seconds(DROPLESS, ON)


@pytest.mark.parametrize("dispatch", config.DISPATCH)
def test_every_dispatch_is_planned_as_a_graph_and_under_a_load(dispatch):
  of = TWO_LEVEL if dispatch == "two_level" else settings(dispatch)
  graph.check(graph.build(of))
  even, uneven = (
    skew.end_seconds(of, ON, load.zipf(of, exponent)).max() for exponent in (0.0, 1.0)
  )
  assert even == pytest.approx(simulate.train(of, ON).step_s)
  assert uneven >= even


@pytest.mark.parametrize("dispatch", cost.EVERY_ASSIGNMENT)
@pytest.mark.parametrize("save", ["inputs", "exchanges", "residuals"])
def test_a_small_capacity_factor_takes_further_rounds(dispatch, save):
  """A round of 0.4 times the even share: three of them."""
  ranks = 4 if dispatch == "two_level" else 1
  of = dataclasses.replace(
    settings(dispatch, capacity_factor=0.4, expert_ranks_per_host=ranks),
    pipeline=config.Pipeline(micro_batches=4, save=save),
  )
  ran = collections.Counter()
  for step in (s for kind in ("forward", "backward") for s in units.unit(of, kind)):
    if step.follows:
      ran[step.name.split(", round")[0]] += 1
  again = {name: times for name, times in ran.items() if name.endswith(", again")}
  assert {times for name, times in ran.items() if name not in again} == {3}
  # Of the first round what is not saved, of the others everything.
  assert set(again.values()) <= {2, 3} and set(again.values()) >= {3 if save == "inputs" else 2}
  whole = settings(dispatch, expert_ranks_per_host=ranks)
  flops = lambda of: sum(step.flops for step in units.unit(of, "forward"))
  assert flops(of) == pytest.approx(flops(whole))
  even, uneven = (
    skew.end_seconds(of, ON, load.zipf(of, exponent)).max() for exponent in (0.0, 1.0)
  )
  assert even == pytest.approx(simulate.train(of, ON).step_s)
  assert uneven > even


def test_what_no_gradient_asks_for_is_not_run_again():
  backward = lambda of: {step.name: step for step in units.unit(of, "backward")}
  two_level, gathered = backward(TWO_LEVEL), backward(settings("gathered"))
  assert not {"to tokens, again", "sum at hosts, again"} & set(two_level)
  assert not {"sum between, again", "sum inside, again"} & set(gathered)
  assert {"from ranks, again", "to tokens, back"} < set(two_level)
  assert {"send tokens between, again", "sum between, back"} < set(gathered)
  assert not [name for name in two_level if name.startswith("agree on rounds") and "back" in name]


@pytest.mark.parametrize(
  "dispatch,exchange",
  [
    *((each, "hierarchical") for each in config.DISPATCH),
    ("capacity", "flat"),
    ("dropless", "flat"),
  ],
)
def test_what_exchanges_run_again_ends_before_a_collective(dispatch, exchange):
  of = runs.settings(
    mesh={"expert": 4, "tensor": 2, "stage": 1}, pipeline={"save": "exchanges"},
    moe={"dispatch": dispatch, "exchange": exchange,
         "expert_ranks_per_host": 2 if dispatch == "two_level" else 1},
  )  # fmt: skip
  ahead, again = forward(of), {}
  for step in units.unit(of, "backward"):
    again |= {step.name.removesuffix(", again"): step} if step.part == steps.AGAIN else {}
  for name, step in again.items():
    assert 0 <= step.num_bytes <= ahead[name].num_bytes, name
    assert 0 <= step.flops <= ahead[name].flops and 0 <= step.kernels <= ahead[name].kernels, name
  # Rows that were spread inside a host before they crossed are kept as they arrived.
  has_spread = dispatch != "gathered" and exchange != "flat"
  assert ("spread rows" in again) == has_spread


def test_members_of_a_host_and_of_its_place_on_others():
  mesh = Mesh(expert=8, tensor=2, stage=2)
  of = lambda among, ranks: links.group(mesh, ("expert",), 8, among, ranks)
  assert of("ranks", 4) == links.Group(4, 1, 4)
  assert of("hosts", 4) == links.Group(2, 2, 1)
  assert of("ranks", 8) == of("", 1) == links.Group(8, 2, 4)
  assert of("hosts", 1) == links.Group(8, 2, 4)
  assert of("ranks", 1).size == 1


def test_two_levels_are_considered_where_hosts_hold_several_ranks():
  assert search.ranks_per_host(Mesh(expert=8), EIGHT) == 4
  assert search.ranks_per_host(Mesh(expert=4, tensor=2), EIGHT) == 2
  assert search.ranks_per_host(Mesh(expert=2, tensor=4), EIGHT) == 1
  assert search.ranks_per_host(Mesh(expert=2), EIGHT) == 1
  rank = search._Ranking(DROPLESS, EIGHT, None, None, None, NONE, True)
  of = lambda mesh: {
    moe.expert_ranks_per_host for moe in rank._ways(mesh) if moe.dispatch == "two_level"
  }
  assert of(Mesh(expert=8)) == {4} and of(Mesh(expert=4, tensor=2)) == {2}
  # Of ranks on one host alone there is one level.
  assert of(Mesh(expert=2, tensor=4)) == of(Mesh(expert=4)) == set()
  assert steps.sizes(TWO_LEVEL).rows == 4 * 80


def test_a_limit_of_the_router_asks_for_as_many_hosts_on_every_mesh():
  limited = settings("dropless", expert_ranks_per_host=4, hosts_per_token=1)
  rank = search._Ranking(limited, EIGHT, None, None, None, NONE, True)
  of = lambda expert: {
    (moe.expert_ranks_per_host, moe.hosts_per_token) for moe in rank._ways(Mesh(expert=expert))
  }
  assert of(8) == {(4, 1)} and of(4) == {(2, 1)} and of(2) == {(1, 1)} and of(1) == set()
  with pytest.raises(ValueError, match=r"moe.hosts_per_token=1 asks for 2 hosts or more"):
    search.search(limited, cluster("h100:1x1"))
