"""pipeline.ends: which chunks come and leave beside ticks, against what the table's units need."""

import numpy as np
import pytest

from moe_jax.pipeline import ends
from moe_jax.pipeline.schedules import SCHEDULES, forward_only


def test_of_two_stages_by_hand():
  """Stage 0 begins chunk 1 in tick 2, when the first micro-batches come round."""
  table = SCHEDULES["interleaved"](2, 16, 4)
  assert ends.coming(table)[:4].tolist() == [1, 2, 3, -1]
  assert ends.leaving(table)[-4:].tolist() == [-1, 3, 2, 1]


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 3, 8, 17])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_comes_is_there_in_time_and_what_leaves_is_done(schedule, stages, micro_batches):
  chunks = 4 if schedule == "interleaved" else 1
  table = SCHEDULES[schedule](stages, micro_batches, chunks)
  coming_Q, leaving_Q = ends.coming(table), ends.leaving(table)
  for chunk in range(table.num_chunks):
    runs = lambda chunk_QZ, chunk=chunk: np.flatnonzero((chunk_QZ == chunk).any(1))
    (comes,) = np.nonzero(coming_Q == chunk)
    (leaves,) = np.nonzero(leaving_Q == chunk)
    assert (comes < runs(table.forward_chunk_QZ)[0]).all()
    assert (leaves > runs(table.backward_chunk_QZ)[-1]).all()
    # All or none, and the first never.
    assert len(comes) == (chunk > 0 and coming_Q.max() > 0)
    assert len(leaves) == (chunk > 0 and leaving_Q.max() > 0)
  assert (table.backward_micro_QZ[coming_Q >= 0] < 0).all()
  assert (table.forward_micro_QZ[leaving_Q >= 0] < 0).all()
  assert (coming_Q.max() > 0) == (leaving_Q.max() > 0) == (table.num_chunks > 1)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("micro_batches", [1, 2, 5])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_stage_alone_ends_with_the_first_chunk(stages, micro_batches, chunks):
  table = SCHEDULES["interleaved"](stages, micro_batches, chunks)
  ticks = np.flatnonzero(ends.last(table))
  assert ticks.tolist() == ([table.num_ticks - 1] if stages == 1 and chunks > 1 else [])
  for tick in ticks:
    assert ends.leaving(table)[tick] == 1
    assert np.flatnonzero((table.backward_chunk_QZ == 0).any(1))[-1] == tick
    assert (table.forward_micro_QZ[tick] < 0).all()


def test_without_backward_units_nothing_comes_or_leaves():
  table = forward_only(SCHEDULES["interleaved"](2, 4, 2))
  assert ends.coming(table).max() == ends.leaving(table).max() == -1
  assert not ends.last(forward_only(SCHEDULES["interleaved"](1, 1, 2))).any()
