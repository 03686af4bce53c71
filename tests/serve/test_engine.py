"""Continuous batching against each request alone, and whatever could leave a page held."""

import math
import threading

import jax
import numpy as np
import pytest

from moe_jax.serve.engine import Engine
from moe_jax.serve.packing import Wish
from moe_jax.serve.requests import Overloaded, Request
from tests.serve import case

# Pages for some of the slots only, a page of 4 tokens and a chunk of 8: now slots bind, now pages.
SERVE = {"pages_fraction": 0.3, "prefill_rows": 2, "max_tokens": 160}
NUM_REQUESTS = 200
COMPILED = "/jax/core/compile/backend_compile_duration"


class Clock:
  """Seconds that pass when told to."""

  now_s = 0.0

  def __call__(self):
    return self.now_s


@pytest.fixture(scope="module")
def compilations():
  """A list that grows by one with everything that XLA compiles."""
  found = []
  listener = lambda name, *_, **__: found.append(name) if name == COMPILED else None
  jax.monitoring.register_event_duration_secs_listener(listener)
  yield found
  jax.monitoring.unregister_event_duration_listener(listener)


def engine_on(mesh, *, queue=NUM_REQUESTS, clock=None, **serve):
  """Returns an engine, and the generator that shares its programs."""
  serve = {**SERVE, **serve}
  made, parameters = case.generator(mesh, **serve)
  settings = case.settings_of(mesh, **serve)
  engine = Engine(settings, made.programs, parameters, queue=queue, clock=clock or Clock())
  return engine, lambda prompt, new, **more: made(parameters, [prompt], new_tokens=new, **more)[0]


def random_requests(count: int, longest: int, seed: int) -> list[Request]:
  random = np.random.default_rng(seed)
  found = []
  for _ in range(count):
    # Mostly short, now and then one that a narrow program cannot hold.
    length = int(random.integers(1, longest if random.random() < 0.1 else 40))
    prompt = random.integers(0, 256, length).tolist()
    found.append(Request(prompt, int(random.integers(1, 21))))
  return found


def run(engine, told=None) -> dict[int, list]:
  """Steps until nothing is left; returns tokens and the last event of every request."""
  told = {} if told is None else told
  while not engine.is_idle():
    tell(engine.step(), told)
  return told


def tell(events, told):
  for event in events:
    tokens, ended = told.get(event.request_id, ([], None))
    assert ended is None, "news of a request that has ended"
    told[event.request_id] = [*tokens, *event.tokens], event if event.ended else None


def assert_nothing_is_held(engine):
  load = engine.load()
  assert (load.num_waiting, load.num_running) == (0, 0)
  assert load.num_free_pages == load.num_pages
  scheduler = engine._scheduler
  assert (scheduler.slots.limit == 0).all()
  for name, value in Wish()._asdict().items():
    assert (getattr(scheduler.slots.wishes, name) == value).all(), name
  free = sorted(place for ranks in scheduler._free_slots for micro in ranks for place in micro)
  shape = scheduler.slots.limit.shape
  assert free == sorted(list(range(shape[1])) * shape[0])


def arrive_and_cancel(engine, given, seed):
  """Steps while requests arrive in bursts, some of which are cancelled at any stage.

  Returns what was told, the ids that were cancelled, and what bound at some time.
  """
  random = np.random.default_rng(seed)
  arriving, told, cancelled, bound = list(given), {}, set(), set()
  while arriving or not engine.is_idle():
    for _ in range(min(int(random.poisson(1.5)), len(arriving))):
      assert engine.submit(arriving.pop(0)) == len(given) - len(arriving) - 1
    here = range(len(given) - len(arriving))
    alive = [i for i in here if i not in cancelled and told.get(i, ([], None))[1] is None]
    if alive and random.random() < 0.2:
      cancelled.add(victim := int(random.choice(alive)))
      engine.cancel(victim)
    tell(engine.step(), told)
    load = engine.load()
    if load.num_waiting:
      bound.add("slots" if load.num_running == load.num_slots else "pages")
  return told, cancelled, bound


