"""Time: the golden program by hand, queues on a link, loops, and what a chip is made of."""

import dataclasses
import itertools

import pytest

from moe_jax.pipeline.schedules import SCHEDULES
from moe_jax.plan.calibration import LAUNCH_S
from moe_jax.plan.hardware import CHIPS
from moe_jax.rehearse import (
  bubble,
  figures,
  groups,
  picture,
  program,
  ticks,
  timing,
  work,
  workload,
)
from moe_jax.rehearse.exposure import Simulator
from moe_jax.rehearse.program import Block, Branch, Collective, Compute, Done, Loop, Program
from tests import runs
from tests.plan import protocols
from tests.rehearse import golden

TENSOR, EXPERT = "replica_groups={{0,1},{2,3}}", "replica_groups={{0,2},{1,3}}"


def kernel(milliseconds, name="kernel", dtype="bf16"):
  return Compute(name, "attention", work.Work({dtype: milliseconds * 1e9}, 0))


def collective(name, milliseconds, attributes=TENSOR, is_async=True):
  rate = 1e9 if attributes == TENSOR else 1e8
  found = groups.parse(attributes, golden.MESH)
  operand_bytes = round(milliseconds * 1e-3 * rate)
  return Collective(name, "combine", "all-reduce", is_async, operand_bytes, found, False)


def done(unit):
  return Done(unit.name)


def block(*units, name="block"):
  return Block(name, units, frozenset())


def run(*units, taken=None):
  simulator = Simulator(golden.CHIP, golden.GPUS_PER_HOST, taken or {}, launch_s=0.0)
  return simulator, simulator.run(Program(block(*units), {}))


@pytest.mark.parametrize("form", golden.FORMS)
def test_a_launch_keeps_the_stream_idle_before_each_kernel(form):
  found = program.read(golden.FORMS[form], golden.MESH)
  of = lambda launch_s: Simulator(golden.CHIP, golden.GPUS_PER_HOST, {}, launch_s).run(found)
  without, result = of(0.0), of(1e-3)
  kernels = sum(n for unit, n in result.times.items() if isinstance(unit, Compute))
  assert kernels == golden.TURNS * 2
  assert result.compute_s == pytest.approx(without.compute_s + kernels * 1e-3)
  assert result.total_s == pytest.approx(without.total_s + kernels * 1e-3)
  default = Simulator(golden.CHIP, golden.GPUS_PER_HOST, {}).run(found)
  assert default.total_s == pytest.approx(without.total_s + kernels * LAUNCH_S, rel=1e-9)


@pytest.mark.parametrize("form", golden.FORMS)
def test_the_golden_program_by_hand(form):
  found = program.read(golden.FORMS[form], golden.MESH)
  simulator = Simulator(golden.CHIP, golden.GPUS_PER_HOST, {}, launch_s=0.0)
  result = simulator.run(found)
  assert golden.EXCHANGE_S == pytest.approx(2e-3) == golden.GEMM_S  # hidden to the last byte
  turn_s = 2 * golden.GEMM_S + golden.REDUCE_S
  assert result.total_s == pytest.approx(golden.TURNS * turn_s)
  assert result.compute_s == pytest.approx(golden.TURNS * 2 * golden.GEMM_S)
  rows = {row["kind"]: row for row in figures.collectives(simulator, result)}
  exchange, reduce = rows["all-to-all"], rows["all-reduce"]
  assert (exchange["link"], exchange["axis"], exchange["phase"]) == (
    "between",
    "expert",
    "dispatch",
  )
  assert (reduce["link"], reduce["axis"], reduce["phase"]) == ("inside", "tensor", "combine")
  assert exchange["count"] == reduce["count"] == golden.TURNS
  assert exchange["bytes_per_gpu"] == golden.TURNS * golden.EXCHANGE_BYTES
  assert reduce["bytes_per_gpu"] == golden.TURNS * golden.REDUCE_BYTES
  assert exchange["hidden_seconds"] == pytest.approx(exchange["seconds"])
  assert reduce["hidden_seconds"] == pytest.approx(0)
  assert reduce["waited_for"] == ["the end of body"] and exchange["waited_for"] == []
  exposure = figures.exposure(list(rows.values()), result.compute_s)
  share = golden.EXCHANGE_S / (golden.EXCHANGE_S + golden.REDUCE_S)
  assert exposure["hidden_fraction"] == pytest.approx(share)
  assert exposure["hideable_fraction"] == pytest.approx(1)
  assert exposure["hidden_of_hideable"] == pytest.approx(share)
  assert exposure["hidden_fraction_by_axis"] == pytest.approx({"expert": 1, "tensor": 0})


