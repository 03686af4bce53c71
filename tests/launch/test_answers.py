"""The text of requests that an engine of this file answers."""

import asyncio
import gc
import weakref

import pytest

from launch.answers import Answers, Served
from launch.completion_body import Asked, Wrong
from moe_jax.interop.tokenizer import Bytes
from moe_jax.serve import requests as requests_lib
from moe_jax.serve.requests import Event, Request, Timing


class Service:
  """Ends all requests at once."""

  queue = 8

  def __init__(self, end: str):
    self._end = end

  def submit_all(self, asked, listeners):
    for i, listener in enumerate(listeners):
      listener(Event(i, (), self._end, Timing(0.0)))
    return list(range(len(asked)))

  def cancel(self, request_id):
    pass


@pytest.mark.parametrize(
  ("end", "status", "code"),
  [
    (requests_lib.DEADLINE, 504, "deadline"),
    (requests_lib.CANCELLED, 503, "stopped"),
    (requests_lib.FAILED, 500, "failed"),
  ],
)
def test_what_broke_off_is_not_kept(end, status, code):
  served = Served(Service(end), Bytes(), (), "tiny", 60.0)
  asked = Asked([Request([1], 4), Request([2], 4)], [], True, False)
  alive = []

  async def answer():
    answers = Answers(served, asked)
    alive.append(weakref.ref(answers))
    answers.submit()
    with pytest.raises(Wrong) as caught:
      [piece async for piece in answers.pieces()]
    assert (caught.value.status, caught.value.code) == (status, code)

  for _ in range(3):
    asyncio.run(answer())
  gc.collect()
  assert [each() for each in alive] == [None] * 3
