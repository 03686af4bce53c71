"""The schedules there are: pure functions (stages, micro-batches, chunks) -> Table, by name.

A new schedule is one function and one row of SCHEDULES. This module knows numbers of stages,
micro-batches and chunks; it must not know what a unit computes, or what it costs.
"""

import dataclasses

import numpy as np

from moe_jax.pipeline.table import Table


def gpipe(num_stages: int, num_micro_batches: int, num_chunks: int) -> Table:
  """Returns all forwards, then all backwards: a stash of every micro-batch.

  A head comes in the tick of its backward, so finished outputs wait in the inbox of stage 0.

  Raises:
    ValueError: a number that is not positive, or more than one chunk.
  Source: Huang et al. 2019, GPipe, section 2.3.
  """
  _check_sizes("gpipe", num_stages, num_micro_batches, num_chunks)
  _check_one_chunk("gpipe", num_chunks)
  start_UY = np.arange(num_micro_batches)[:, None]
  return _mirrored("gpipe", num_stages, start_UY, lag=num_micro_batches + num_stages - 1)


def one_forward_one_backward(num_stages: int, num_micro_batches: int, num_chunks: int) -> Table:
  """Returns 1F1B: a backward as soon as there is one, a stash of at most 2 * Z - 1 micro-batches.

  Raises:
    ValueError: a number that is not positive, or more than one chunk.
  Source: Narayanan et al. 2019, PipeDream, section 3.2; here a tick runs both halves in lockstep.
  """
  _check_sizes("1f1b", num_stages, num_micro_batches, num_chunks)
  _check_one_chunk("1f1b", num_chunks)
  return dataclasses.replace(interleaved(num_stages, num_micro_batches, 1), name="1f1b")


def interleaved(num_stages: int, num_micro_batches: int, num_chunks: int) -> Table:
  """Returns 1F1B over chunks: where U >= Z and the ends are free, bubble (Z - 1) / (U * Y + Z - 1).

  Micro-batches pass chunk after chunk in groups. A round of a group takes as many ticks as it has
  micro-batches, and at least Z, which is when a micro-batch is back at its stage. Groups hold Z
  micro-batches and share out the rest, U % Z, so no round has an idle cell unless U < Z: forward
  and backward units each span U * Y + Z - 1 ticks, the fewest possible. In exchange heads wait
  Y - 1 ticks for each micro-batch that the largest group has more than Z.

  Raises:
    ValueError: a number that is not positive.
  Source: Narayanan et al. 2021, Efficient Large-Scale Language Model Training, section 2.2.
  """
  _check_sizes("interleaved", num_stages, num_micro_batches, num_chunks)
  num_groups = max(1, num_micro_batches // num_stages)
  sizes = [len(group) for group in np.array_split(np.arange(num_micro_batches), num_groups)]
  rounds = [max(size, num_stages) for size in sizes]
  group_start = 0
  starts_UY = []
  for size, round_ticks in zip(sizes, rounds, strict=True):
    starts_UY.append(
      group_start + np.arange(size)[:, None] + round_ticks * np.arange(num_chunks)[None, :]
    )
    group_start += size * num_chunks
  lag = num_stages + (num_chunks - 1) * max(rounds)
  return _mirrored("interleaved", num_stages, np.concatenate(starts_UY), lag)


def forward_only(table: Table) -> Table:
  """Returns the forward units of `table`, each head in the tick after its last one (evaluation)."""
  head_tick_U = table.forward_tick_UW[:, -1] + 1
  num_ticks = int(head_tick_U.max()) + 1
  head_micro_Q = np.full(num_ticks, -1, np.int32)
  head_micro_Q[head_tick_U] = np.arange(table.num_micro_batches)
  idle_QZ = np.full((num_ticks, table.num_stages), -1, np.int32)
  return dataclasses.replace(
    table,
    name=f"{table.name} forward only",
    forward_micro_QZ=table.forward_micro_QZ[:num_ticks],
    forward_chunk_QZ=table.forward_chunk_QZ[:num_ticks],
    backward_micro_QZ=idle_QZ,
    backward_chunk_QZ=idle_QZ,
    head_micro_Q=head_micro_Q,
  )


SCHEDULES = {"gpipe": gpipe, "1f1b": one_forward_one_backward, "interleaved": interleaved}


def _mirrored(name: str, num_stages: int, start_UY: np.ndarray, lag: int) -> Table:
  """Returns the table whose backward is its forward upside down, `lag` ticks later.

  Args:
    start_UY: tick in which stage 0 runs forward (micro-batch, chunk); stage z runs it z later.
    lag: ticks from then to the backward of (micro-batch, last chunk - chunk) on the last stage.
  """
  num_micro_batches, num_chunks = start_UY.shape
  stage_Z = np.arange(num_stages)
  forward_tick_UYZ = start_UY[:, :, None] + stage_Z[None, None, :]
  backward_tick_UYZ = lag + start_UY[:, ::-1, None] + stage_Z[None, None, ::-1]
  shape_QZ = (int(backward_tick_UYZ.max()) + 1, num_stages)

  def cells(tick_UYZ):
    micro_QZ, chunk_QZ = np.full(shape_QZ, -1, np.int32), np.full(shape_QZ, -1, np.int32)
    micro, chunk, stage = np.indices(tick_UYZ.shape)
    micro_QZ[tick_UYZ, stage], chunk_QZ[tick_UYZ, stage] = micro, chunk
    return micro_QZ, chunk_QZ

  head_micro_Q = np.full(shape_QZ[0], -1, np.int32)
  head_micro_Q[backward_tick_UYZ[:, -1, -1]] = np.arange(num_micro_batches)
  return Table(
    name,
    num_stages,
    num_micro_batches,
    num_chunks,
    *cells(forward_tick_UYZ),
    *cells(backward_tick_UYZ),
    head_micro_Q,
  )


def _check_sizes(name, num_stages, num_micro_batches, num_chunks):
  sizes = {"stages": num_stages, "micro_batches": num_micro_batches, "chunks": num_chunks}
  for what, size in sizes.items():
    if size < 1:
      raise ValueError(f"{name}: {what}={size} is not positive; choose 1 or more")


def _check_one_chunk(name, num_chunks):
  if num_chunks != 1:
    raise ValueError(
      f"{name} has one chunk a stage, got chunks={num_chunks};"
      " choose chunks=1 or schedule=interleaved"
    )
