"""Continuous batching: requests join and leave between steps, and nothing compiles on the way.

A step takes a chunk of the waiting prompts and a turn of everyone's tokens: a long prompt delays
others by one prefill call at a time. `submit` and `cancel` may come from any thread; one thread
steps. Knows requests and programs; must not know text, HTTP or threads' lives.
"""

import collections
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from moe_jax import config
from moe_jax.model.transformer import Parameters
from moe_jax.serve import decode, packing, prefill, requests
from moe_jax.serve.expert_load import ExpertCounts, ExpertLoad
from moe_jax.serve.latency import Latencies
from moe_jax.serve.programs import Programs, on_host
from moe_jax.serve.requests import Event, Overloaded, Request, Timing
from moe_jax.serve.scheduler import Running, Scheduler


class Load(NamedTuple):
  """What the engine holds at one moment, and what it has done.

  Attributes:
    num_waiting: requests in the queue.
    num_running: requests in slots.
    num_slots: of the deployment.
    num_free_pages: of all ranks.
    num_pages: of all ranks.
    num_refused: by a full queue, so far.
    num_ended: so far, by the way they ended.
    prompt_tokens: prefilled so far.
    new_tokens: made so far.
    padding_tokens: positions of prefill calls so far that held no token.
    experts: whom the tokens went to.
    latency_s: percentiles, see `latency.summary`.
  """

  num_waiting: int
  num_running: int
  num_slots: int
  num_free_pages: int
  num_pages: int
  num_refused: int
  num_ended: dict[str, int]
  prompt_tokens: int
  new_tokens: int
  padding_tokens: int
  experts: ExpertLoad
  latency_s: dict[str, dict[str, float]]


