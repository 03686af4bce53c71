"""Schedules: all of them run on words, their figures, their goldens, the program that shows them.

`python -m tests.pipeline.test_schedules` writes the goldens anew; read the difference.
"""

import collections
import itertools
import json
import pathlib
import subprocess
import sys

import pytest

from moe_jax import config
from moe_jax.pipeline.schedules import SCHEDULES, forward_only
from moe_jax.pipeline.table import CLASSIC_COSTS, check, to_text
from tests.pipeline.simulator import is_legal, serial, simulate

STAGES, MICRO_BATCHES, CHUNKS = (1, 2, 4, 8), (1, 2, 4, 8, 16, 17), (1, 2, 4, 8)
COSTS = {"embed": 0.25, "forward": 1.0, "head": 0.5, "backward": 2.0, "embed_gradient": 0.125}
CASES = [
  (name, *sizes)
  for name in SCHEDULES
  for sizes in itertools.product(STAGES, MICRO_BATCHES, CHUNKS if name == "interleaved" else (1,))
]


def test_config_knows_the_same_schedules():
  assert set(config.SCHEDULES) == set(SCHEDULES)


@pytest.mark.parametrize("is_forward_only", [False, True], ids=["train", "forward_only"])
@pytest.mark.parametrize(("name", "stages", "micro_batches", "chunks"), CASES)
def test_every_size_computes_what_a_serial_program_does(
  name, stages, micro_batches, chunks, is_forward_only
):
  table = SCHEDULES[name](stages, micro_batches, chunks)
  if is_forward_only:
    table = forward_only(table)
  check(table)
  assert is_legal(table)
  result, expected = simulate(table, COSTS), serial(table)
  assert result.outputs == expected.outputs
  assert result.gradients == expected.gradients
  assert result.embed_gradients == expected.embed_gradients
  assert result.seconds == table.step_seconds(COSTS)


@pytest.mark.parametrize(("name", "stages", "micro_batches", "chunks"), CASES)
def test_every_size_takes_the_fewest_ticks_of_each_kind(name, stages, micro_batches, chunks):
  """A ring needs U * Y + Z - 1 forward ticks: the last stage's units, behind the first one's way.

  With fewer micro-batches than stages it needs one micro-batch's way and a tick for each other.
  """
  ticks = SCHEDULES[name](stages, micro_batches, chunks).ticks_by_kind
  fewest = max(micro_batches * chunks + stages - 1, stages * chunks + micro_batches - 1)
  assert ticks["forward"] == ticks["backward"] == fewest
  assert ticks["head"] == ticks["embed"] == ticks["embed_gradient"] == micro_batches


@pytest.mark.parametrize(("name", "stages", "micro_batches", "chunks"), CASES)
def test_forward_only_saves_nothing_and_ends_with_the_last_head(
  name, stages, micro_batches, chunks
):
  table = forward_only(SCHEDULES[name](stages, micro_batches, chunks))
  assert table.is_forward_only
  assert table.peak_in_flight == 0
  assert (table.forward_slot_QZ == -1).all()
  assert table.num_cotangent_slots == 1
  assert table.head_micro_Q[-1] == micro_batches - 1
  assert table.num_ticks == table.ticks_by_kind["forward"] + 1


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("micro_batches", MICRO_BATCHES)
def test_stash(stages, micro_batches):
  peak = lambda name, chunks=1: SCHEDULES[name](stages, micro_batches, chunks).peak_in_flight
  assert peak("gpipe") == micro_batches
  assert peak("1f1b") == min(2 * stages - 1, micro_batches)
  for chunks in CHUNKS:
    assert peak("interleaved", chunks) <= min(2 * stages * chunks - 1, micro_batches * chunks)
  if micro_batches % stages == 0 and micro_batches >= 2 * stages:
    for chunks in CHUNKS:
      assert peak("interleaved", chunks) == stages * (chunks + 1) - 1