@pytest.mark.parametrize(("mesh", "count"), [((1, 1, 1), NUM_REQUESTS), ((2, 2, 2), 16)], ids=str)
def test_every_request_gets_the_tokens_it_would_get_alone(mesh, count, compilations):
  # On eight devices of one width only: there compiling is most of the test.
  max_tokens = 160 if mesh == (1, 1, 1) else 100
  engine, alone = engine_on(mesh, max_tokens=max_tokens)
  given = random_requests(count, longest=max_tokens - 21, seed=1)
  num_programs, num_compiled = engine._programs.num_compiled, len(compilations)
  assert num_compiled >= num_programs == (5 if mesh == (1, 1, 1) else 3)
  told, cancelled, bound = arrive_and_cancel(engine, given, seed=2)
  assert (engine._programs.num_compiled, len(compilations)) == (num_programs, num_compiled)
  assert_nothing_is_held(engine)
  assert len(told) == count and len(cancelled) > count / 20
  assert bound >= ({"slots", "pages"} if mesh == (1, 1, 1) else set())
  for i, request in enumerate(given):
    tokens, last = told[i]
    expected = alone(request.prompt, request.new_tokens)
    assert last.ended == ("cancelled" if i in cancelled else "length")
    assert tokens == (expected[: len(tokens)] if i in cancelled else expected)
    assert last.timing.num_tokens == len(tokens)
  load = engine.load()
  assert load.num_ended["length"] == count - len(cancelled)
  assert load.num_ended["cancelled"] == len(cancelled)
  assert load.new_tokens == sum(len(tokens) for tokens, _ in told.values())
  # Cancelled ones were caught at every stage: before the first token and after it.
  stages = {bool(told[i][0]) for i in cancelled}
  assert stages == {True, False} or mesh != (1, 1, 1)


def test_draws_are_those_of_the_request_alone():
  engine, alone = engine_on((1, 1, 1))
  wishes = [Wish(1.0, 20, 0.9, seed) for seed in range(3)] + [Wish()]
  prompt = list(range(30, 43))
  for wish in wishes:
    engine.submit(Request(prompt, 9, wish))
  told = run(engine)
  found = [told[i][0] for i in range(4)]
  assert found == [alone(prompt, 9, wishes=wish) for wish in wishes]
  assert len(set(map(tuple, found))) == 4
  assert_nothing_is_held(engine)


def test_any_stop_token_ends_a_request_and_is_its_last():
  engine, alone = engine_on((1, 1, 1))
  prompt = list(range(7))
  text = alone(prompt, 20)
  stops = [text[12], text[5], 255 if 255 not in text else 254]
  for order in (stops, stops[::-1], stops[:1], [text[0]]):
    engine.submit(Request(prompt, 20, stop_tokens=order))
  told = run(engine)
  for i, wanted in enumerate((stops, stops, stops[:1], [text[0]])):
    tokens, last = told[i]
    cut = min(text.index(token) for token in wanted if token in text)
    assert tokens == text[: cut + 1]
    assert last.ended == "stop"
  assert_nothing_is_held(engine)


def test_many_stop_tokens_cost_a_token_nothing():
  class Tokens(list):
    """Goes through all of them to find one, as a list does."""

    def __contains__(self, token):
      pytest.fail("they are searched")

  engine, alone = engine_on((1, 1, 1))
  text = alone([1, 2, 3], 6)
  engine.submit(
    Request([1, 2, 3], 6, stop_tokens=Tokens([255 if 255 not in text else 254, text[4]]))
  )
  tokens, last = run(engine)[0]
  assert tokens == text[: text.index(text[4]) + 1] and last.ended == "stop"


def test_overload_refuses_and_recovers():
  engine, alone = engine_on((1, 1, 1), queue=3)
  request = Request([1, 2, 3], 6)
  engine.submit(request)
  tell(engine.step(), told := {})
  for _ in range(3):
    engine.submit(request)
  for _ in range(2):
    with pytest.raises(Overloaded, match="3 requests wait already, and the limit is 3"):
      engine.submit(request)
  assert engine.load().num_refused == 2
  run(engine, told)
  engine.submit(request)  # refused ones took no number
  run(engine, told)
  assert sorted(told) == list(range(5))
  assert all(tokens == alone([1, 2, 3], 6) for tokens, _ in told.values())
  assert_nothing_is_held(engine)


def test_requests_that_come_together_are_all_taken_or_none():
  engine, alone = engine_on((1, 1, 1), queue=3)
  good, bad = Request([1, 2, 3], 6), Request([], 6)
  with pytest.raises(ValueError, match="0 tokens"):
    engine.submit_all([good, bad])
  assert_nothing_is_held(engine)
  with pytest.raises(Overloaded, match="0 requests wait already, and the limit is 3"):
    engine.submit_all([good] * 4)
  assert_nothing_is_held(engine)
  assert engine.load().num_refused == 4
  assert engine.submit_all([good] * 3) == [0, 1, 2]
  assert all(tokens == alone([1, 2, 3], 6) for tokens, _ in run(engine).values())
  assert_nothing_is_held(engine)


