"""The golden program, in both forms that XLA prints: schedule, counts, bytes, operations."""

import pytest

from moe_jax.rehearse import program, work
from moe_jax.rehearse.program import Branch, Collective, Compute, Done, Loop
from tests.rehearse import golden


@pytest.fixture(params=golden.FORMS)
def text(request):
  return golden.FORMS[request.param]


def test_the_schedule_is_read_in_order(text):
  found = program.read(text, golden.MESH)
  assert found.unknown == {}
  (loop,) = found.entry.units
  assert isinstance(loop, Loop) and loop.trips == golden.TURNS
  units = [u for u in loop.body.units if not isinstance(u, Done)]
  assert [type(u) for u in units] == [Collective, Compute, Compute, Collective]
  exchange, first, second, reduce = units
  assert (exchange.kind, exchange.axis, exchange.phase) == ("all-to-all", "expert", "dispatch")
  assert (reduce.kind, reduce.axis, reduce.phase) == ("all-reduce", "tensor", "combine")
  assert (first.phase, second.phase) == ("attention", "experts")
  assert exchange.bytes_sent == golden.EXCHANGE_BYTES
  assert reduce.bytes_sent == golden.REDUCE_BYTES
  assert first.work.flops == {"bf16": 2e9}
  assert first.work.num_bytes == 3 * 1000 * 1000 * 2
  waits = [place for place, u in enumerate(loop.body.units) if isinstance(u, Done)]
  assert loop.body.units[waits[0]].name == exchange.name and waits[0] == 2


def test_loops_multiply(text):
  found = program.read(text, golden.MESH)
  collectives = [(u.kind, n) for u, n in program.flat(found.entry) if isinstance(u, Collective)]
  assert collectives == [("all-to-all", golden.TURNS), ("all-reduce", golden.TURNS)]


def test_what_is_not_known_is_counted(text):
  text = text.replace("%next =", "%odd = bf16[4]{0} no-such-opcode(%x)\n  ROOT %next =", 1)
  text = text.replace("ROOT %odd", "%odd")
  text = text.replace('"known_trip_count":{"n":"3"}', '"other":1')
  call = '%call.1 = bf16[4]{0} custom-call(%x), custom_call_target="mystery"\n  %gemm.1 ='
  text = text.replace("%gemm.1 =", call, 1)
  assert program.read(text, golden.MESH).unknown == {
    "no-such-opcode": 1,
    "custom-call mystery": 1,
    "while without known trip count, taken as 1": 1,
  }


def test_elements_of_unknown_width_are_counted(text):
  whole = program.read(text, golden.MESH)
  odd = '%odd = f3e1m1[4,8]{1,0} custom-call(), custom_call_target="mystery"\n  ROOT %next ='
  text = text.replace("ROOT %next =", odd, 1)
  found = program.read(text, golden.MESH)
  assert found.unknown == {
    "custom-call mystery": 1, "elements of f3e1m1, taken as no bytes": 1,
  }  # fmt: skip
  bytes_of = lambda read: sum(
    unit.work.num_bytes for unit, _ in program.flat(read.entry) if isinstance(unit, Compute)
  )
  assert bytes_of(found) == bytes_of(whole)


@pytest.mark.parametrize("scope", ["further_rounds", "transpose(jvp(further_rounds))"])
def test_a_loop_turns_as_often_as_is_assumed_of_its_scope(text, scope):
  text = text.replace('"known_trip_count":{"n":"3"}', '"other":1').replace(
    'op_name="jit(step)/while"', f'op_name="jit(step)/{scope}/while"'
  )
  found = program.read(text, golden.MESH, turns={"further_rounds": 0, "another": 5})
  assert [loop.trips for loop in found.entry.units] == [0]
  assert found.unknown == {} and found.assumed == {"loop of further_rounds: 0 turns": 1}
  assert program.read(text, golden.MESH, turns={"rounds": 0}).unknown == {
    "while without known trip count, taken as 1": 1
  }


def test_a_loop_of_at_most_one_turn_is_a_branch(text):
  text = text.replace('"known_trip_count":{"n":"3"}', '"other":1').replace(
    'op_name="jit(step)/while"', 'op_name="jit(step)/where_due/while"'
  )
  found = program.read(text, golden.MESH, turns={"where_due": None})
  (branch,) = found.entry.units
  assert isinstance(branch, Branch) and found.unknown == found.assumed == {}
  nothing, body = branch.branches
  assert nothing.units == () and len(body.units) > 3