def test_stash_is_flat_in_micro_batches_but_for_gpipe():
  for stages, chunks in itertools.product(STAGES, CHUNKS):
    few, many = (SCHEDULES["interleaved"](stages, m, chunks) for m in (16, 64))
    for number in ("peak_in_flight", "num_inbox_slots", "num_cotangent_slots"):
      assert getattr(few, number) == getattr(many, number)
  assert SCHEDULES["gpipe"](4, 64, 1).peak_in_flight == 64
  assert (
    SCHEDULES["1f1b"](4, 16, 1).peak_in_flight <= 0.45 * SCHEDULES["gpipe"](4, 16, 1).peak_in_flight
  )


@pytest.mark.parametrize(
  ("name", "stages", "chunks", "ticks", "bubble", "peak"),
  [
    ("gpipe", 2, 1, 34, 1 / 17, 16),
    ("1f1b", 2, 1, 19, 1 / 17, 3),
    ("interleaved", 2, 2, 37, 1 / 33, 5),
    ("interleaved", 2, 4, 73, 1 / 65, 9),
    ("interleaved", 2, 8, 145, 1 / 129, 17),
    ("1f1b", 4, 1, 23, 3 / 19, 7),
    ("interleaved", 4, 2, 43, 3 / 35, 11),
    ("interleaved", 4, 4, 83, 3 / 67, 19),
    ("gpipe", 8, 1, 46, 7 / 23, 16),
    ("1f1b", 8, 1, 31, 7 / 23, 15),
    ("interleaved", 8, 2, 55, 7 / 39, 23),
    ("interleaved", 8, 4, 103, 7 / 71, 39),
  ],
)
def test_figures_of_16_micro_batches(name, stages, chunks, ticks, bubble, peak):
  table = SCHEDULES[name](stages, 16, chunks)
  assert table.num_ticks == ticks
  assert table.bubble_fraction(CLASSIC_COSTS) == pytest.approx(bubble)
  assert table.peak_in_flight == peak


def test_heads_and_embeddings_are_work_on_every_stage_and_make_the_bubble_smaller():
  table = SCHEDULES["interleaved"](2, 16, 4)
  assert table.bubble_fraction(COSTS) == pytest.approx(3 / (65 * 3 + 16 * 0.875))
  assert table.bubble_fraction(COSTS) < table.bubble_fraction(CLASSIC_COSTS)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("what", ["stages", "micro_batches", "chunks"])
def test_sizes_are_positive(name, what):
  sizes = {"stages": 2, "micro_batches": 4, "chunks": 1} | {what: 0}
  with pytest.raises(ValueError, match=f"{name}: {what}=0 is not positive"):
    SCHEDULES[name](*sizes.values())


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_one_chunk(name):
  with pytest.raises(ValueError, match="got chunks=2; choose chunks=1 or schedule=interleaved"):
    SCHEDULES[name](2, 4, 2)


# ------------------------------------------------------------------ goldens

GOLDEN = pathlib.Path(__file__).parent / "golden"
GOLDEN_TABLES = {
  "gpipe": lambda: SCHEDULES["gpipe"](4, 8, 1),
  "1f1b": lambda: SCHEDULES["1f1b"](4, 8, 1),
  "interleaved": lambda: SCHEDULES["interleaved"](4, 8, 2),
  "interleaved_forward_only": lambda: forward_only(SCHEDULES["interleaved"](4, 8, 2)),
}


@pytest.mark.parametrize("name", GOLDEN_TABLES)
def test_golden(name):
  assert to_text(GOLDEN_TABLES[name]()) == (GOLDEN / f"{name}.txt").read_text()


def test_every_schedule_has_a_golden_of_4_stages_and_8_micro_batches():
  assert set(SCHEDULES) <= set(GOLDEN_TABLES)
  assert {path.stem for path in GOLDEN.glob("*.txt")} == set(GOLDEN_TABLES)


# ------------------------------------------------------------------ what we do not build, and why


def greedy_ticks(stage_of_virtual, micro_batches):
  """Ticks of all forward units if every stage runs the latest virtual stage that is ready."""
  done = [0] * micro_batches  # virtual stages that each micro-batch is through
  for tick in itertools.count(1):
    claims = {}
    for micro, virtual in enumerate(done):
      if virtual < len(stage_of_virtual):
        claims.setdefault(stage_of_virtual[virtual], []).append((-virtual, micro))
    for ready in claims.values():
      done[min(ready)[1]] += 1
    if min(done) == len(stage_of_virtual):
      return tick


