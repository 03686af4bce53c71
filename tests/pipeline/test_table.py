"""Tables: what `check` refuses and says, what a tick costs, and that none of it needs jax."""

import dataclasses
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from matplotlib import image

from moe_jax.pipeline import segments
from moe_jax.pipeline.picture import picture
from moe_jax.pipeline.schedules import SCHEDULES, forward_only
from moe_jax.pipeline.table import CLASSIC_COSTS, KINDS, Table, check, to_text
from tests.pipeline.simulator import is_legal, serial, simulate

ARRAYS = (
  "forward_micro_QZ", "forward_chunk_QZ", "backward_micro_QZ", "backward_chunk_QZ", "head_micro_Q",
)  # fmt: skip


def changed(table, **values_by_array):
  """Returns `table` with cells {index: value} of some arrays changed."""
  arrays = {}
  for name, values_by_index in values_by_array.items():
    arrays[name] = getattr(table, name).copy()
    for index, value in values_by_index.items():
      arrays[name][index] = value
  return dataclasses.replace(table, **arrays)


def small():
  """1f1b, 2 stages, 2 micro-batches. Stage 0: F0 F1 . B0 B1, stage 1: . F0 (B0 F1) B1."""
  return SCHEDULES["1f1b"](2, 2, 1)


@hypothesis.given(
  name=st.sampled_from(sorted(SCHEDULES)), stages=st.sampled_from([1, 2, 4, 8]),
  micro_batches=st.integers(1, 17), chunks=st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_idle_cells_write_where_nothing_waits(name, stages, micro_batches, chunks):
  """Played on a stash: what a unit writes is there, whole, when its backward unit reads it."""
  table = SCHEDULES[name](stages, micro_batches, chunks if name == "interleaved" else 1)
  slot_QZ = segments.stash_slots(table)
  busy_QZ = table.forward_micro_QZ >= 0
  assert (slot_QZ[busy_QZ] == table.forward_slot_QZ[busy_QZ]).all()
  forward_QZ, backward_QZ = segments.directions(table, slot_QZ)
  for stage in range(stages):
    # Of each slot two layers; of each layer whose unit wrote it.
    stash = [[None, None] for _ in range(table.peak_in_flight)]
    for tick in range(table.num_ticks):
      read, written = table.backward_slot_QZ[tick, stage], slot_QZ[tick, stage]
      unit = (table.forward_micro_QZ[tick, stage], table.forward_chunk_QZ[tick, stage])
      for layer in (0, 1):
        if read >= 0:
          number = 1 - layer
          place = 1 - number if backward_QZ[tick, stage] else number
          wanted = table.backward_micro_QZ[tick, stage], table.backward_chunk_QZ[tick, stage]
          assert stash[read][place] == (*wanted, number)
        if written >= 0:
          place = 1 - layer if forward_QZ[tick, stage] else layer
          stash[written][place] = (*unit, layer)


def test_small_table_by_hand():
  table = small()
  check(table)
  np.testing.assert_array_equal(table.forward_micro_QZ, [[0, -1], [1, 0], [-1, 1], *[[-1, -1]] * 2])
  np.testing.assert_array_equal(
    table.backward_micro_QZ, [*[[-1, -1]] * 2, [-1, 0], [0, 1], [1, -1]]
  )
  np.testing.assert_array_equal(table.head_micro_Q, [-1, -1, 0, 1, -1])
  np.testing.assert_array_equal(table.embed_micro_Q, [0, 1, -1, -1, -1])
  np.testing.assert_array_equal(table.embed_gradient_micro_Q, [-1, -1, -1, 0, 1])
  np.testing.assert_array_equal(table.forward_slot_QZ, [[0, -1], [1, 0], [-1, 0], *[[-1, -1]] * 2])
  np.testing.assert_array_equal(table.backward_slot_QZ, [*[[-1, -1]] * 2, [-1, 0], [0, 0], [1, -1]])
  np.testing.assert_array_equal(table.arrival_slot_QZ[:4], [[-1, -1], [-1, 0], [0, 0], [0, -1]])
  np.testing.assert_array_equal(table.head_inbox_slot_Q, [-1, -1, 0, 0, -1])
  assert (table.peak_in_flight, table.num_inbox_slots, table.num_cotangent_slots) == (2, 1, 1)
  for name in ARRAYS:
    assert getattr(table, name).dtype == np.int32


def test_layer_order_is_stage_major_and_the_stages_form_a_ring():
  table = SCHEDULES["interleaved"](4, 8, 2)
  np.testing.assert_array_equal(table.layer_order, [0, 4, 1, 5, 2, 6, 3, 7])
  assert table.layer_order.dtype == np.int32


def test_arrays_of_a_table_cannot_change_under_what_is_derived():
  with pytest.raises(ValueError, match="read-only"):
    small().head_micro_Q[0] = 1


# What is changed, and what the refusal says.
ILLEGAL = {
  "forward before its input": (
    {"forward_micro_QZ": {(0, 1): 0, (1, 1): -1}, "forward_chunk_QZ": {(0, 1): 0, (1, 1): -1}},
    r"tick 0, stage 1: forward of micro-batch 0, chunk 0 of stage 1 needs forward .* of stage 0,"
    r" which runs in tick 0",
  ),
  "forward whose input never comes": (
    {"forward_micro_QZ": {(0, 0): -1}, "forward_chunk_QZ": {(0, 0): -1}},
    r"tick 1, stage 1: forward of micro-batch 0.* needs forward .* has not run",
  ),
  "twice": (
    {"forward_micro_QZ": {(3, 0): 1}, "forward_chunk_QZ": {(3, 0): 0}},
    r"tick 3, stage 0: forward of micro-batch 1, chunk 0 of stage 0 ran in tick 1 already",
  ),
  "never": (
    {"backward_micro_QZ": {(4, 0): -1}, "backward_chunk_QZ": {(4, 0): -1}},
    r"tick 5, stage 0: backward of micro-batch 1, chunk 0 of stage 0 has not run at the end",
  ),
  "head before its output": (
    {"head_micro_Q": {1: 0, 2: -1}},
    r"tick 1, every stage: head of micro-batch 0 needs forward .* of stage 1, which has not run",
  ),
  "head without its backward": (
    {"head_micro_Q": {3: -1, 4: 1}},
    r"tick 3, stage 1: backward of micro-batch 1.* needs its head .* set head_micro_Q\[3\]=1",
  ),
  "head in another tick than its backward": (
    {
      "head_micro_Q": {3: 1},
      "backward_micro_QZ": {(3, 1): -1},
      "backward_chunk_QZ": {(3, 1): -1},
    },
    r"tick 3, stage 1: head of micro-batch 1 needs backward .* in the same tick",
  ),
  "backward before its cotangent": (
    {"backward_micro_QZ": {(2, 0): 0, (3, 0): -1}, "backward_chunk_QZ": {(2, 0): 0, (3, 0): -1}},
    r"tick 2, stage 0: backward of micro-batch 0.* needs backward .* of stage 1",
  ),
  "half a unit": (
    {"backward_chunk_QZ": {(0, 1): 0}},
    r"tick 0, stage 1: backward has micro-batch -1 but chunk 0",
  ),
  "no such micro-batch": (
    {"forward_micro_QZ": {(2, 1): 2}},
    r"tick 2, stage 1: forward_micro_QZ is 2; expected -1 \(idle\) to 1",
  ),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_check_names_the_first_offending_tick(name):
  cells, message = ILLEGAL[name]
  table = changed(small(), **cells)
  assert not is_legal(table)
  with pytest.raises(ValueError, match=f"^1f1b: {message}"):
    check(table)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("num_stages", 0, "num_stages=0 is not a positive int"),
    ("num_chunks", 1.0, "num_chunks=1.0 is not a positive int"),
    ("num_stages", 3, r"forward_micro_QZ is int32\[5, 2\]; expected int32\[5, 3\]"),
    ("head_micro_Q", np.zeros((5, 1), np.int32), "head_micro_Q is not an array of one dimension"),
    ("head_micro_Q", np.full(4, -1, np.int32), r"int32\[5, 2\]; expected int32\[4, 2\]"),
    ("forward_micro_QZ", np.full((5, 2), -1), r"int64\[5, 2\]; expected int32\[5, 2\]"),
    ("backward_chunk_QZ", [[0]], r"backward_chunk_QZ is \[\[0\]\]; expected int32\[5, 2\]"),
  ],
)
def test_check_refuses_wrong_shapes_and_types(field, value, message):
  with pytest.raises(ValueError, match=message):
    check(dataclasses.replace(small(), **{field: value}))


