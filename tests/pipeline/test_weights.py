"""Streamed weights: the layer that is taken is the one that was asked for, in any schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.pipeline.schedules import SCHEDULES
from moe_jax.pipeline.together import Together
from moe_jax.pipeline.weights import Shares, Streamed, Whole

CASES = {
  "1f1b": ("1f1b", 2, 5, 1),
  "gpipe": ("gpipe", 3, 4, 1),
  "one stage": ("1f1b", 1, 3, 1),
  "interleaved": ("interleaved", 2, 5, 3),
}


@pytest.mark.parametrize("ahead", [1, 2, 3, 7])
@pytest.mark.parametrize("layers_per_chunk", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_every_layer_finds_its_own_weights(case, layers_per_chunk, ahead):
  """Each unit of each tick takes the layers of its chunk, forwards or backwards, and they are the
  ones that an idle cell or another direction left alone.
  """
  schedule, stages, micro_batches, chunks = CASES[case]
  table = SCHEDULES[schedule](stages, micro_batches, chunks)
  of_stage = chunks * layers_per_chunk
  layers = {"share": jnp.arange(1.0, of_stage + 1), "whole": jnp.arange(of_stage)}
  whole = Together.at_once((True, False), lambda shares: [10 * share for share in shares])
  weights = Streamed(Shares(layers, whole), ahead)
  for stage in range(stages):
    rings = list(weights.start(table, jnp.int32(stage)))
    coming = weights.coming(table, jnp.int32(stage))
    units = (
      (table.forward_micro_QZ, table.forward_chunk_QZ, lambda l: l),
      (table.backward_micro_QZ, table.backward_chunk_QZ, lambda l: layers_per_chunk - 1 - l),
    )
    for tick in range(table.num_ticks):
      for direction, (micro_QZ, chunk_QZ, number_of) in enumerate(units):
        if not (micro_QZ[tick] >= 0).any():
          continue
        given = jax.tree.map(lambda leaf, tick=tick: leaf[tick], coming[direction])
        for place in range(layers_per_chunk):
          chunk = max(int(chunk_QZ[tick, stage]), 0)
          number = chunk * layers_per_chunk + number_of(place)
          taken, ring, shares = weights.take(number, place, given, rings[direction])
          rings[direction] = weights.put(place, given, ring, weights.gather(shares))
          assert taken == {"share": 10 * (number + 1), "whole": number}


def test_whole_weights_have_no_ring():
  table = SCHEDULES["1f1b"](2, 4, 1)
  weights = Whole({"a": jnp.arange(6.0)})
  assert weights.start(table, jnp.int32(0)) == ((), ())
  assert weights.coming(table, jnp.int32(0)) == (None, None)
  taken, *others = weights.take(jnp.int32(4), 0, None, ())
  assert others == [(), ()]
  np.testing.assert_array_equal(taken["a"], 4.0)