def fewest_ticks(stage_of_virtual, micro_batches):
  """Ticks of all forward units in the best of all orders, by breadth-first search (small sizes).

  No stage waits while it has a unit: with units of one tick, an earlier unit delays no other.
  """
  end = (len(stage_of_virtual),) * micro_batches
  reached = {(0,) * micro_batches}
  for tick in itertools.count():
    if end in reached:
      return tick
    successors = set()
    for done in reached:
      ready = collections.defaultdict(set)
      for virtual in done:
        if virtual < len(stage_of_virtual):
          ready[stage_of_virtual[virtual]].add(virtual)
      for run in itertools.product(*ready.values()):
        left = collections.Counter(done)
        left.subtract(run)
        left.update(virtual + 1 for virtual in run)
        successors.add(tuple(sorted(left.elements())))
    reached = successors


def ring(stages):
  return [*range(stages), *range(stages)]


def v_shape(stages):
  return [*range(stages), *reversed(range(stages))]


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 2), (2, 5), (3, 4), (3, 6), (4, 5)])
def test_no_order_of_a_v_shape_is_as_short_as_the_ring(stages, micro_batches):
  assert fewest_ticks(ring(stages), micro_batches) == 2 * micro_batches + stages - 1
  assert fewest_ticks(v_shape(stages), micro_batches) == 2 * micro_batches + 2 * stages - 2


@pytest.mark.parametrize(
  ("stages", "v_ticks", "ring_ticks", "v_bubble", "ring_bubble"),
  [(4, 38, 35, 0.1579, 0.0857), (8, 46, 39, 0.3043, 0.1795)],
)
def test_a_v_shape_in_lockstep_has_the_bubble_of_1f1b(
  stages, v_ticks, ring_ticks, v_bubble, ring_bubble
):
  """The tip's last unit still has the way back to stage 0 before it: 2 * (Z - 1) idle ticks."""
  assert greedy_ticks(v_shape(stages), 16) == v_ticks == 2 * 16 + 2 * stages - 2
  table = SCHEDULES["interleaved"](stages, 16, 2)
  assert table.ticks_by_kind["forward"] == ring_ticks
  # A tick costs the union of its kinds, so forward and backward have this bubble each.
  assert 1 - 2 * 16 / v_ticks == pytest.approx(v_bubble, abs=5e-5)
  assert table.bubble_fraction(CLASSIC_COSTS) == pytest.approx(ring_bubble, abs=5e-5)
  one = SCHEDULES["1f1b"](stages, 16, 1)
  assert 1 - 2 * 16 / v_ticks == pytest.approx(one.bubble_fraction(CLASSIC_COSTS))


def split_weight_gradients(stages, micro_batches, chunks, recompute=0.0):
  """Returns bubble and units waiting, with weight gradients in units of their own, F = B = W = 1.

  The n-th runs on all stages in one tick, that in which the last of them ran its n-th backward: no
  stage is idle in these units, and what they read waits up to Z - 1 ticks, in Z slots.
  """
  table = SCHEDULES["interleaved"](stages, micro_batches, chunks)
  ticks, units = table.ticks_by_kind["forward"], micro_batches * chunks
  idle = (ticks - units) * (1 + recompute + 1)
  bubble = idle / (idle + units * (3 + recompute))
  backward_ticks_Z = [
    sorted((table.backward_micro_QZ[:, z] >= 0).nonzero()[0]) for z in range(stages)
  ]
  weight_ticks = [max(of_all) for of_all in zip(*backward_ticks_Z, strict=True)]
  assert len(set(weight_ticks)) == units
  waiting = max(
    sum(begin <= tick <= end for begin, end in zip(of_stage, weight_ticks, strict=True))
    for of_stage in backward_ticks_Z
    for tick in range(table.num_ticks)
  )
  return bubble, waiting


def kept_per_token(
  d_model, heads_width, expert_hidden, experts, experts_per_token, capacity_factor
):
  """Numbers per token and layer that weight gradients read: each product's input and cotangent."""
  attention = (d_model + 3 * heads_width) + (heads_width + d_model)
  router = d_model + experts
  rows = experts_per_token * capacity_factor
  return attention + router + rows * ((d_model + 2 * expert_hidden) + (expert_hidden + d_model))