def test_deadlines_end_whoever_is_late_at_every_stage():
  clock = Clock()
  engine, alone = engine_on((1, 1, 1), clock=clock)
  long = list(range(100))
  decoding = engine.submit(Request([1, 2], 20, deadline_s=5.0))
  tell(engine.step(), told := {})
  reading = engine.submit(Request(long, 20, deadline_s=4.0))
  in_time = engine.submit(Request([3, 4], 2, deadline_s=4.0))
  tell(engine.step(), told)
  many = [engine.submit(Request(long, 60)) for _ in range(engine.load().num_slots)]
  queued = engine.submit(Request([5], 1, deadline_s=4.0))
  tell(engine.step(), told)
  clock.now_s = 4.0
  tell(engine.step(), told)
  assert told[reading][0] == [] and told[reading][1].ended == "deadline"
  assert told[queued][0] == [] and told[queued][1].ended == "deadline"
  assert math.isnan(told[queued][1].timing.time_to_first_token_s)
  assert told[decoding][1] is None
  clock.now_s = 5.0
  tell(engine.step(), told)
  tokens, last = told[decoding]
  assert last.ended == "deadline"
  assert 1 < len(tokens) < 20 and tokens == alone([1, 2], 20)[: len(tokens)]
  assert told[in_time][1].ended == "length"
  run(engine, told)
  assert {told[i][1].ended for i in many} == {"length"}
  assert_nothing_is_held(engine)


def test_timings_are_by_the_clock():
  clock = Clock()
  engine, _ = engine_on((1, 1, 1), clock=clock)
  size = engine._settings.serve.decode_tokens
  engine.submit(Request([1], 1 + 3 * size), arrived_s=-2.0)
  clock.now_s = 1.0
  told = {}
  while not engine.is_idle():
    tell(engine.step(), told)
    clock.now_s += 0.5
  timing = told[0][1].timing
  assert timing.time_to_first_token_s == 3.0
  assert timing.time_per_token_s == pytest.approx(1.0 / (3 * size))
  found = engine.load().latency_s
  assert found["time_to_first_token_s"] == {"p50": 3.0, "p90": 3.0, "p99": 3.0}


def test_a_long_prompt_delays_nobody_by_more_than_a_chunk():
  engine, _ = engine_on((1, 1, 1))
  engine.submit(Request([1], 30))
  engine.step()
  engine.submit(Request(list(range(130)), 1))
  told, steps = {}, 0
  while 1 not in told:
    events = engine.step()
    tell(events, told)
    steps += 1
    assert any(event.request_id == 0 and event.tokens for event in events)
  room = engine._settings.serve.prefill_rows * engine._settings.serve.prefill_micro_batches * 8
  assert steps == math.ceil(130 / room) > 3


def test_requests_come_from_many_threads():
  engine, alone = engine_on((1, 1, 1))
  given = random_requests(24, longest=40, seed=3)
  ids = {}

  def submit(numbers):
    for i in numbers:
      ids[i] = engine.submit(given[i])
      if i % 3 == 0:
        engine.cancel(ids[i])

  threads = [threading.Thread(target=submit, args=(range(j, 24, 4),)) for j in range(4)]
  for thread in threads:
    thread.start()
  told = {}
  while any(thread.is_alive() for thread in threads):
    tell(engine.step(), told)
  for thread in threads:
    thread.join()
  run(engine, told)
  assert sorted(ids.values()) == list(range(24))
  for i, request in enumerate(given):
    tokens, last = told[ids[i]]
    expected = alone(request.prompt, request.new_tokens)
    assert tokens == expected[: len(tokens)]
    assert len(tokens) == len(expected) or (i % 3 == 0 and last.ended == "cancelled")
  assert_nothing_is_held(engine)


@pytest.mark.parametrize(
  ("request_", "message"),
  [
    (Request([], 1), "the prompt has 0 tokens"),
    (Request([1] * 150, 11), "the prompt has 150 tokens and 11 are to be made; give at least 1"),
    (Request([256], 1), "prompt has token 256; tokens are 0 to 255"),
    (Request([-1], 1), "prompt has token -1"),
    (Request([1], 0), "new_tokens=0 is not positive"),
    (Request([1], 1, stop_tokens=[300]), "stop_tokens has token 300"),
    (Request([1], 1, deadline_s=0.0), "deadline_s=0.0 is not positive"),
    (Request([1], 1, deadline_s=math.nan), "deadline_s=nan is not positive"),
    (Request([1], 1, Wish(temperature=-1.0)), "temperature=-1.0 is not a number"),
    (Request([1], 1, Wish(temperature=2e-38)), "temperature=2e-38 is too low to divide by"),
  ],
)
def test_what_could_never_be_served_is_refused(request_, message):
  engine, _ = engine_on((1, 1, 1))
  with pytest.raises(ValueError, match=message):
    engine.submit(request_)
  assert engine.is_idle()
  assert_nothing_is_held(engine)


def test_a_queue_has_room_for_one():
  with pytest.raises(ValueError, match="queue=0 is not positive"):
    engine_on((1, 1, 1), queue=0)


def test_cancelling_what_is_gone_does_nothing():
  engine, _ = engine_on((1, 1, 1))
  engine.cancel(7)
  request_id = engine.submit(Request([1], 1))
  told = run(engine)
  engine.cancel(request_id)
  assert engine.is_idle() and engine.step() == []
  assert told[request_id][1].ended == "length"