def test_a_collective_is_hidden_as_far_as_kernels_run():
  long = collective("long", 5)
  _, result = run(long, kernel(2), done(long), kernel(1))
  assert result.total_s == pytest.approx(6e-3)
  assert result.hidden_s[long] == pytest.approx(2e-3)
  assert result.waited_for == {"long": "kernel"}


def test_a_link_carries_one_collective_at_a_time():
  first, second = collective("first", 3), collective("second", 3)
  _, result = run(first, second, kernel(4), done(first), done(second))
  assert result.total_s == pytest.approx(6e-3)
  assert result.hidden_s[first] == pytest.approx(3e-3)
  assert result.hidden_s[second] == pytest.approx(1e-3)


def test_two_links_carry_two():
  inside, between = collective("inside", 3), collective("between", 3, EXPERT)
  _, result = run(inside, between, kernel(4), done(inside), done(between))
  assert result.total_s == pytest.approx(4e-3)
  assert result.hidden_s[inside] == pytest.approx(result.hidden_s[between]) == pytest.approx(3e-3)


def test_a_row_of_collectives_knows_its_largest():
  short, long = collective("short", 1), collective("long", 5)
  simulator, result = run(short, long, kernel(4), done(short), done(long))
  (row,) = figures.collectives(simulator, result)
  assert row["count"] == 2 and row["seconds"] == pytest.approx(6e-3)
  assert row["largest_operand_bytes"] == long.operand_bytes == 5 * short.operand_bytes
  assert row["longest_seconds"] == simulator.seconds(long)


def test_of_no_communication_nothing_is_hidden_on_any_axis():
  simulator, result = run(kernel(1))
  exposure = figures.exposure(figures.collectives(simulator, result), result.compute_s)
  assert exposure["hidden_fraction"] is exposure["hidden_of_hideable"] is None
  assert exposure["hidden_fraction_by_axis"] == exposure["hidden_of_hideable_by_axis"] == {}


def test_waiting_for_one_exposes_the_other():
  inside, between = collective("inside", 3), collective("between", 3, EXPERT)
  _, result = run(inside, between, kernel(1), done(inside), kernel(1), done(between))
  assert result.total_s == pytest.approx(4e-3)
  assert result.hidden_s[between] == pytest.approx(1e-3)


def test_a_collective_that_is_not_async_hides_nothing():
  at_once = collective("at_once", 3, is_async=False)
  _, result = run(at_once, kernel(4))
  assert result.total_s == pytest.approx(7e-3) and result.hidden_s[at_once] == 0


@pytest.mark.parametrize("turns", [1, 3, 200])
def test_a_loop_hides_what_began_before_it(turns):
  long = collective("long", 50)
  _, result = run(long, Loop("loop", turns, block(kernel(1))), done(long))
  assert result.total_s == pytest.approx(1e-3 * max(50, turns))
  assert result.hidden_s[long] == pytest.approx(1e-3 * min(50, turns))
  assert result.compute_s == pytest.approx(1e-3 * turns)


def test_a_loop_waits_for_the_link_that_is_busy():
  long, short = collective("long", 5), collective("short", 1)
  body = block(short, kernel(2), done(short))
  _, result = run(long, Loop("loop", 10, body), done(long))
  # The first turn's collective waits until 5 and ends at 6; nine turns of 2 follow.
  assert result.total_s == pytest.approx((6 + 9 * 2) * 1e-3)
  assert result.hidden_s[short] == pytest.approx(9e-3)
  assert result.times[short] == 10


def test_a_branch_runs_in_the_turns_that_take_it():
  branch = Branch("branch", (block(), block(kernel(10))))
  loop = Loop("loop", 4, block(kernel(1), branch))
  _, result = run(loop, taken={"branch": (0, 1, 1, 0)})
  assert result.total_s == pytest.approx(24e-3)
  _, result = run(loop)  # of a branch that nobody knows, the last is taken always
  assert result.total_s == pytest.approx(44e-3)