@pytest.mark.parametrize(
  ("stages", "chunks", "bubble", "recomputing_bubble", "interleaved_bubble", "memory_ratio"),
  [
    (4, 2, 0.0588, 0.0657, 0.0857, 10.8),
    (4, 4, 0.0303, 0.0340, 0.0448, 6.7),
    (8, 2, 0.1273, 0.1409, 0.1795, 10.4),
    (8, 4, 0.0680, 0.0758, 0.0986, 6.5),
  ],
)
def test_splitting_weight_gradients_takes_a_third_off_the_bubble_for_many_times_the_memory(
  stages, chunks, bubble, recomputing_bubble, interleaved_bubble, memory_ratio
):
  """memory_ratio: of stash and what waits, over the stash of layer inputs alone (pod64)."""
  table = SCHEDULES["interleaved"](stages, 16, chunks)
  assert table.bubble_fraction(CLASSIC_COSTS) == pytest.approx(interleaved_bubble, abs=5e-5)
  got, waiting = split_weight_gradients(stages, 16, chunks)
  assert got == pytest.approx(bubble, abs=5e-5)
  assert split_weight_gradients(stages, 16, chunks, recompute=1.0)[0] == pytest.approx(
    recomputing_bubble, abs=5e-5
  )
  assert waiting == stages
  layer_inputs = kept_per_token(512, 512, 1024, 16, 2, 1.25) / 512
  assert layer_inputs == pytest.approx(27.03, abs=0.005)
  ratio = 1 + waiting * layer_inputs / table.peak_in_flight
  assert ratio == pytest.approx(memory_ratio, abs=0.05)


# ------------------------------------------------------------------ launch/plot_schedule.py


def plot_schedule(*arguments):
  return subprocess.run(
    [sys.executable, "-W", "error", "-m", "launch.plot_schedule", *arguments],
    capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[2],
  )  # fmt: skip


def test_plot_schedule(tmp_path):
  done = plot_schedule(
    "--schedule=interleaved", "--stages=2", "--micro_batches=16", "--chunks=4",
    f"--json={tmp_path / 'figures.json'}", f"--out={tmp_path / 'schedule.png'}",
    "--costs=forward=1,backward=3,head=0.5",
  )  # fmt: skip
  assert (done.returncode, done.stderr) == (0, "")
  table = SCHEDULES["interleaved"](2, 16, 4)
  assert done.stdout.startswith(to_text(table))
  figures = json.loads((tmp_path / "figures.json").read_text())
  assert figures["ticks"] == 73
  assert figures["peak_in_flight"] == 9
  assert figures["ticks_by_kind"] == table.ticks_by_kind
  assert figures["costs"] == CLASSIC_COSTS | {"backward": 3.0, "head": 0.5}
  assert figures["bubble_fraction"] == table.bubble_fraction(figures["costs"])
  assert f"bubble_fraction {figures['bubble_fraction']:.6g}\n" in done.stdout
  assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--chunks=2", "1f1b has one chunk a stage, got chunks=2"),
    ("--schedule=1f2b", "not one of gpipe, 1f1b, interleaved; did you mean 1f1b?"),
    ("--stages=0", "--stages=0 is wrong; expected a positive integer"),
    ("--stagess=2", "--stagess=2 is not a flag; did you mean --stages?"),
    ("interleaved", "interleaved does not belong to a flag"),
    ("--costs=backward", "--costs='backward' is not kind=number"),
    ("--costs=backwards=2", "backwards is unknown"),
    ("--out=schedule.gif", "choose one that ends in .png or .svg"),
    ("--json=Makefile/figures.json", "Makefile is a file, not a folder; choose another place"),
  ],
)
def test_plot_schedule_answers_a_typo_with_one_line(argument, message):
  done = plot_schedule(argument)
  assert done.returncode == 2
  assert message in done.stderr
  assert done.stderr.count("\n") == 1


if __name__ == "__main__":
  for golden_name, make in GOLDEN_TABLES.items():
    (GOLDEN / f"{golden_name}.txt").write_text(to_text(make()))
