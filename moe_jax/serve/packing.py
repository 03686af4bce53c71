"""Pieces of prompts laid into the fixed shape of a prefill call, on the host.

Knows numpy arrays; must not know devices, or where prompts come from.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax import config
from moe_jax.model import kv_cache
from moe_jax.serve import pages as pages_lib
from moe_jax.serve import prefill
from moe_jax.serve.sampling import Wishes

_LOWEST_TEMPERATURE = 1e-5  # below, logits over it leave float32


class Wish(NamedTuple):
  """How a request wants its tokens; see `sampling.Wishes`. The default is greedy."""

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0

  def check(self) -> None:
    """Refuses what cannot be sampled by.

    Raises:
      ValueError: names the field, its value and what would do.
    """
    if not 0 <= self.temperature < math.inf:
      raise ValueError(
        f"temperature={self.temperature} is not a number from 0 up; choose such as 0.8"
      )
    if 0 < self.temperature < _LOWEST_TEMPERATURE:
      raise ValueError(
        f"temperature={self.temperature} is too low to divide by; choose 0 for the most likely"
        f" token, or {_LOWEST_TEMPERATURE} or more"
      )
    if not 0 <= self.top_k < 2**31:
      raise ValueError(f"top_k={self.top_k} is no number of tokens; choose 1 or more, 0 for all")
    if not 0 <= self.top_p <= 1:
      raise ValueError(f"top_p={self.top_p} is not a fraction; choose from 0 to 1")
    if not 0 <= self.seed < 2**32:
      raise ValueError(f"seed={self.seed} does not fit 32 bits; choose from 0 to {2**32 - 1}")


class Piece(NamedTuple):
  """The next part of a prompt.

  Attributes:
    tokens: at most `prefill.chunk_tokens` of them, int32.
    start: the position of the first, a multiple of `serve.page`.
    pages: of the sequence from its first on, int32.
    rank: of `expert` that holds the sequence.
    wish: of its request.
  """

  tokens: np.ndarray
  start: int
  pages: np.ndarray
  rank: int
  wish: Wish


def pack(
  settings: config.Config, pieces: Sequence[Piece], context_width: int
) -> tuple[prefill.Batch, list[tuple[int, int]]]:
  """Returns the call's batch, numpy, and the (micro-batch, row) of each piece.

  Pieces of one prompt may go into one call, in their order.

  Args:
    context_width: pages before a chunk that the call has room for.

  Raises:
    ValueError: more pieces of a rank than rows, a piece that is empty or too long, or one that
      begins within a page or after more pages than the width.
  """
  serve, size = settings.serve, prefill.chunk_tokens(settings)
  context_tokens = context_width * serve.page
  batch = numpy_zeros(prefill.abstract_batch(settings, context_tokens))
  chunk, wishes = batch
  chunk.context_bW[:] = chunk.pages_bW[:] = pages_lib.NO_PAGE
  wishes.top_p[:] = 1.0
  places, taken = [], [0] * settings.mesh.sequence_shares
  for piece in pieces:
    if not 0 < len(piece.tokens) <= size:
      raise ValueError(f"a piece has {len(piece.tokens)} tokens; give 1 to {size}")
    if piece.start % serve.page or piece.start > context_tokens:
      raise ValueError(
        f"a piece begins at {piece.start}; give a multiple of serve.page={serve.page} up to"
        f" {context_tokens}, which {context_width} pages of context hold"
      )
    micro, row = divmod(taken[piece.rank], serve.prefill_rows)
    if micro >= serve.prefill_micro_batches:
      raise ValueError(
        f"more than {micro * serve.prefill_rows} pieces for rank {piece.rank} of expert; give the"
        " others to the next call, or raise serve.prefill_rows or serve.prefill_micro_batches"
      )
    taken[piece.rank] += 1
    place = micro, piece.rank * serve.prefill_rows + row
    places.append(place)
    before = piece.start // serve.page
    filled = before + kv_cache.pages_of(len(piece.tokens), serve.page)
    chunk.tokens_bS[place][: len(piece.tokens)] = piece.tokens
    chunk.starts_b[place], chunk.lengths_b[place] = piece.start, len(piece.tokens)
    chunk.context_bW[place][:before] = piece.pages[:before]
    chunk.pages_bW[place][: filled - before] = piece.pages[before:filled]
    for name, value in piece.wish._asdict().items():
      getattr(wishes, name)[place] = value
  return batch, places


def num_padding(batch: prefill.Batch) -> int:
  """Returns how many positions of a packed call hold no token."""
  return int(batch.chunk.tokens_bS.size - batch.chunk.lengths_b.sum())


def numpy_zeros(structs):
  """Returns zeros, numpy, of the shapes and dtypes of a tree of named tuples."""
  if hasattr(structs, "_fields"):
    return type(structs)(*map(numpy_zeros, structs))
  return np.zeros(structs.shape, structs.dtype)


def no_wishes(shape: tuple[int, ...]) -> Wishes:
  """Returns greedy wishes, numpy, of rows in this shape."""
  wishes = numpy_zeros(prefill.abstract_wishes(shape))
  wishes.top_p[:] = 1.0
  return wishes