@pytest.mark.parametrize(
  ("slots", "what"),
  [
    ("stash_slot_UW", "stash"),
    ("inbox_slot_UW", "activation inbox"),
    ("cotangent_slot_UW", "cotangent inbox"),
  ],
)
def test_check_refuses_a_slot_that_is_overwritten_while_it_is_needed(slots, what):
  table = SCHEDULES["interleaved"](2, 5, 2)
  assert getattr(table, slots).max() > 0  # needs more than one slot
  for wrong, message in (
    (0, f"slot 0 of the {what} is written while"),
    (-1, f"no slot of the {what}"),
  ):
    broken = dataclasses.replace(table)
    vars(broken)[slots] = np.full_like(getattr(table, slots), wrong)
    with pytest.raises(ValueError, match=rf"tick \d+, stage \d: .*{message}"):
      check(broken)


# ------------------------------------------------------------------ properties


@st.composite
def tables(draw) -> Table:
  name = draw(st.sampled_from(sorted(SCHEDULES)))
  num_chunks = draw(st.integers(1, 4)) if name == "interleaved" else 1
  table = SCHEDULES[name](draw(st.integers(1, 5)), draw(st.integers(1, 12)), num_chunks)
  return forward_only(table) if draw(st.booleans()) else table


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(tables())
def test_random_schedules_are_accepted_and_compute_what_a_serial_program_does(table):
  check(table)
  assert is_legal(table)
  costs = {"embed": 0.25, "forward": 1.0, "head": 0.5, "backward": 2.0, "embed_gradient": 0.125}
  result, expected = simulate(table, costs), serial(table)
  assert result.outputs == expected.outputs
  assert result.gradients == expected.gradients
  assert result.embed_gradients == expected.embed_gradients
  assert result.seconds == table.step_seconds(costs)


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(tables(), st.data())
def test_any_one_changed_number_is_refused_with_its_tick(table, data):
  name = data.draw(st.sampled_from(ARRAYS))
  array = getattr(table, name)
  index = tuple(data.draw(st.integers(0, size - 1)) for size in array.shape)
  below = table.num_chunks if "chunk" in name else table.num_micro_batches
  value = data.draw(st.integers(-2, below).filter(lambda value: value != array[index]))
  broken = changed(table, **{name: {index: value}})
  assert not is_legal(broken)
  with pytest.raises(ValueError, match=r"tick \d+, (every stage|stage \d)"):
    check(broken)


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(tables(), st.data())
def test_check_and_the_rules_agree_on_tables_with_two_cells_swapped(table, data):
  kind = data.draw(st.sampled_from(["forward", "backward", "head"]))
  stage = data.draw(st.integers(0, table.num_stages - 1))
  ticks = st.integers(0, table.num_ticks - 1)
  a, b = data.draw(ticks), data.draw(ticks)
  names = ["head_micro_Q"] if kind == "head" else [f"{kind}_micro_QZ", f"{kind}_chunk_QZ"]
  cells = [(a,), (b,)] if kind == "head" else [(a, stage), (b, stage)]
  swapped = changed(
    table,
    **{
      name: {
        cell: getattr(table, name)[other] for cell, other in zip(cells, cells[::-1], strict=True)
      }
      for name in names
    },
  )
  if is_legal(swapped):
    check(swapped)
    assert simulate(swapped, CLASSIC_COSTS).gradients == serial(swapped).gradients
  else:
    with pytest.raises(ValueError, match=r"tick \d+, (every stage|stage \d)"):
      check(swapped)


