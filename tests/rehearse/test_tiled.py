"""Programs as XLA's TPU back end prints them: tiles, counters, products as convolutions."""

import itertools
import math

import pytest

from moe_jax.rehearse import convolution, hlo, program
from moe_jax.rehearse.program import Collective
from tests.peers import maxtext
from tests.rehearse import golden


def test_the_golden_program_reads_the_same_in_tiles():
  listed, tiled = (program.read(t, golden.MESH) for t in (golden.LISTED, golden.TILED))
  assert tiled.unknown == {} and golden.TURNS == 3

  def seen(found):
    return [(u.name, getattr(u, "kind", ""), u.phase, n) for u, n in units(found)]

  def units(found):
    return [(u, n) for u, n in program.flat(found.entry) if hasattr(u, "phase")]

  wanted = ("gemm.1", "gemm.2", "all-to-all-start.1", "all-reduce-start.1")
  assert [u for u in seen(tiled) if u[0] in wanted] == seen(listed)
  work = lambda found: [u.work for u, _ in units(found) if u.name.startswith("gemm")]
  assert work(tiled) == work(listed)
  sent = lambda found: [u.bytes_sent for u, _ in units(found) if isinstance(u, Collective)]
  assert sent(tiled) == sent(listed) == [golden.EXCHANGE_BYTES, golden.REDUCE_BYTES]


@pytest.mark.parametrize(
  ("old", "new", "turns"),
  [
    ("constant(3)", "constant(7)", 7),
    ("s32[]{:T(128)} constant(0)", "s32[]{:T(128)} constant(1)", 2),
    ("s32[]{:T(128)} constant(1)", "s32[]{:T(128)} constant(2)", 2),
    ("s32[]{:T(128)} constant(3)", "s32[]{:T(128)} constant(-1)", 0),
    ("direction=LT", "direction=NE", None),
    ("constant(3)", "parameter(1)", None),
    ("add(%i.1, %one)", "multiply(%i.1, %one)", None),
    ("s32[]{:T(128)} constant(1)", "s32[]{:T(128)} constant(-1)", None),
    ("copy(%zero)", "negate(%zero)", None),
  ],
)
def test_turns_are_counted_or_said_to_be_unknown(old, new, turns):
  assert old in golden.TILED
  found = program.read(golden.TILED.replace(old, new), golden.MESH)
  (loop,) = (u for u in found.entry.units if isinstance(u, program.Loop))
  unknown = {"while without known trip count, taken as 1": 1} if turns is None else {}
  assert loop.trips == (1 if turns is None else turns)
  assert found.unknown == unknown


def test_a_sliced_all_reduce_is_a_reduce_scatter():
  found = program.read(golden.SCATTERED, golden.MESH)
  (unit,) = (u for u, _ in program.flat(found.entry) if isinstance(u, Collective))
  assert (unit.kind, unit.axis, unit.is_async) == ("reduce-scatter", "expert", False)
  assert unit.operand_bytes == 32 * 8 * 4 and unit.bytes_sent == 16 * 8 * 4
  assert maxtext.result_bytes(unit) == 16 * 8 * 4
  assert unit.phase == "experts"  # of what it sends: XLA gave it no name


CONVOLUTIONS = {
  # A matrix product; one over heads; three with a batch, as XLA:TPU wrote them for pod64.
  "f32[32,8] (f32[32,64], f32[64,8]) dim_labels=bf_io->bf": 32 * 8 * 64,
  "f32[20,4,6] (f32[20,10,1], f32[10,4,6]) window={size=4 pad=3_3 rhs_reversal=1},"
  " dim_labels=bf0_i0o->b0f": 20 * 4 * 6 * 10,
  "f32[2,24,16] (f32[2,24,10], f32[2,10,16]) window={size=2 lhs_dilate=2},"
  " dim_labels=0bf_0io->0bf": 2 * 24 * 16 * 10,
  "f32[4,12,12] (f32[4,12,6], f32[4,12,6]) window={size=4 stride=3 lhs_dilate=4},"
  " dim_labels=0bf_0oi->0bf": 4 * 12 * 12 * 6,
  "f32[4,12,6] (f32[4,12,10], f32[4,6,10])"
  " window={size=4 stride=4 pad=3_3 lhs_dilate=3 rhs_reversal=1}, dim_labels=0bf_0oi->0bf": None,
}


def parsed(text):
  result, operands, attributes = text.replace(" (", "|").replace(") ", "|").split("|")
  left, right = operands.split(", f32")
  module = hlo.parse(
    f"HloModule m\n\nENTRY %main (l: {left}, r: f32{right}) -> {result} {{\n"
    f"  %l = {left} parameter(0)\n  %r = f32{right} parameter(1)\n"
    f"  ROOT %c = {result} convolution(%l, %r), {attributes}\n}}\n"
  )
  return module.entry, module.entry.root


@pytest.mark.parametrize("text", CONVOLUTIONS)
def test_operations_of_a_convolution(text):
  computation, root = parsed(text)
  found = convolution.flops(computation, root)
  assert found == 2 * pairs(computation, root)
  if CONVOLUTIONS[text] is not None:
    assert found == 2 * CONVOLUTIONS[text]


def pairs(computation, root):
  """Every result and every tap, one after the other."""
  left, right = (operand.shapes[0].dims for operand in computation.operands_of(root))
  inputs, kernel, result = root.attribute("dim_labels").replace("->", "_").split("_")
  window = dict(part.split("=") for part in (root.attribute("window") or "{}")[1:-1].split())
  outs, count = root.shapes[0].dims, 0
  for at in itertools.product(*map(range, outs)):
    if "0" not in result:
      count += right[kernel.index("i")]
      continue
    low, dilate = int(window.get("pad", "0_0").split("_")[0]), int(window.get("lhs_dilate", 1))
    for tap in range(right[kernel.index("0")]):
      place = at[result.index("0")] * int(window.get("stride", 1)) + tap - low
      whole, hole = divmod(place, dilate)
      if not hole and 0 <= whole < left[inputs.index("0")]:
        count += right[kernel.index("i")]
  assert math.prod(outs) <= 10_000
  return count


def test_groups_of_features_are_said_to_be_unknown():
  computation, root = parsed(
    "f32[32,8] (f32[32,64], f32[32,8]) dim_labels=bf_io->bf, feature_group_count=2"
  )
  assert convolution.flops(computation, root) is None
