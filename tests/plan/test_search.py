"""The search: complete, ordered, within memory, and plain about what is impossible."""

import dataclasses
import functools
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from moe_jax import config
from moe_jax.plan import calibration, compare, machine, memory, search, serve, simulate, steps
from moe_jax.plan.hardware import CHIPS, Cluster, cluster
from tests import runs

# Few layers, heads and experts: few plans.
SECTIONS = {
  "model": {"layers": 2, "heads": 4, "kv_heads": 4, "experts": 4},
  "train": {"batch": 8},
}
TINY = runs.settings(**SECTIONS, moe={"capacity_factor": 2.0}, pipeline={"micro_batches": 2})
EIGHT = cluster("h100:2x4")
WORKLOAD = serve.Workload(sequences=32, prompt_tokens=64, output_tokens=8)


def every_legal_step():
  """Step times of every configuration of 8 GPUs that config.Config itself accepts, but for float8,
  of which a search does not know whether it is precise enough.
  """
  exchanges = [each for each in config.EXCHANGE if "float8" not in each]
  found = []
  for mesh in itertools.starmap(config.Mesh, itertools.product((1, 2, 4, 8), repeat=4)):
    if mesh.num_devices != 8:
      continue
    ranks = search.ranks_per_host(mesh, EIGHT)
    for micro_batches, chunks, save, dispatch, exchange in itertools.product(
      (1, 2, 4, 8), (1, 2), config.SAVE, search.CONSIDERED, exchanges
    ):
      schedules = ("interleaved",) if chunks > 1 else ("1f1b", "gpipe")
      for schedule in schedules:
        try:
          settings = runs.settings(
            **SECTIONS | {"mesh": dataclasses.asdict(mesh)},
            pipeline={"schedule": schedule, "micro_batches": micro_batches, "chunks": chunks,
                      "save": save},
            moe={"dispatch": dispatch, "exchange": exchange, "capacity_factor": 2.0,
                 "expert_ranks_per_host": ranks},
          )  # fmt: skip
        except ValueError:
          continue
        found.append(simulate.step_seconds(settings, machine.Machine(EIGHT)))
  return sorted(found)


def test_nothing_legal_is_faster_than_the_best():
  best = search.search(TINY, EIGHT).best
  everything = every_legal_step()
  assert [plan.seconds for plan in best] == sorted(plan.seconds for plan in best)
  assert best[0].seconds == pytest.approx(everything[0])
  assert len(everything) > 200


def test_plans_are_legal_fit_and_keep_the_run():
  found = search.search(TINY, EIGHT)
  for plan in found.best:
    again = config.from_mapping(config.as_dict(plan.settings))
    assert again == plan.settings
    assert plan.num_gpus == 8
    assert plan.settings.model == TINY.model
    assert plan.settings.train == TINY.train
    assert plan.memory_bytes == memory.train(plan.settings).total
    assert plan.memory_bytes <= EIGHT.chip.memory_bytes
  assert found.simulated <= found.considered


@hypothesis_settings(max_examples=10, deadline=None)
@given(st.floats(1e5, 1e7), st.floats(1, 10))
def test_more_memory_never_has_fewer_plans_nor_a_slower_one(have, factor):
  def best(memory_bytes):
    chip = dataclasses.replace(CHIPS["h100"], name=f"{memory_bytes}", memory_bytes=memory_bytes)
    try:
      found = search.search(TINY, Cluster(chip, 1, 2))
    except ValueError as error:
      assert "no plan fits" in str(error)
      return math.inf, 0
    return found.best[0].seconds, len(found.best)

  (less_s, fewer), (more_s, more) = best(have), best(have * factor)
  assert more_s <= less_s and more >= fewer


def test_the_smallest_cluster_meets_the_targets_and_the_next_smaller_does_not():
  # Work enough that a second GPU pays; without launches, which more GPUs make no faster.
  wide = dataclasses.replace(TINY.model, d_model=2048, expert_hidden=8192)
  settings, at_once = dataclasses.replace(TINY, model=wide), calibration.Calibration(launch_s=0.0)
  search_for = functools.partial(search.smallest, settings, EIGHT, calibration=at_once)
  found = search.search(settings, cluster("h100:1x2"), calibration=at_once)
  wanted = found.best[0].tokens_per_ms_per_gpu * 2 * 0.999
  least, tried = search_for(search.Targets(tokens_per_ms=wanted))
  assert least.num_gpus == tried[-1][0] == 2
  assert [gpus for gpus, _, _ in tried] == [1, 2]
  assert "tokens/ms" in tried[0][2] and not tried[-1][2]
  never, tried = search_for(search.Targets(tokens_per_ms=1e12))
  assert never is None and [gpus for gpus, _, _ in tried] == [1, 2, 4, 8]


