"""The thread that steps an engine, and brings each request's news to who asked.

Knows the engine and threads; must not know HTTP or text.
"""

import threading
from collections.abc import Callable, Sequence

from moe_jax.serve import requests
from moe_jax.serve.engine import Engine, Load
from moe_jax.serve.requests import Event, Request, Timing

Listener = Callable[[Event], None]
_NEVER = Timing(float("nan"))


class Stopped(Exception):
  """The service takes no requests any more."""


class Service:
  """As a context, runs an engine on a thread of its own.

  Whatever ends it, every listener has heard the end of its request when `__exit__` returns.

  Attributes:
    failure: what the engine raised; None while it is well.
  """

  def __init__(self, engine: Engine, on_failure: Callable[[], None]):
    """Does not run yet.

    Args:
      engine: nobody else steps it.
      on_failure: called on the service's thread, once, when the engine has raised.
    """
    self._engine, self._on_failure = engine, on_failure
    self._listeners: dict[int, Listener] = {}
    self._change = threading.Condition()
    self._is_open = False
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    self.failure: BaseException | None = None

  @property
  def queue(self) -> int:
    """How many requests may wait."""
    return self._engine.queue

  @property
  def is_open(self) -> bool:
    """Whether requests are taken."""
    return self._is_open

  def __enter__(self):
    self._is_open = True
    self._thread.start()
    return self

  def __exit__(self, *_):
    with self._change:
      self._is_open = False
      self._change.notify()
    self._thread.join()

  def submit(self, request: Request, listener: Listener) -> int:
    """Returns the request's id; otherwise as `submit_all`."""
    return self.submit_all([request], [listener])[0]

  def submit_all(self, asked: Sequence[Request], listeners: Sequence[Listener]) -> list[int]:
    """Returns the ids of requests that are all taken, or none of them.

    Args:
      asked: what to continue.
      listeners: of each, hears its events on the service's thread; it must be quick, and not raise.

    Raises:
      ValueError: one could never be served.
      Overloaded: the queue has no room for all.
      Stopped: the service has ended.
    """
    with self._change:
      if not self._is_open:
        raise Stopped("the server is shutting down; ask another one, or this one later")
      ids = self._engine.submit_all(asked)
      self._listeners.update(zip(ids, listeners, strict=True))
      self._change.notify()
      return ids

  def cancel(self, request_id: int) -> None:
    """Ends a request soon; does nothing to one that has ended."""
    self._engine.cancel(request_id)

  def load(self) -> Load:
    """Returns what the engine holds."""
    return self._engine.load()

  def _run(self) -> None:
    ended = requests.CANCELLED
    try:
      while self._has_work():
        for event in self._engine.step():
          self._tell(event)
    except BaseException as error:  # kept, and raised again by who owns the service
      self.failure, ended = error, requests.FAILED
    with self._change:
      self._is_open = False
      left = list(self._listeners)
    for request_id in left:
      self._tell(Event(request_id, (), ended, _NEVER))
    if self.failure is not None:
      self._on_failure()

  def _has_work(self) -> bool:
    """Waits for work; returns False when the service is to end."""
    with self._change:
      self._change.wait_for(lambda: not self._is_open or not self._engine.is_idle())
      return self._is_open

  def _tell(self, event: Event) -> None:
    with self._change:
      find = self._listeners.pop if event.ended else self._listeners.get
      listener = find(event.request_id)
    listener(event)