def test_a_timeline_has_no_gap_and_no_overlap_in_a_row():
  inside, between = collective("inside", 3), collective("between", 3, EXPERT)
  body = block(
    inside, between, kernel(1), done(inside), Loop("l", 3, block(kernel(1))), done(between)
  )
  simulator, _ = run(Loop("ticks", 5, body))
  events = simulator.timeline(body, 0)
  for row in ("compute", "inside", "between"):
    mine = sorted(e for e in events if e.row == row)
    assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(mine))
  stream = sorted(e.start_s for e in events if e.row in ("compute", "waiting"))
  assert stream[0] == 0
  covered = sum(e.end_s - e.start_s for e in events if e.row in ("compute", "waiting"))
  assert covered == pytest.approx(simulator.turn(body).total_s)


@pytest.mark.parametrize("turns", [8, 9])
def test_a_pictures_title_counts_what_long_loops_wait_for(turns):
  """Of 9 turns the picture draws one event; 8 are drawn one by one."""
  at_once = collective("at_once", 3, is_async=False)
  layers = Loop("layers", turns, block(kernel(1), at_once, name="layer"))
  ticks = Loop("ticks", 20, block(layers, name="tick"))
  simulator = Simulator(golden.CHIP, golden.GPUS_PER_HOST, {}, launch_s=0.0)
  tick = picture.steady_tick(Program(block(ticks), {}), simulator)
  assert len(tick.events) == {8: 8 * 3, 9: 1}[turns]
  words = f"{4000 * turns} us, {1000 * turns} of computation, {3000 * turns} of exposed"
  assert words in picture.page(tick, "a pod", "binding")


def test_the_picture_and_its_title_are_of_the_usual_turn():
  """Which the first is not: it leaves the branch out."""
  branch = Branch("branch", (block(), block(kernel(10))))
  ticks = Loop("ticks", 4, block(kernel(1), branch))
  simulator = Simulator(golden.CHIP, golden.GPUS_PER_HOST, {"branch": (0, 1, 1, 1)}, launch_s=0.0)
  tick = picture.steady_tick(Program(block(ticks), {}), simulator)
  assert tick.run.total_s == pytest.approx(11e-3) == tick.events[-1].end_s


@pytest.mark.parametrize("idle", [(), (Loop("rounds", 0, block(kernel(5))),)])
def test_a_program_without_a_loop_that_turns_is_drawn_whole(idle):
  """And its ticks, of which none is in a loop, do not show what the units of a report take."""
  at_once = collective("at_once", 3, is_async=False)
  found = Program(block(kernel(1), *idle, at_once, name="entry"), {})
  simulator = Simulator(golden.CHIP, golden.GPUS_PER_HOST, {}, launch_s=0.0)
  tick, whole = picture.steady_tick(found, simulator), simulator.run(found)
  assert [event.row for event in tick.events] == ["compute", "waiting", "inside"]
  assert tick.run == whole and whole.total_s == pytest.approx(4e-3)
  assert "4000 us, 1000 of computation, 3000 of exposed" in picture.page(tick, "a pod", "binding")
  table = SCHEDULES["1f1b"](2, 1, 1)
  taken = ticks.branches_taken(found, table)
  assert bubble.fraction(found, table, taken, golden.CHIP, golden.GPUS_PER_HOST) is None


def test_a_kernel_takes_the_longer_of_operations_and_bytes():
  chip = dataclasses.replace(golden.CHIP, memory_bytes_per_s=1e12, memory_fraction=0.5)
  of = lambda flops, num_bytes: timing.compute_seconds(
    Compute("k", "attention", work.Work(flops, num_bytes)), chip
  )
  assert of({"bf16": 3e9}, 1e9) == pytest.approx(3e-3)
  assert of({"bf16": 1e9}, 1e9) == pytest.approx(2e-3)
  assert of({"f32": 1e9}, 0) == pytest.approx(10e-3)
  assert of({"tf32": 1e9}, 0) == pytest.approx(2e-3)


