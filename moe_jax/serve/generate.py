"""Continues a batch of prompts: prefill chunk by chunk, then decode, yielding tokens as they come.

All sequences begin together and slots stay empty once theirs ends; sequences that join and leave
are the engine's. Knows parameters and token ids; must not know text, training or files.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from moe_jax import config
from moe_jax.model import kv_cache
from moe_jax.model.transformer import Parameters
from moe_jax.serve import decode, packing, prefill
from moe_jax.serve import pages as pages_lib
from moe_jax.serve.packing import Piece, Wish
from moe_jax.serve.pages import Pages
from moe_jax.serve.programs import Programs, on_host

GREEDY = Wish()


class _Sequence(NamedTuple):
  """A prompt in its slot: [micro-batch, place] of `decode.Slots`."""

  prompt: np.ndarray
  wish: Wish
  slot: tuple[int, int]
  rank: int
  pages: np.ndarray


class Generator:
  """Continues prompts; each program is compiled at its first use, and never again.

  Attributes:
    programs: what it runs.
    num_slots: prompts that it takes at once.
  """

  def __init__(self, settings: config.Config, mesh: Mesh):
    """Compiles nothing yet.

    Args:
      settings: of the model as it was trained; `serve` sizes what is held at once.
      mesh: where the parameters lie.
    """
    self._settings = settings
    self.programs = Programs(settings, mesh)
    self._shape = decode.shape(settings)
    self.num_slots = self._shape[0] * self._shape[1]

  def __call__(
    self,
    parameters: Parameters,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    wishes: Sequence[Wish] | Wish = GREEDY,
    stop_token: int = -1,
  ) -> list[list[int]]:
    """Returns what follows each prompt; takes and raises what `stream` does."""
    found = [[] for _ in prompts]
    for step in self.stream(
      parameters, prompts, new_tokens=new_tokens, wishes=wishes, stop_token=stop_token
    ):
      for i, token in step:
        found[i].append(token)
    return found

  def stream(
    self,
    parameters: Parameters,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    wishes: Sequence[Wish] | Wish = GREEDY,
    stop_token: int = -1,
  ) -> Iterator[list[tuple[int, int]]]:
    """Yields, as they come, (number of the prompt, its next token), of all prompts in turn.

    Args:
      parameters: as `programs.parameters` makes them.
      prompts: token ids.
      new_tokens: to make for each prompt, at most.
      wishes: of each prompt, or of all.
      stop_token: ends a sequence, and is its last token; -1 for none.

    Raises:
      ValueError: more prompts than slots, an empty prompt, tokens that are not of the vocabulary,
        more tokens than `serve.max_tokens` or than there are pages for, or a wish that cannot be
        met.
    """
    wishes = [wishes] * len(prompts) if isinstance(wishes, Wish) else list(wishes)
    # Checked at the call, not at the first token.
    sequences = self._sequences(prompts, wishes, new_tokens)
    return self._run(parameters, sequences, new_tokens, stop_token)

  def _run(self, parameters, sequences: list[_Sequence], new_tokens: int, stop_token: int):
    cache, first = self._prefill(parameters, sequences)
    yield list(enumerate(first))
    slots = self._slots(sequences, first, new_tokens, stop_token)
    by_slot = [sequence.slot for sequence in sequences]
    rows = {sequence.slot: sequence.pages for sequence in sequences}
    nothing = np.zeros(0, np.int32)
    in_order = [rows.get(slot, nothing) for slot in np.ndindex(*self._shape)]
    longest = max(len(sequence.prompt) for sequence in sequences)
    left = [0 if token == stop_token else new_tokens - 1 for token in first]
    while any(left):
      longest = min(longest + self._settings.serve.decode_tokens, self._settings.serve.max_tokens)
      width = self.programs.width(longest)
      pages_UBW = pages_lib.table(in_order, width).reshape(*self._shape, width)
      cache, slots, found = self.programs.decode(parameters, cache, pages_UBW, slots)
      for tokens_UB in on_host(found.tokens_TUB):
        every = [(i, int(tokens_UB[slot])) for i, slot in enumerate(by_slot)]
        made = [(i, token) for i, token in every if token != decode.NO_TOKEN]
        for i, token in made:
          left[i] = 0 if token == stop_token else left[i] - 1
        yield made

  def _sequences(self, prompts, wishes, new_tokens: int) -> list[_Sequence]:
    """Returns the prompts in their slots, spread over the ranks of `data` and `expert`, then over
    micro-batches.
    """
    settings = self._settings
    self._check(prompts, wishes, new_tokens)
    ranks, serve = settings.mesh.sequence_shares, settings.serve
    pages = Pages(ranks, kv_cache.num_pages(settings))
    places = itertools.product(range(serve.slots), range(self._shape[0]), range(ranks))
    found = []
    for prompt, wish, (place, micro, rank) in zip(prompts, wishes, places, strict=False):
      needed = kv_cache.pages_of(len(prompt) + new_tokens - 1, serve.page)
      slot = (micro, rank * serve.slots + place)
      found.append(
        _Sequence(np.asarray(prompt, np.int32), wish, slot, rank, pages.take(rank, needed))
      )
    return found

  def _check(self, prompts, wishes, new_tokens: int) -> None:
    most, vocab = self._settings.serve.max_tokens, self._settings.model.vocab
    if not 0 < len(prompts) <= self.num_slots:
      raise ValueError(f"{len(prompts)} prompts; give 1 to {self.num_slots}, or raise serve.slots")
    if len(wishes) != len(prompts):
      raise ValueError(f"{len(wishes)} wishes for {len(prompts)} prompts; give one for each")
    if new_tokens < 1:
      raise ValueError(f"new_tokens={new_tokens} is not positive; choose at least 1")
    for i, prompt in enumerate(prompts):
      if not 0 < len(prompt) <= most - new_tokens:
        raise ValueError(
          f"prompt {i} has {len(prompt)} tokens; give 1 to {most - new_tokens}, for"
          f" serve.max_tokens={most} and {new_tokens} are to be made"
        )
      wrong = [token for token in prompt if not 0 <= token < vocab]
      if wrong:
        raise ValueError(f"prompt {i} has token {wrong[0]}; tokens are 0 to {vocab - 1}")
    for wish in wishes:
      wish.check()

  def _prefill(self, parameters, sequences: list[_Sequence]):
    """Returns the cache with all prompts, and the first token of each."""
    serve, cache = self._settings.serve, self.programs.empty_cache()
    size = prefill.chunk_tokens(self._settings)
    waiting = [
      (i, Piece(one.prompt[start : start + size], start, one.pages, one.rank, one.wish))
      for i, one in enumerate(sequences)
      for start in range(0, len(one.prompt), size)
    ]
    # First pieces first: those take a program that looks at no earlier pages.
    waiting.sort(key=lambda item: item[1].start)
    room, results = serve.prefill_rows * serve.prefill_micro_batches, []
    while waiting:
      taken, later, left = [], [], [room] * self._settings.mesh.sequence_shares
      for i, piece in waiting:
        fits = left[piece.rank] > 0 and piece.start == waiting[0][1].start
        (taken if fits else later).append((i, piece))
        left[piece.rank] -= fits
      width = self.programs.width(taken[0][1].start)
      batch, places = packing.pack(self._settings, [piece for _, piece in taken], width)
      cache, found = self.programs.prefill(parameters, cache, batch)
      results.append((taken, places, found.tokens_UB))  # read when all calls are made
      waiting = later
    first = [0] * len(sequences)
    for taken, places, tokens_UB in results:
      tokens_UB = on_host(tokens_UB)
      for (i, _), place in zip(taken, places, strict=True):
        first[i] = int(tokens_UB[place])  # of a prompt's pieces the last one's stays
    return cache, first

  def _slots(self, sequences, first, new_tokens: int, stop_token: int) -> decode.Slots:
    slots = packing.numpy_zeros(decode.abstract_slots(self._settings))
    slots.wishes.top_p[:] = 1.0
    slots.stop_token[:] = stop_token
    for one, token in zip(sequences, first, strict=True):
      length = len(one.prompt)
      slots.token[one.slot], slots.position[one.slot] = token, length
      slots.limit[one.slot] = 0 if token == stop_token else length + new_tokens - 1
      for name, value in one.wish._asdict().items():
        getattr(slots.wishes, name)[one.slot] = value
    return slots
