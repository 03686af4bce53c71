"""How often everything runs: loops multiplied, branches as the table says."""

import pytest

from moe_jax.moe import rounds
from moe_jax.pipeline.schedules import SCHEDULES
from moe_jax.rehearse import program, ticks
from moe_jax.rehearse.exposure import Simulator
from moe_jax.rehearse.program import Block, Branch, Compute, Loop, Program
from moe_jax.rehearse.work import Work
from tests import runs
from tests.rehearse import golden


def kernel(name):
  return Compute(name, "head", Work({"bf16": 1e9}, 0.0))


def block(name, *units):
  return Block(name, units, frozenset())


def test_executions_follow_the_branches_of_each_turn():
  head, embed, layer, idle, after, never = map(kernel, ["h", "e", "l", "i", "a", "n"])
  inner = Loop("inner", 5, block("inner body", layer))
  by_table = Branch("by table", (block("no", idle), block("yes", head, inner)))
  other = Branch("other", (block("first", never), block("last", embed)))
  body = block("body", by_table, other, layer)
  entry = block("main", Loop("ticks", 4, body), Loop("none", 0, block("empty", never)), after)
  branch_of_turn = {"by table": (0, 1, 1, 0)}
  found = ticks.executions(entry, branch_of_turn)
  assert found == {idle: 2, head: 2, layer: 2 * 5 + 4, embed: 4, after: 1}
  simulated = Simulator(golden.CHIP, golden.GPUS_PER_HOST, branch_of_turn, launch_s=0.0).run(
    Program(entry, {})
  )
  assert found == simulated.times


@pytest.mark.parametrize("turns", [0, 2])
@pytest.mark.parametrize("scope", [rounds.SCOPE, f"transpose(jvp({rounds.SCOPE}))"])
def test_further_rounds_run_where_their_loop_turns(turns, scope):
  further, nothing = kernel("further"), kernel("nothing")
  loop = Loop("rounds", turns, block("round", further))
  choice = Branch(
    "any", (block("some", loop), block("none", nothing)), f"jit(step)/{rounds.SCOPE}/cond"
  )
  layers = Loop("layers", 3, block("layer", choice), "jit(step)/scan/while")
  found = Program(block("main", layers), {})
  table = SCHEDULES["1f1b"](1, 1, 1)
  taken = ticks.branches_taken(found, table)
  assert not taken.unknown and list(taken.assumed.values()) == [1]
  run = ticks.executions(found.entry, taken.branch_of_turn)
  assert run == ({further: 3 * turns} if turns else {nothing: 3})


def test_what_stood_in_a_loop_of_one_tick_is_no_loop_over_ticks():
  """XLA made straight code of the first: what is left of it are its layers, and rows that are
  added one by one.
  """
  path = "jit(step)/shard_map/while"
  over_ticks, layers, rows = (
    Loop("loop", 4, block("body"), name)
    for name in (path, f"{path}/body/closed_call/while", f"{path}/body/where_due/scatter-add")
  )
  found = Program(block("main", layers, rows, over_ticks), {})
  assert ticks.loops_over_ticks(found) == [over_ticks]


@pytest.mark.parametrize("text", golden.FORMS.values(), ids=golden.FORMS)
def test_executions_of_the_golden_program_are_the_simulators(text):
  found = program.read(text, golden.MESH)
  simulated = Simulator(golden.CHIP, golden.GPUS_PER_HOST, {}, launch_s=0.0).run(found)
  assert ticks.executions(found.entry, {}) == simulated.times
  assert set(simulated.times.values()) == {golden.TURNS}


@pytest.mark.parametrize("dispatch,further", [("dropless", 2), ("two_level", 2), ("capacity", 0)])
def test_a_small_capacity_factor_leaves_rows_for_further_rounds(dispatch, further):
  of = lambda factor, step="train": ticks.turns(
    step, runs.settings(moe={"dispatch": dispatch, "capacity_factor": factor})
  )
  assert of(0.4) == {**ticks.TURNS, rounds.SCOPE: further}
  assert of(1.0) == of(1.25) == of(0.4, "prefill") == ticks.TURNS
