"""Who sits in which slot with which pages, and whose prompt the next prefill call takes on.

A request gets its slot and every page that it can come to need before it begins, so that none has
to stop half-way for want of memory; the queue is served in order, so that none waits for ever.
Host data only. Knows requests, slots and pages; must not know devices or the clock.
"""

import dataclasses

import numpy as np

from moe_jax import config
from moe_jax.model import kv_cache
from moe_jax.serve import decode, packing, prefill
from moe_jax.serve import pages as pages_lib
from moe_jax.serve.packing import Piece, Wish
from moe_jax.serve.pages import Pages
from moe_jax.serve.requests import Request

_NOTHING = np.zeros(0, np.int32)
_NO_STOP = -1


@dataclasses.dataclass
class Running:
  """A request in its slot.

  Attributes:
    request_id: the engine's.
    request: what is asked.
    prompt: its token ids, int32.
    slot: [micro-batch, place] of `decode.Slots`.
    rank: of `expert`.
    pages: of the sequence, from its first on.
    stop_tokens: of the request, to look tokens up in.
    num_prefilled: tokens of the prompt that are in the cache.
  """

  request_id: int
  request: Request
  prompt: np.ndarray
  slot: tuple[int, int]
  rank: int
  pages: np.ndarray
  stop_tokens: frozenset[int]
  num_prefilled: int = 0

  @property
  def is_prefilled(self) -> bool:
    return self.num_prefilled == len(self.prompt)


class Scheduler:
  """The deployment's slots and pages, and who holds them.

  Attributes:
    running: by request id, in the order in which they began.
    slots: what the next decode call takes, numpy.
    pages: free and held.
  """

  def __init__(self, settings: config.Config):
    """Begins with everything free."""
    self._settings = settings
    ranks, serve = settings.mesh.sequence_shares, settings.serve
    self.pages = Pages(ranks, kv_cache.num_pages(settings))
    self.slots = packing.numpy_zeros(decode.abstract_slots(settings))
    self.slots.wishes.top_p[:] = 1.0
    self.running: dict[int, Running] = {}
    self._shape = decode.shape(settings)
    # By rank and micro-batch: those of one rank are filled evenly, so that all stages have work.
    self._free_slots = [
      [[rank * serve.slots + place for place in range(serve.slots)] for _ in range(self._shape[0])]
      for rank in range(ranks)
    ]

  @property
  def num_slots(self) -> int:
    return self._shape[0] * self._shape[1]

  def admit(self, request_id: int, request: Request) -> bool:
    """Returns whether the request has got a slot and its pages; if not, nothing has changed."""
    serve = self._settings.serve
    needed = kv_cache.pages_of(len(request.prompt) + request.new_tokens - 1, serve.page)
    fits = lambda rank: any(self._free_slots[rank]) and self.pages.num_free(rank) >= needed
    ranks = [rank for rank in range(len(self._free_slots)) if fits(rank)]
    if not ranks:
      return False
    rank = max(ranks, key=self.pages.num_free)
    free = self._free_slots[rank]
    micro = max(range(len(free)), key=lambda micro: len(free[micro]))
    self.running[request_id] = Running(
      request_id=request_id,
      request=request,
      prompt=np.asarray(request.prompt, np.int32),
      slot=(micro, free[micro].pop()),
      rank=rank,
      pages=self.pages.take(rank, needed),
      stop_tokens=frozenset(request.stop_tokens),
    )
    return True

  def next_pieces(self) -> list[tuple[Running, Piece]]:
    """Returns what the next prefill call takes, which then counts as prefilled.

    Prompts take turns, a chunk each, oldest first: a short one behind a long one need not wait for
    its end, and the oldest is in every call.
    """
    serve, size = self._settings.serve, prefill.chunk_tokens(self._settings)
    ranks = self._settings.mesh.sequence_shares
    room = [serve.prefill_rows * serve.prefill_micro_batches] * ranks
    found = []
    while turn := [o for o in self.running.values() if room[o.rank] and not o.is_prefilled]:
      for one in turn:
        if not room[one.rank]:
          continue
        start = one.num_prefilled
        tokens = one.prompt[start : start + size]
        found.append((one, Piece(tokens, start, one.pages, one.rank, one.request.wish)))
        one.num_prefilled += len(tokens)
        room[one.rank] -= 1
    return found

  def begin(self, one: Running, token: int) -> None:
    """Makes the slot of a prompt that is in the cache active, from its first new token on."""
    slots, request = self.slots, one.request
    length = len(one.prompt)
    slots.token[one.slot], slots.position[one.slot] = token, length
    slots.limit[one.slot] = length + request.new_tokens - 1
    # The device knows one stop token; the others end a request when the host sees them.
    slots.stop_token[one.slot] = request.stop_tokens[0] if request.stop_tokens else _NO_STOP
    self._set_wish(one.slot, request.wish)

  def advance(self, one: Running, tokens: tuple[int, ...]) -> None:
    """Takes over what a decode call made in a slot."""
    self.slots.token[one.slot] = tokens[-1]
    self.slots.position[one.slot] += len(tokens)

  def release(self, request_id: int) -> None:
    """Frees slot and pages."""
    one = self.running.pop(request_id)
    self.slots.limit[one.slot] = self.slots.position[one.slot] = 0
    # An empty slot that asked for something would have every call look for it.
    self._set_wish(one.slot, Wish())
    micro, place = one.slot
    self._free_slots[one.rank][micro].append(place)
    self.pages.give_back(one.rank, one.pages)

  def active(self) -> list[Running]:
    """Returns whose slots make tokens."""
    is_active = self.slots.position < self.slots.limit
    return [one for one in self.running.values() if is_active[one.slot]]

  def longest_after_decode(self) -> int:
    """Returns the tokens of the longest sequence in the cache after the next decode call."""
    slots = self.slots
    after = np.minimum(slots.position + self._settings.serve.decode_tokens, slots.limit)
    return int(after.max())

  def page_table(self, width: int) -> np.ndarray:
    """Returns the pages of every slot as a decode call takes them, [U, X * b, width] int32."""
    by_slot = {one.slot: one.pages for one in self.active()}
    in_order = [by_slot.get(slot, _NOTHING) for slot in np.ndindex(*self._shape)]
    return pages_lib.table(in_order, width).reshape(*self._shape, width)

  def _set_wish(self, slot: tuple[int, int], wish: Wish) -> None:
    for name, value in wish._asdict().items():
      getattr(self.slots.wishes, name)[slot] = value
