"""Prefill worked as two halves against prefill worked whole: tokens, cache and counts."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax import config
from moe_jax.model import kv_cache
from moe_jax.serve import halving, packing, prefill
from moe_jax.serve.packing import Piece, Wish
from moe_jax.serve.programs import Programs
from tests.serve import case
from tests.train import parity

PAGE, CONTEXT = 8, 64
ABSOLUTE = 1e-5  # of cached keys and values
# Rows of a rank and tokens of a row, so many that they are exchanged and not gathered.
SHAPES = {halving.BY_POSITIONS: (1, 320), halving.BY_ROWS: (2, 160)}


# Where each form stands: one layer in a chunk, and two; one micro-batch a tick from the first on.
PIPELINES = {
  halving.BY_POSITIONS: config.Pipeline(schedule="interleaved", chunks=2),
  halving.BY_ROWS: config.Pipeline(schedule="1f1b"),
}


def settings_of(way, mesh=(2, 2, 2), **serve) -> config.Config:
  rows, tokens = SHAPES[way]
  sizes = {
    "max_tokens": 512, "page": PAGE, "prefill_chunk": tokens, "prefill_rows": rows,
    "prefill_micro_batches": 4 // rows,
  }  # fmt: skip
  settings = case.settings_of(mesh, **{**sizes, **serve})
  return dataclasses.replace(settings, pipeline=PIPELINES[way])


def pieces(settings, starts) -> list[Piece]:
  """Returns pieces of mixed lengths: within the first half, at its end, past it, and whole."""
  size = prefill.chunk_tokens(settings)
  lengths = (1, size // 2 - 3, size // 2, size // 2 + 1, size - PAGE + 1, size, 7)
  random, taken, found = np.random.default_rng(3), [0, 0], []
  for i, length in enumerate(lengths):
    rank, start = i % 2, starts[i % len(starts)]
    num = kv_cache.pages_of(start + length, PAGE)
    pages = taken[rank] + np.arange(num, dtype=np.int32)
    taken[rank] += num
    ids = random.integers(0, settings.model.vocab, length).astype(np.int32)
    found.append(Piece(ids, start, pages, rank, Wish(temperature=float(i % 2), seed=i)))
  return found


def run(settings, *series):
  """Returns (cache, last result) of each series of calls that begins with a cache full of noise."""
  mesh = parity.mesh_of(settings)
  programs = Programs(settings, mesh)
  parameters = programs.parameters(parity.parameters_on(mesh, settings, case.params()))
  found = []
  for batches in series:
    random = np.random.default_rng(1)
    noise = lambda leaf, random=random: jax.device_put(
      random.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding
    )
    cache = jax.tree.map(noise, programs.abstract.cache)
    for batch in batches:
      cache, result = programs.prefill(parameters, cache, batch)
    found.append(jax.device_get((cache, result)))
  return found


@pytest.mark.parametrize("starts", [(0,), (0, 2 * PAGE, 5 * PAGE)], ids=["begin", "continue"])
@pytest.mark.parametrize("way", SHAPES, ids=["positions", "rows"])
def test_halves_equal_the_whole(way, starts, monkeypatch):
  settings = settings_of(way)
  assert halving.way(settings, *SHAPES[way]) is way
  width = CONTEXT // PAGE if max(starts) else 0
  batch, places = packing.pack(settings, pieces(settings, starts), width)
  ((cache, found),) = run(settings, [batch])
  monkeypatch.setattr(halving, "way", lambda *shape: None)
  ((whole_cache, whole),) = run(settings, [batch])
  ends = tuple(np.array(places).T)
  np.testing.assert_array_equal(found.tokens_UB[ends], whole.tokens_UB[ends])
  np.testing.assert_array_equal(found.assigned_LE, whole.assigned_LE)
  assert not found.dropped_L.any()
  assert found.assigned_LE.sum() > 0 and len(np.unique(found.tokens_UB[ends])) > 2
  for each, expected in zip(cache[:2], whole_cache[:2], strict=True):
    assert np.abs(each - expected).max() < ABSOLUTE


@pytest.mark.parametrize("rows", [2, 3])
def test_a_row_goes_on_with_the_prompt_of_the_row_before(rows):
  settings = settings_of(
    halving.BY_ROWS, mesh=(2, 1, 1), prefill_rows=rows, prefill_micro_batches=1
  )
  size = prefill.chunk_tokens(settings)
  ids = np.random.default_rng(0).integers(0, settings.model.vocab, 2 * size).astype(np.int32)
  pages, width = np.arange(2 * size // PAGE, dtype=np.int32), size // PAGE
  first, second = (Piece(ids[start : start + size], start, pages, 0, Wish()) for start in (0, size))
  batch_of = lambda *pieces: packing.pack(settings, pieces, width)[0]
  (cache, found), (expected_cache, expected) = run(
    settings, [batch_of(first, second)], [batch_of(first), batch_of(second)]
  )
  assert found.tokens_UB[0, 1] == expected.tokens_UB[0, 0]
  for each, other in zip(cache[:2], expected_cache[:2], strict=True):
    assert np.abs(each - other).max() < ABSOLUTE
