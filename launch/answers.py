"""The running requests of one HTTP request, and their text as it comes.

Knows the service, tokenizers and stop strings; must not know HTTP.
"""

import asyncio
import functools
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from launch.completion_body import Asked, Wrong
from moe_jax.interop.tokenizer import Tokenizer
from moe_jax.serve import requests as requests_lib
from moe_jax.serve.requests import Event, Overloaded
from moe_jax.serve.service import Service, Stopped
from moe_jax.serve.stop_text import StopText
from moe_jax.serve.text import TextStream

# Arguments and not exceptions: one that is raised keeps every frame that it came through.
_BROKEN_OFF = {
  requests_lib.DEADLINE: ("the deadline passed", "deadline_s", 504, "deadline"),
  requests_lib.CANCELLED: ("the server is shutting down", None, 503, "stopped"),
  requests_lib.FAILED: ("the engine failed; the server's log says why", None, 500, "failed"),
}


class Served(NamedTuple):
  """What the server answers with.

  Attributes:
    service: runs requests.
    tokenizer: of the model.
    end_tokens: each ends a text of the model.
    model: its name.
    deadline_s: of requests that name none.
  """

  service: Service
  tokenizer: Tokenizer
  end_tokens: tuple[int, ...]
  model: str
  deadline_s: float


class Piece(NamedTuple):
  """Text of a prompt's continuation as it comes; `finish` is empty before the last."""

  index: int
  text: str
  finish: str


class Answers:
  """The running requests of one HTTP request."""

  def __init__(self, served: Served, asked: Asked):
    """Submits nothing yet."""
    self.asked = asked
    self.head = {
      "id": f"cmpl-{uuid.uuid4().hex}",
      "object": "text_completion",
      "created": int(time.time()),
      "model": served.model,
    }
    self._service = served.service
    self._texts = [
      _Text(served.tokenizer, request.prompt, asked.stops) for request in asked.requests
    ]
    self._ids: list[int] = []
    self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
    self._loop = asyncio.get_running_loop()

  def submit(self) -> None:
    """Gives all requests to the service, or none.

    Raises:
      Wrong: one could never be served, or the service takes none now.
    """
    listeners = [functools.partial(self._hear, i) for i in range(len(self.asked.requests))]
    try:
      self._ids = self._service.submit_all(self.asked.requests, listeners)
    except (ValueError, Overloaded, Stopped) as error:
      status = {Overloaded: 429, Stopped: 503}.get(type(error), 400)
      code = {429: "overloaded", 503: "stopped"}.get(status)
      raise Wrong(str(error), None, status, code) from error

  def cancel(self) -> None:
    """Ends what has not ended."""
    for request_id in self._ids:
      self._service.cancel(request_id)

  async def pieces(self) -> AsyncIterator[Piece]:
    """Yields text as it comes, until the last prompt's end.

    Raises:
      Wrong: a request broke off.
    """
    left = set(range(len(self._texts)))
    while left:
      index, event = await self._events.get()
      if index not in left:
        continue  # its text ended at a stop string, and this token was under way
      if event.ended in _BROKEN_OFF:
        raise Wrong(*_BROKEN_OFF[event.ended])
      text, finish = self._texts[index].add(event)
      if finish:
        left.remove(index)
        if not event.ended:
          self._service.cancel(self._ids[index])
      if text or finish:
        yield Piece(index, text, finish)

  def usage(self) -> dict[str, int]:
    """Returns how many tokens came and went so far."""
    prompt = sum(len(request.prompt) for request in self.asked.requests)
    new = sum(text.num_tokens for text in self._texts)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

  def _hear(self, index: int, event: Event) -> None:
    self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))


class _Text:
  """The text of one prompt's continuation, ended by tokens or by stop strings."""

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
    self._stream, self._stop = TextStream(tokenizer, prompt), StopText(stops)
    self.num_tokens = 0

  def add(self, event: Event) -> tuple[str, str]:
    """Returns new text, and why it is the last; a stop token has no text."""
    self.num_tokens += len(event.tokens)
    tokens = event.tokens[:-1] if event.ended == requests_lib.STOP else event.tokens
    text = "".join(map(self._stream.add, tokens))
    text = self._stop.add(text + self._stream.end() if event.ended else text)
    if self._stop.is_stopped:
      return text, requests_lib.STOP
    return (text + self._stop.end() if event.ended else text), event.ended