@pytest.mark.parametrize(
  "name, expected", [("h100:6x1", [1, 2, 4, 6]), ("h100:2x6", [1, 2, 4, 12]), ("h100:1x1", [1])]
)
def test_the_largest_size_tried_is_the_whole_cluster_and_none_is_tried_twice(
  name, expected, monkeypatch
):
  def none_fits(*arguments, **options):
    raise ValueError("no plan fits")

  monkeypatch.setattr(search, "search", none_fits)
  _, tried = search.smallest(TINY, cluster(name), search.Targets())
  assert [gpus for gpus, _, _ in tried] == expected


def test_serving_drops_nothing_and_keeps_to_its_target():
  found = search.search(TINY, EIGHT, workload=WORKLOAD)
  assert {plan.settings.moe.dispatch for plan in found.best} == {"dropless"}
  fastest = found.best[0].served
  assert 0 < fastest.first_ttft_s <= fastest.ttft_s < fastest.whole_s
  assert fastest.memory.kv_cache > 0
  late = search.search(TINY, EIGHT, workload=WORKLOAD, ttft_s=fastest.ttft_s * 1.01)
  assert all(plan.served.ttft_s <= fastest.ttft_s * 1.01 for plan in late.best)
  with pytest.raises(
    ValueError, match=r"no plan gives the first token within 1e-09 s: the fastest"
  ):
    search.search(TINY, EIGHT, workload=WORKLOAD, ttft_s=1e-9)


def test_training_keeps_to_its_limit_of_the_bubble():
  # So few sequences that four copies of two stages each are fastest.
  few = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, batch=4))
  search_for = functools.partial(search.search, few, EIGHT)
  bubble = lambda plan: simulate.bubble_fraction(plan.settings, plan.machine)
  bubbles = {round(bubble(plan), 6) for plan in search_for().best}
  assert max(bubbles) > 0.05, "a limit would change nothing"
  kept = search_for(bubble=0.05).best
  assert kept and all(bubble(plan) <= 0.05 for plan in kept)
  assert kept[0].seconds >= search_for().best[0].seconds
  with pytest.raises(
    ValueError, match=r"no plan has a bubble of -1.00% at most: the least is 0.00%"
  ):
    search_for(bubble=-0.01)


def test_serving_is_planned_as_the_server_dispatches():
  """Few tokens are gathered, others exchanged without loss, whatever moe.dispatch says."""
  of = lambda dispatch: serve.run(
    runs.settings(**SECTIONS, moe={"dispatch": dispatch}), machine.Machine(EIGHT), WORKLOAD
  )
  assert len({of(dispatch) for dispatch in config.DISPATCH}) == 1
  long = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, sequence=512))
  assert serve._as_served(long).moe.dispatch == "dropless"
  assert serve._as_served(long, positions=1).moe.dispatch == "gathered"


def test_halves_of_training_do_not_bind_what_is_served():
  """Three sequences a rank, of which neither a prefill nor a token's turn makes two halves."""
  of = lambda halves: serve.run(
    runs.settings(
      mesh={"expert": 2, "tensor": 2, "stage": 1},
      pipeline={"micro_batches": 1, "halves": halves},
    ),
    machine.Machine(EIGHT), WORKLOAD._replace(sequences=6),
  )  # fmt: skip
  assert of(True) == of(False)


@pytest.mark.parametrize("sequences", [1, 6, 12, 50])
def test_any_number_of_sequences_is_served_that_a_mesh_divides(sequences):
  """And prompts of any length; the batch of training has no say."""
  workload = serve.Workload(sequences, prompt_tokens=67, output_tokens=8)
  found = search.search(TINY, EIGHT, workload=workload)
  assert all(plan.settings.train.batch == sequences for plan in found.best)
  tiny = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, batch=4))
  best = search.search(tiny, EIGHT, workload=workload).best
  assert [plan.served for plan in best] == [plan.served for plan in found.best]