@pytest.mark.parametrize(("dtype", "products"), [("bfloat16", "bf16"), ("float32", "tf32")])
def test_a_model_is_measured_by_the_peak_that_its_kernels_run_at(dtype, products):
  settings = runs.settings(mesh={"expert": 1, "tensor": 1, "stage": 1}, model={"dtype": dtype})
  work_of_step = workload.train(settings)
  simulator, result = run(kernel(work_of_step.model_flops / 1e9, dtype=products))
  found = figures.prediction(settings, work_of_step, simulator, result, [], None)
  limits = found["limits_tokens_per_ms_per_gpu"]
  assert limits["compute, model FLOPs"] == pytest.approx(limits["compute, as compiled"])
  assert found["model_flop_utilisation"] == pytest.approx(found["flops_s"] / found["step_s"])


def test_dtypes_without_a_peak():
  planned, h100 = CHIPS["planned"], CHIPS["h100"]
  ratio = h100.flops_per_s("float32") / h100.flops_per_s("bfloat16")
  assert timing.flops_per_s(planned, "f32") == pytest.approx(240e12 * ratio)
  with pytest.raises(ValueError, match="dtype s4 have no peak; known: bf16"):
    timing.flops_per_s(h100, "s4")


ALL = "replica_groups={{0,1,2,3,4,5,6,7}}"


@pytest.mark.parametrize(
  ("kind", "gpus_per_host", "expected_s"),
  [
    # 8 MB put in, no latency. Rings between two hosts of 4 use all 4 adapters.
    ("all-gather", 8, 7 * 8e6 / 450e9),
    ("all-gather", 4, 7 * 8e6 / 4 / 50e9),
    ("reduce-scatter", 4, 7 / 8 * 8e6 / 4 / 50e9),
    ("all-reduce", 4, 2 * 7 / 8 * 8e6 / 4 / 50e9),
    ("all-to-all", 4, 4 / 8 * 8e6 / 50e9),
    ("all-to-all", 1, 7 / 8 * 8e6 / 50e9),
    ("all-to-all", 8, 7 / 8 * 8e6 / 450e9),
    ("collective-permute", 1, 8e6 / 50e9),
  ],
)
def test_seconds_of_bytes(kind, gpus_per_host, expected_s):
  chip = dataclasses.replace(CHIPS["h100"], protocols=protocols.steps(0.0))
  mesh = {"stage": 1, "expert": 1, "tensor": 8}
  unit = Collective("c", "combine", kind, True, 8_000_000, groups.parse(ALL, mesh), False)
  found = timing.collective_seconds(unit, chip, gpus_per_host)
  assert found == pytest.approx(expected_s)


def test_latency_counts_the_steps_of_the_fastest_algorithm():
  mesh = {"stage": 1, "expert": 1, "tensor": 8}
  found = lambda kind, gpus_per_host: timing.collective_seconds(
    Collective("c", "combine", kind, True, 0, groups.parse(ALL, mesh), False),
    CHIPS["h100"],
    gpus_per_host,
  )
  # To begin takes 6.6 us, a tree 6.8; between hosts a step inside takes 1 us of posting.
  assert found("all-gather", 8) == pytest.approx((6.6 + 7 * 0.6) * 1e-6)
  assert found("all-reduce", 8) == pytest.approx(min(6.6 + 14 * 0.6, 6.8 + 14 * 0.6) * 1e-6)
  assert found("all-to-all", 8) == pytest.approx((6.6 + 0.6) * 1e-6)
  # A tree over 4 hosts has 2 x 2 steps of 5 us, a ring 2 x 3 of 2.7 us; inside, 2 x 1 and 2 x 4.
  ring, tree = 6.6 + 6 * 2.7 + 8 * 1.0, 6.8 + 4 * 5 + 2 * 0.6
  assert found("all-reduce", 2) == pytest.approx(min(ring, tree) * 1e-6)
  # Hosts of one GPU: by a tree 6.8 + 2 x 3 x 5 us, gathered in 8 + 3 x 14 / 3.5 + 8 x 2.8.
  assert found("all-reduce", 1) == pytest.approx(36.8e-6)
  assert found("all-gather", 1) == pytest.approx(min(6.6 + 7 * 5, 8 + 12 + 22.4) * 1e-6)
