"""Pages: each is free or held, and a call's tables say where a sequence lies."""

import numpy as np
import pytest

from moe_jax.model import kv_cache
from moe_jax.serve import packing, pages
from moe_jax.serve.packing import Piece, Wish
from moe_jax.serve.pages import Pages
from tests.serve import case


def test_no_page_is_given_out_twice_and_none_is_lost():
  random, free = np.random.default_rng(0), Pages(2, 20)
  held = []
  for _ in range(500):
    rank = int(random.integers(2))
    if held and random.random() < 0.5:
      free.give_back(*held.pop(int(random.integers(len(held)))))
    elif (count := int(random.integers(1, 6))) <= free.num_free(rank):
      held.append((rank, free.take(rank, count)))
    for r in range(2):
      mine = [page for rank, some in held for page in some if rank == r]
      assert len(set(mine)) == len(mine) == 20 - free.num_free(r)
  while held:
    free.give_back(*held.pop())
  assert free.num_free(0) == free.num_free(1) == 20


def test_what_is_not_there_is_refused():
  free = Pages(1, 4)
  held = free.take(0, 3)
  with pytest.raises(ValueError, match="2 pages asked for on rank 0 of expert, 1 of 4 are free"):
    free.take(0, 2)
  assert free.num_free(0) == 1
  free.give_back(0, held[:1])
  for wrong in (held[:1], held[[1, 1]]):
    with pytest.raises(ValueError, match="are not all held"):
      free.give_back(0, wrong)


def test_tables_are_cut_and_filled():
  found = pages.table([np.array([5, 6, 7]), np.array([2]), np.array([])], 2)
  assert found.tolist() == [[5, 6], [2, -1], [-1, -1]]


def piece(length, start=0, rank=0, **wish):
  tokens = np.arange(length, dtype=np.int32)
  return Piece(tokens, start, np.arange(40, 60, dtype=np.int32), rank, Wish(**wish))


def test_pieces_lie_in_rows_of_their_rank():
  settings = case.settings_of((2, 2, 2))
  given = [piece(8), piece(5, start=8, rank=0), piece(3, rank=1, temperature=0.5, seed=9)]
  batch, places = packing.pack(settings, given, 4)
  assert places == [(0, 0), (1, 0), (0, 1)]
  chunk = batch.chunk
  assert chunk.lengths_b.tolist() == [[8, 3], [5, 0]]
  assert chunk.starts_b.tolist() == [[0, 0], [8, 0]]
  assert chunk.context_bW[1, 0].tolist() == [40, 41, -1, -1]
  assert chunk.pages_bW[1, 0].tolist() == [42, 43]
  assert chunk.pages_bW[0].tolist() == [[40, 41], [40, -1]]
  assert (chunk.pages_bW[1, 1] == -1).all() and (chunk.context_bW[0] == -1).all()
  assert batch.wishes.temperature[0, 1] == 0.5 and batch.wishes.seed[0, 1] == 9
  assert batch.wishes.top_p.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
  ("pieces", "message"),
  [
    ([piece(9)], "a piece has 9 tokens; give 1 to 8"),
    ([piece(0)], "a piece has 0 tokens"),
    ([piece(2, start=3)], "a piece begins at 3; give a multiple of serve.page=4 up to 16"),
    ([piece(2, start=20)], "a piece begins at 20"),
    ([piece(2)] * 3, "more than 2 pieces for rank 0 of expert"),
  ],
)
def test_pieces_that_do_not_fit_are_refused(pieces, message):
  with pytest.raises(ValueError, match=message):
    packing.pack(case.settings_of((2, 2, 2)), pieces, 4)


def test_the_fraction_of_pages_says_how_many_there_are():
  whole = kv_cache.num_pages(case.settings_of((2, 2, 2)))
  assert whole == 2 * 2 * 25
  assert kv_cache.num_pages(case.settings_of((2, 2, 2), pages_fraction=0.5)) == whole // 2
  assert kv_cache.num_pages(case.settings_of((2, 2, 2), pages_fraction=0.001)) == 25