@pytest.mark.parametrize(
  "moe", [{"exchange": "flat"}, {"dispatch": "stealing", "shadow_tokens": 8.0}]
)
def test_few_tokens_are_gathered_whatever_the_way_of_many(moe):
  found, expected = (
    serve.run(runs.settings(**SECTIONS, moe=each), machine.Machine(EIGHT), WORKLOAD)
    for each in (moe, {"dispatch": "gathered"})
  )
  assert found.token_s == expected.token_s


@pytest.mark.parametrize("stages,micro_batches,ticks", [(1, 1, 1), (2, 1, 2), (2, 4, 5)])
def test_the_first_token_waits_for_layers_and_heads_by_hand(stages, micro_batches, ticks):
  """Each micro-batch passes every stage, one tick behind the one before; a head is no tick."""
  of = runs.settings(
    mesh={"expert": 2, "tensor": 1, "stage": stages}, pipeline={"micro_batches": micro_batches}
  )
  on = machine.Machine(EIGHT, calibration.NONE._replace(launch_s=0.0))
  served = WORKLOAD._replace(sequences=16)
  found = serve.run(of, on, served)
  train = dataclasses.replace(of.train, batch=16, sequence=served.prompt_tokens)
  of = serve._as_served(dataclasses.replace(of, train=train))
  at = steps.sizes(of)
  head_s = serve._head_seconds(of, on, at.sequences)
  tick_s = serve._unit_seconds(of, on, at) + serve._transfer_seconds(of, on, at)
  assert found.ttft_s == pytest.approx(ticks * tick_s + micro_batches * head_s)
  assert found.first_ttft_s == pytest.approx(stages * tick_s + head_s)


def test_longer_prompts_take_longer_and_hold_more():
  short, long = (
    serve.run(TINY, machine.Machine(EIGHT), WORKLOAD._replace(prompt_tokens=tokens))
    for tokens in (64, 4096)
  )
  assert short.ttft_s < long.ttft_s
  assert short.memory.kv_cache < long.memory.kv_cache


def test_131_072_gpus_are_copies():
  """No mesh of this model has more than 4 x 4 x 2 GPUs without them."""
  train = dataclasses.replace(TINY.train, batch=131_072)
  wanted = dataclasses.replace(TINY, train=train)
  best = search.search(wanted, cluster("h100:16384x8")).best[0]
  assert best.num_gpus == 131_072 and best.settings.mesh.data >= 131_072 // 32
  run = simulate.train(best.settings, best.machine)
  assert 0 < run.seconds_by_stream["data link"] < best.seconds == pytest.approx(run.step_s)


def test_copies_take_what_the_other_axes_leave_and_share_the_sequences():
  found = list(search.meshes(TINY, 8))
  assert {mesh.data for mesh in found} == {1, 2, 4, 8}
  assert all(mesh.num_devices == 8 for mesh in found) and len(set(found)) == len(found)
  # Of 4 sequences no eight ranks hold different ones.
  few = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, batch=4))
  shares = {mesh.sequence_shares for mesh in search.meshes(few, 8)}
  assert shares == {1, 2, 4}
  served = search.meshes(TINY, 8, WORKLOAD._replace(sequences=2))
  assert {mesh.sequence_shares for mesh in served} == {1, 2}


def test_each_of_the_copies_shares_is_cut_into_micro_batches():
  rank = search._Ranking(TINY, EIGHT, None, None, None, calibration.NONE, True)
  of = lambda *sizes: {
    settings.pipeline.micro_batches for settings in rank._layouts(config.Mesh(*sizes))
  }
  assert of(1, 1, 2, 4) == of(4, 1, 2, 1) == {1, 2}
  assert of(1, 4, 2, 1) == {1, 2, 4, 8} and of(1, 1, 1, 8) == {1}


def test_weights_come_ahead_wherever_some_ranks_hold_them_alike():
  ahead = dataclasses.replace(TINY.pipeline, prefetch_layers=1)
  wanted = dataclasses.replace(TINY, mesh=config.Mesh(4, 2, 1), pipeline=ahead)
  rank = search._Ranking(wanted, EIGHT, None, None, None, calibration.NONE, True)
  of = lambda *sizes: {
    settings.pipeline.prefetch_layers for settings in rank._layouts(config.Mesh(*sizes))
  }
  assert of(4, 2, 1, 1) == of(1, 4, 1, 2) == of(2, 2, 1, 2) == {1}
  assert of(1, 4, 2, 1) == of(2, 2, 2, 1) == {0}  # nobody to gather from; one layer a stage