def test_a_table_that_no_schedule_makes_is_legal_too():
  """gpipe with the last forward of stage 1 a tick later, beside the first backward."""
  table = changed(
    SCHEDULES["gpipe"](2, 3, 1),
    forward_micro_QZ={(3, 1): -1, (4, 1): 2},
    forward_chunk_QZ={(3, 1): -1, (4, 1): 0},
  )
  check(table)
  assert is_legal(table)
  assert table.num_inbox_slots > 1
  assert simulate(table, CLASSIC_COSTS).gradients == serial(table).gradients


# ------------------------------------------------------------------ costs


def test_a_tick_costs_the_union_of_the_kinds_in_it():
  """Two stages, one micro-batch: F0 on each in turn, B0 on each in turn; the ends are shared."""
  table = SCHEDULES["1f1b"](2, 1, 1)
  costs = {"embed": 0.5, "forward": 2.0, "head": 3.0, "backward": 5.0, "embed_gradient": 0.25}
  assert table.ticks_by_kind == dict.fromkeys(KINDS, 1) | {"forward": 2, "backward": 2}
  assert table.step_seconds(costs) == 2 * 2 + 2 * 5 + 3 + 0.5 + 0.25
  assert table.bubble_fraction(costs) == pytest.approx((2 + 5) / 17.75)
  evaluation = forward_only(table)
  assert evaluation.step_seconds(costs) == 2 * 2 + 3 + 0.5
  assert evaluation.bubble_fraction(costs) == pytest.approx(2 / 7.5)


