"""Which chunks' weights come while a pipeline fills, and whose gradients leave while it drains.

A stage begins with its first chunk and ends with it. So the weights of the others need not lie
whole before the first tick, nor must their gradients wait for the last one: each is gathered, or
summed over ranks, in a tick that has half of its units and so a link to spare.

Source: overlap-param-gather and overlap-grad-reduce of Megatron-LM, whose interleaved schedule does
so by chunk as well. Knows tables; must not know jax, or what a chunk's weights are.
"""

import numpy as np

from moe_jax.pipeline.table import Table


def coming(table: Table) -> np.ndarray:
  """Returns the chunk whose weights come in each tick, int32 [ticks]; -1 is none.

  All but the first, one after the other from the first tick on; no chunk if one of them is needed
  sooner, or a tick has backward units.
  """
  chunks = np.arange(1, table.num_chunks)
  found_Q = _nothing(table)
  is_alone_Q = (table.backward_micro_QZ < 0).all(1)
  needed = [np.flatnonzero((table.forward_chunk_QZ == chunk).any(1))[0] for chunk in chunks]
  if not table.is_forward_only and is_alone_Q[chunks - 1].all() and (needed >= chunks).all():
    found_Q[chunks - 1] = chunks
  return found_Q


def leaving(table: Table) -> np.ndarray:
  """Returns the chunk whose gradients leave in each tick, int32 [ticks]; -1 is none.

  All but the first, the last one first, up to the last tick; no chunk if one of them is not done by
  then, or a tick has forward units.
  """
  chunks = np.arange(1, table.num_chunks)
  found_Q = _nothing(table)
  if table.is_forward_only:
    return found_Q
  is_alone_Q = (table.forward_micro_QZ < 0).all(1)
  done = [np.flatnonzero((table.backward_chunk_QZ == chunk).any(1))[-1] for chunk in chunks]
  ticks = table.num_ticks - chunks
  if is_alone_Q[ticks].all() and (done < ticks).all():
    found_Q[ticks] = chunks
  return found_Q


def last(table: Table) -> np.ndarray:
  """Returns which tick is the last of a stage that works alone, if gradients leave in it, bool
  [ticks]: beside the first chunk's first layer, the last one to run, those of its others may leave.
  """
  is_last_Q = np.arange(table.num_ticks) == table.num_ticks - 1
  return is_last_Q & (leaving(table) >= 0) & (table.num_stages == 1)


def _nothing(table: Table) -> np.ndarray:
  return np.full(table.num_ticks, -1, np.int32)
