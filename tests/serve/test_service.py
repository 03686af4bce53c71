"""The engine's thread: news reach who asked, and nobody is left waiting however it ends."""

import threading

import pytest

from moe_jax.serve.engine import Engine
from moe_jax.serve.requests import Overloaded, Request
from moe_jax.serve.service import Service, Stopped
from tests.serve import case

LONG = 60


class Heard:
  """A listener that can be waited for."""

  def __init__(self):
    self.events, self._ended, self._begun = [], threading.Event(), threading.Event()

  def __call__(self, event):
    self.events.append(event)
    self._begun.set()
    if event.ended:
      self._ended.set()

  def begun(self):
    assert self._begun.wait(60)

  def end(self) -> str:
    assert self._ended.wait(60)
    return self.events[-1].ended

  @property
  def tokens(self):
    return [token for event in self.events for token in event.tokens]


def service(on_failure=None, **engine):
  made, parameters = case.generator((1, 1, 1))
  settings = case.settings_of((1, 1, 1))
  engine = Engine(settings, made.programs, parameters, **{"queue": 8, **engine})
  alone = lambda prompt, new: made(parameters, [prompt], new_tokens=new)[0]
  return Service(engine, on_failure or pytest.fail), engine, alone


def test_each_hears_of_its_own_request():
  running, _, alone = service()
  with running:
    heard = [Heard() for _ in range(6)]
    for i, one in enumerate(heard):
      running.submit(Request([i, 7], 5 + i), one)
    assert [one.end() for one in heard] == ["length"] * 6
  assert [one.tokens for one in heard] == [alone([i, 7], 5 + i) for i in range(6)]


def test_a_cancelled_request_hears_its_end_and_others_go_on():
  running, _, alone = service()
  with running:
    leaving, staying = Heard(), Heard()
    request_id = running.submit(Request([1], LONG), leaving)
    running.submit(Request([2], 20), staying)
    running.cancel(request_id)
    assert leaving.end() == "cancelled" and staying.end() == "length"
  assert staying.tokens == alone([2], 20)


def test_closing_ends_everyone_and_refuses_the_next():
  running, _, _ = service()
  with running:
    heard = Heard()
    running.submit(Request([1], LONG), heard)
    heard.begun()
  assert not running.is_open
  assert heard.end() in ("cancelled", "length")
  with pytest.raises(Stopped, match="shutting down"):
    running.submit(Request([1], 1), heard)


def test_a_failing_engine_tells_everyone():
  failed = threading.Event()
  running, engine, _ = service(failed.set)
  error = RuntimeError("the device is lost")

  def lose(*_):
    raise error

  real, engine._programs.decode = engine._programs.decode, lose
  try:
    with running:
      heard = Heard()
      running.submit(Request([1], LONG), heard)
      assert heard.end() == "failed"
      assert failed.wait(60)
  finally:
    engine._programs.decode = real
  assert running.failure is error and not running.is_open


def test_refusals_come_at_once():
  running, engine, _ = service(queue=1)
  engine.submit(Request([1], 1))  # before the thread runs
  with pytest.raises(Stopped):
    running.submit(Request([1], 1), Heard())
  running._is_open = True
  with pytest.raises(Overloaded):
    running.submit(Request([1], 1), Heard())
  with pytest.raises(ValueError, match="0 tokens"):
    running.submit(Request([], 1), Heard())
  assert running._listeners == {}