@pytest.mark.parametrize(
  ("costs", "message"),
  [
    ({}, "embed is missing, forward is missing"),
    (CLASSIC_COSTS | {"foward": 1.0}, "foward is unknown; give seconds for exactly embed, forward"),
    (CLASSIC_COSTS | {"head": -1.0}, "head=-1.0; give finite seconds"),
    (CLASSIC_COSTS | {"head": float("nan")}, "head=nan"),
    (CLASSIC_COSTS | {"head": float("inf")}, "head=inf"),
    (CLASSIC_COSTS | {"head": "1"}, "head='1'"),
  ],
)
def test_costs_are_checked(costs, message):
  for use in (small().step_seconds, small().bubble_fraction):
    with pytest.raises(ValueError, match=message):
      use(costs)


def test_a_step_of_no_seconds_has_no_bubble():
  with pytest.raises(ValueError, match="make a step of 0 seconds"):
    small().bubble_fraction(dict.fromkeys(KINDS, 0.0))


# ------------------------------------------------------------------ text, picture, imports


def test_text_lines_are_short_and_hold_every_unit():
  table = SCHEDULES["interleaved"](2, 16, 4)
  text = to_text(table)
  assert max(map(len, text.splitlines())) <= 100
  words = text.split()
  for unit in (f"{kind}{u}.{y}" for kind in "FB" for u in range(16) for y in range(4)):
    assert words.count(unit) == 2, unit  # once on each stage


@pytest.mark.parametrize(("name", "num_chunks"), [("1f1b", 1), ("interleaved", 2)])
def test_what_is_blank_in_the_picture_is_the_bubble(tmp_path, name, num_chunks):
  table = SCHEDULES[name](4, 8, num_chunks)
  path = tmp_path / "schedule.png"
  picture(table, str(path))
  pixels = image.imread(path)[160:, 113:, :3]  # under the legend, right of the names of the stages
  # What is blank is hatched: its pixels are mixtures of two colours.
  blank, hatch = (np.array(each) / 255 for each in ((0xF1, 0xF2, 0xF4), (0xD0, 0x74, 0x8A)))
  way = hatch - blank
  part = np.clip((pixels - blank) @ way / (way @ way), 0, 1)
  is_idle = (abs(pixels - (blank + part[..., None] * way)) < 0.01).all(axis=-1)
  is_drawn = (pixels.max(axis=-1) - pixels.min(axis=-1) > 0.08) & ~is_idle
  bubble = table.bubble_fraction(CLASSIC_COSTS)
  assert is_idle.sum() / (is_idle | is_drawn).sum() == pytest.approx(bubble, abs=0.02)


def test_picture_knows_two_formats(tmp_path):
  picture(forward_only(small()), str(tmp_path / "schedule.svg"))
  assert "<svg" in (tmp_path / "schedule.svg").read_text()
  with pytest.raises(ValueError, match=r"neither .png nor .svg"):
    picture(small(), str(tmp_path / "schedule.gif"))


def test_tables_and_schedules_import_neither_jax_nor_matplotlib():
  program = (
    "import sys; sys.modules['jax'] = sys.modules['jaxlib'] = sys.modules['matplotlib'] = None;"
    "from moe_jax.pipeline import schedules, table;"
    "table.check(schedules.SCHEDULES['1f1b'](2, 4, 1)); print('legal')"
  )
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert (done.returncode, done.stdout, done.stderr) == (0, "legal\n", "")


@pytest.mark.parametrize(
  ("schedule", "stages", "is_needed"),
  [("1f1b", 1, False), ("1f1b", 2, False), ("interleaved", 2, False), ("gpipe", 2, True),
   ("1f1b", 4, True), ("gpipe", 1, False)],
)  # fmt: skip
def test_two_stages_need_no_broadcast_where_heads_come_at_once(schedule, stages, is_needed):
  table = SCHEDULES[schedule](stages, 4, 2 if schedule == "interleaved" else 1)
  assert table.head_needs_broadcast == is_needed