class Engine:
  """Continues the prompts that are submitted, as many at once as there are slots and pages.

  Attributes:
    queue: requests that may wait.
  """

  def __init__(
    self,
    settings: config.Config,
    programs: Programs,
    parameters: Parameters,
    *,
    queue: int,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Compiles every program, and takes the memory of the cache.

    Args:
      settings: those of the programs.
      programs: of the deployment.
      parameters: as `programs.parameters` makes them.
      queue: requests that may wait for a slot; past it they are refused.
      clock: seconds; deadlines and timings are by it.

    Raises:
      ValueError: the queue has no place, or several processes run the programs.
    """
    if queue < 1:
      raise ValueError(f"queue={queue} is not positive; choose at least 1")
    if jax.process_count() > 1:
      raise ValueError(
        f"{jax.process_count()} processes: requests arrive at one of them alone, and the others"
        " would not make its calls; serve from one process"
      )
    self._settings, self._programs, self._parameters = settings, programs, parameters
    self.queue, self._clock = queue, clock
    self._scheduler = Scheduler(settings)
    self._ids = itertools.count()
    self._timings: dict[int, Timing] = {}
    self._latencies = Latencies()
    self._experts = ExpertCounts(settings.model, prefill.table_of(settings, 1))
    self._num_refused = self._prompt_tokens = self._new_tokens = self._padding_tokens = 0
    self._num_ended = dict.fromkeys(requests.ENDS, 0)
    # Guards what other threads touch: the queue, the ids to cancel, and what `load` reads.
    self._mutex = threading.Lock()
    self._waiting: collections.OrderedDict[int, Request] = collections.OrderedDict()
    self._to_cancel: set[int] = set()
    programs.compile_all()
    self._cache = programs.empty_cache()

  def submit(self, request: Request, arrived_s: float | None = None) -> int:
    """Returns the id by which `step` will speak of a request; otherwise as `submit_all`."""
    return self.submit_all([request], arrived_s)[0]

  def submit_all(self, asked: Sequence[Request], arrived_s: float | None = None) -> list[int]:
    """Returns the ids of requests that are all taken, or none of them.

    Args:
      asked: what to continue.
      arrived_s: by the engine's clock, default now.

    Raises:
      ValueError: one could never be served.
      Overloaded: the queue has no room for all.
    """
    for request in asked:
      requests.check(self._settings, request)
    with self._mutex:
      if len(self._waiting) + len(asked) > self.queue:
        self._num_refused += len(asked)
        raise Overloaded(
          f"{len(self._waiting)} requests wait already, and the limit is {self.queue};"
          " try again later"
        )
      ids = [next(self._ids) for _ in asked]
      timing = Timing(self._clock() if arrived_s is None else arrived_s)
      self._waiting.update(zip(ids, asked, strict=True))
      self._timings.update(dict.fromkeys(ids, timing))
      return ids

  def cancel(self, request_id: int) -> None:
    """Ends a request at the next step; does nothing to one that has ended."""
    with self._mutex:
      if request_id in self._timings:
        self._to_cancel.add(request_id)

  def is_idle(self) -> bool:
    """Returns whether a step would find nothing to do."""
    with self._mutex:
      return not self._timings

  def step(self) -> list[Event]:
    """Returns the news of one prefill call and one decode call, of each where there is work."""
    events = self._end_those_who_leave()
    self._admit()
    return events + self._prefill() + self._decode()

  def load(self) -> Load:
    """Returns what the engine holds."""
    with self._mutex:
      free = self._scheduler.pages
      ranks = range(self._settings.mesh.sequence_shares)
      return Load(
        num_waiting=len(self._waiting),
        num_running=len(self._scheduler.running),
        num_slots=self._scheduler.num_slots,
        num_free_pages=sum(free.num_free(rank) for rank in ranks),
        num_pages=free.num_pages * len(ranks),
        num_refused=self._num_refused,
        num_ended=dict(self._num_ended),
        prompt_tokens=self._prompt_tokens,
        new_tokens=self._new_tokens,
        padding_tokens=self._padding_tokens,
        experts=self._experts.load(),
        latency_s=self._latencies.summary(),
      )

  def _end_those_who_leave(self) -> list[Event]:
    """Ends what was cancelled or is past its deadline."""
    now = self._clock()
    with self._mutex:
      cancelled, self._to_cancel = self._to_cancel, set()
      running = {key: one.request for key, one in self._scheduler.running.items()}
      late = [
        key
        for key, request in (self._waiting | running).items()
        if now - self._timings[key].arrived_s >= request.deadline_s and key not in cancelled
      ]
    # A cancelled request may have ended while its cancellation was on its way.
    cancelled = sorted(key for key in cancelled if key in self._timings)
    return [self._end(key, (), requests.CANCELLED) for key in cancelled] + [
      self._end(key, (), requests.DEADLINE) for key in late
    ]

  def _admit(self) -> None:
    with self._mutex:
      while self._waiting:
        request_id, request = next(iter(self._waiting.items()))
        if not self._scheduler.admit(request_id, request):
          return
        del self._waiting[request_id]

  def _prefill(self) -> list[Event]:
    taken = self._scheduler.next_pieces()
    if not taken:
      return []
    pieces = [piece for _, piece in taken]
    width = self._programs.width(max(piece.start for piece in pieces))
    batch, places = packing.pack(self._settings, pieces, width)
    self._cache, found = self._programs.prefill(self._parameters, self._cache, batch)
    tokens_UB = on_host(found.tokens_UB)
    self._count(found)
    self._padding_tokens += packing.num_padding(batch)
    self._prompt_tokens += sum(len(piece.tokens) for piece in pieces)
    # Of a prompt's pieces the last one's token counts.
    ends = {one.request_id: (one, place) for (one, _), place in zip(taken, places, strict=True)}
    events = []
    for one, place in ends.values():
      if one.is_prefilled:
        token = int(tokens_UB[place])
        self._scheduler.begin(one, token)
        events.append(self._made(one, [token]))
    return events

  def _decode(self) -> list[Event]:
    scheduler = self._scheduler
    active = scheduler.active()
    if not active:
      return []
    width = self._programs.width(scheduler.longest_after_decode())
    self._cache, _, found = self._programs.decode(
      self._parameters, self._cache, scheduler.page_table(width), scheduler.slots
    )
    tokens_TUB = on_host(found.tokens_TUB)
    self._count(found)
    events = []
    for one in active:
      tokens_T = tokens_TUB[:, *one.slot].tolist()
      made = (
        tokens_T[: tokens_T.index(decode.NO_TOKEN)] if decode.NO_TOKEN in tokens_T else tokens_T
      )
      scheduler.advance(one, made)
      events.append(self._made(one, made))
    return events

  def _count(self, found: prefill.Result | decode.Result) -> None:
    with self._mutex:
      self._experts.add(on_host(found.assigned_LE), on_host(found.dropped_L))

  def _made(self, one: Running, tokens: Sequence[int]) -> Event:
    """Returns the event of new tokens, up to a stop token; the last ends the request."""
    request, now = one.request, self._clock()
    stop = next((i for i, token in enumerate(tokens) if token in one.stop_tokens), None)
    tokens = tuple(tokens if stop is None else tokens[: stop + 1])
    before = self._timings[one.request_id]
    timing = before._replace(
      first_s=now if before.num_tokens == 0 else before.first_s,
      last_s=now,
      num_tokens=before.num_tokens + len(tokens),
    )
    self._new_tokens += len(tokens)
    self._timings[one.request_id] = timing
    if stop is not None:
      return self._end(one.request_id, tokens, requests.STOP)
    if timing.num_tokens == request.new_tokens:
      return self._end(one.request_id, tokens, requests.LENGTH)
    return Event(one.request_id, tokens, "", timing)

  def _end(self, request_id: int, tokens: tuple[int, ...], ended: str) -> Event:
    """Returns the last event of a request, which then holds nothing any more."""
    with self._mutex:
      if request_id in self._scheduler.running:
        self._scheduler.release(request_id)
      else:
        del self._waiting[request_id]
      timing = self._timings.pop(request_id)
      self._latencies.add(timing)
      self._num_ended[ended] += 1
    return Event(request_id, tokens, ended, timing)