@pytest.mark.parametrize(("half", "num_bytes"), [("[0:2]", 16 + 4 + 8), ("[0:4]", 32 + 4 + 16)])
def test_a_fusion_reads_what_its_results_ask_for(half, num_bytes):
  """A sum over the first dimension, of which half is taken, reads half of what is summed."""
  size = 2 if half == "[0:2]" else 4
  text = golden.LISTED.replace(
    "%gemm.1 =",
    "%parts = f32[2,4]{1,0} constant({...})\n  %zero = f32[] constant(0)\n"
    f"  %summed = f32[{size}]{{0}} fusion(%parts, %zero), kind=kLoop, calls=%halved\n  %gemm.1 =",
    1,
  ).replace(
    "\n%sum",
    "\n%halved (parts: f32[2,4], zero: f32[]) -> f32[2] {\n"
    "  %parts.1 = f32[2,4]{1,0} parameter(0)\n  %zero.1 = f32[] parameter(1)\n"
    "  %whole = f32[4]{0} reduce(%parts.1, %zero.1), dimensions={0}, to_apply=%sum\n"
    f"  ROOT %part = f32[{size}]{{0}} slice(%whole), slice={{{half}}}\n}}\n\n%sum",
    1,
  )
  kernels = [u for u, _ in program.flat(program.read(text, golden.MESH).entry)]
  (kernel,) = (u for u in kernels if u.name == "summed")
  assert kernel.work.num_bytes == num_bytes


def test_rows_that_are_scattered_are_added_where_they_lie():
  """Three rows of 8 into 100: they are read, and what they are added to is read and written."""
  text = golden.LISTED.replace(
    "%gemm.1 =",
    "%table = f32[100,8]{1,0} constant({...})\n  %place = s32[3,1]{1,0} constant({...})\n"
    "  %rows = bf16[3,8]{1,0} constant({...})\n"
    "  %added = f32[100,8]{1,0} fusion(%table, %place, %rows), kind=kInput, calls=%scattered\n"
    "  %gemm.1 =",
    1,
  ).replace(
    "\n%sum",
    "\n%scattered (table: f32[100,8], place: s32[3,1], rows: bf16[3,8]) -> f32[100,8] {\n"
    "  %table.1 = f32[100,8]{1,0} parameter(0)\n  %place.1 = s32[3,1]{1,0} parameter(1)\n"
    "  %rows.1 = bf16[3,8]{1,0} parameter(2)\n  %wide = f32[3,8]{1,0} convert(%rows.1)\n"
    "  ROOT %out = f32[100,8]{1,0} scatter(%table.1, %place.1, %wide), to_apply=%sum\n}\n\n%sum",
    1,
  )
  kernels = [u for u, _ in program.flat(program.read(text, golden.MESH).entry)]
  (kernel,) = (u for u in kernels if u.name == "added")
  assert kernel.work.num_bytes == 3 * 4 + 3 * 8 * 2 + 2 * 3 * 8 * 4


def test_a_kernel_counts_by_its_declared_formula():
  call = (
    '%call.1 = bf16[4]{0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton",'
    ' backend_config={"name":"attention"}\n  %gemm.1 ='
  )
  text = golden.LISTED.replace("%gemm.1 =", call, 1)
  assert program.read(text, golden.MESH).unknown == {"custom-call __gpu$xla.gpu.triton": 1}
  kernels = {"attention": work.Kernel(lambda operands: 4.0 * operands[0].elements)}
  found = program.read(text, golden.MESH, kernels)
  assert found.unknown == {}
  (kernel,) = (u for u, _ in program.flat(found.entry) if u.name == "call.1")
  assert kernel.work.flops == {"bf16": 4e6}


def test_conditionals_in_both_forms():
  branch = "%{name} (q: bf16[4]) -> bf16[4] {{\n  ROOT %{leaf} = bf16[4]{{0}} parameter(0)\n}}\n"
  blocks = branch.format(name="no", leaf="q.1") + branch.format(name="yes", leaf="q.2")
  for attributes in (
    "true_computation=%yes, false_computation=%no",
    "branch_computations={%no, %yes}",
  ):
    line = f"%c = bf16[4]{{0}} conditional(%i, %x, %x), {attributes}\n  %gemm.1 ="
    text = golden.LISTED.replace("%gemm.1 =", line, 1).replace("\n%sum", f"\n{blocks}\n%sum", 1)
    (loop,) = program.read(text, golden.MESH).entry.units
    (found,) = (u for u in loop.body.units if isinstance(u, Branch))
    assert [block.name for block in found.branches] == ["no", "yes"]


def test_phases():
  assert program.phase_of("jit(step)/shard_map/while/body/attention/dot_general") == "attention"
  assert program.phase_of("jit(step)/while/body/transpose(jvp(experts))/einsum") == "experts"
  assert program.phase_of("jit(step)/optimizer/mul") == "optimizer"
  assert program.phase_of("jit(step)/mul") == program.phase_of("") == "other"
  combined = "jit(step)/body/(jvp(dispatch)/all_gather:transpose(jvp(combine))/all_gather)"
  assert program.phase_of(combined) == "combine+dispatch"


def test_text_that_is_not_a_compiled_program_is_refused():
  with pytest.raises(ValueError, match="is not scheduled"):
    program.read(golden.LISTED.replace("is_scheduled=true", "x=1"), golden.MESH)
  with pytest.raises(ValueError, match="has no ENTRY"):
    program.read("HloModule nothing", golden.MESH)
  with pytest.raises(ValueError, match="not an HLO instruction: 'garbage'"):
    program.read(golden.LISTED.replace("  %gemm.2", "  garbage\n  %gemm.2"), golden.MESH)