def test_copies_serve_as_one_of_them_serves_its_part():
  """Twice the sequences on two copies of half the GPUs: nothing travels between them."""
  one, two = (
    runs.settings(
      **SECTIONS | {"train": {"batch": 16}},
      mesh={"expert": 2, "tensor": 2, "stage": 1, "data": n},
    )
    for n in (1, 2)
  )
  found = serve.run(two, machine.Machine(EIGHT), WORKLOAD._replace(sequences=64))
  assert found == serve.run(one, machine.Machine(EIGHT), WORKLOAD)
  # As many sequences on both are half as many for each.
  half = serve.run(two, machine.Machine(EIGHT), WORKLOAD)
  assert half.ttft_s < found.ttft_s
  assert 2 * half.memory.kv_cache == found.memory.kv_cache


def test_what_is_impossible_says_by_how_much():
  with pytest.raises(ValueError, match=r"no mesh of 7 GPUs is legal: expert divides .*experts=4"):
    search.search(TINY, cluster("h100:7x1"))
  with pytest.raises(
    ValueError, match=r"no mesh of 16 GPUs is legal: .* sequences=7 must divide by expert x data;"
  ):
    search.search(TINY, cluster("h100:4x4"), workload=WORKLOAD._replace(sequences=7))
  chip = dataclasses.replace(CHIPS["h100"], name="tiny", memory_bytes=1e4)
  with pytest.raises(ValueError, match=r"no plan fits: the smallest needs .* GB too little; give"):
    search.search(TINY, Cluster(chip, 2, 4))


def test_no_change_is_proposed_that_does_not_fit():
  """With room for "residuals" and no more: neither "everything" fits nor larger micro-batches."""
  pipeline = dataclasses.replace(TINY.pipeline, save="residuals")
  room = memory.train(dataclasses.replace(TINY, pipeline=pipeline)).total
  offered = lambda num_bytes: {
    what
    for what, *_ in compare.change_first(
      TINY,
      machine.Machine(
        Cluster(dataclasses.replace(CHIPS["h100"], name="small", memory_bytes=num_bytes), 2, 4)
      ),
    )
    if what.startswith("pipeline.")
  }
  small = {"pipeline.save=exchanges", "pipeline.save=residuals", "pipeline.micro_batches=4"}
  assert offered(room) == small
  assert offered(1e9) == small | {"pipeline.save=everything", "pipeline.micro_batches=1"}


def test_plans_side_by_side():
  best = search.search(TINY, EIGHT).best
  given = search.evaluate(TINY, machine.Machine(EIGHT))
  rows = compare.table({"given": given, "best": best[0]})
  assert rows[0] == ("", "given", "best")
  by_name = {row[0]: row[1:] for row in rows}
  assert by_name["mesh expert x tensor x stage x data"][0] == "2 x 2 x 2 x 1"
  assert by_name["step"][0] == f"{given.seconds * 1e3:.2f} ms"
  text = compare.to_text(rows)
  assert len(text.splitlines()) == len(rows) and "2 x 2 x 2 x 1" in text


def test_what_to_change_first_is_what_saves_most():
  on = machine.Machine(EIGHT)
  rows = compare.change_first(TINY, on)
  assert [seconds for _, seconds, _ in rows] == sorted(seconds for _, seconds, _ in rows)
  now_s = simulate.step_seconds(TINY, on)
  for _, seconds, saved in rows:
    assert saved == pytest.approx(1 - seconds / now_s)


def test_no_more_micro_batches_are_proposed_than_there_are_sequences():
  offered = lambda mesh: {
    what
    for what, *_ in compare.change_first(
      dataclasses.replace(TINY, mesh=config.Mesh(*mesh)), machine.Machine(EIGHT)
    )
    if "micro_batches" in what
  }
  fewer, more = "pipeline.micro_batches=1", "pipeline.micro_batches=4"
  assert offered((1, 2, 2, 2)) == offered((2, 2, 2, 1)) == {fewer, more}
  assert offered((1, 1, 2, 4)) == offered((4, 1, 2, 1)) == {fewer}
