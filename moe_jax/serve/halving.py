"""A micro-batch of prefill as two halves that `pipeline.halves` works side by side.

Half of the rows each where a rank holds an even number of them; where it holds one, half of its
positions, the second half attending to the first's keys and values. Knows chunks and the model's
functions; must not know schedules.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.model import serving
from moe_jax.model.serving import Chunk
from moe_jax.moe import few_tokens
from moe_jax.parallel.mesh import axes_inside_host
from moe_jax.pipeline import halves


class Way(NamedTuple):
  """How to halve.

  Attributes:
    split: Chunk -> two of them.
    join: (`y_bD` of the first half's last tokens, of the second's, Chunk of the second) -> of the
      rows' last tokens.
    hands_over: whether the second half attends to the first.
  """

  split: Callable[[Chunk], tuple[Chunk, Chunk]]
  join: Callable[[jax.Array, jax.Array, Chunk], jax.Array]
  hands_over: bool


def way(settings: config.Config, rows: int, tokens: int) -> Way | None:
  """Returns how to halve a micro-batch, None where it is to be worked whole.

  Whole are those that leave no half a share of every rank, and those that communicate nothing, or
  so little that it takes its latency alone, which two halves would wait for twice. An odd number of
  rows is not cut by positions: a row may go on with the prompt of the row before, and its first
  half would read keys that the other's second half has yet to write.

  Args:
    rows: of a micro-batch on a rank of `expert`.
    tokens: of a row, as `prefill.chunk_tokens`.
  """
  mesh, model = settings.mesh, settings.model
  ranks = mesh.expert * mesh.tensor
  itemsize = jnp.dtype(model.dtype).itemsize
  num_tokens = rows * tokens // 2 * mesh.expert
  if ranks == 1 or few_tokens.is_cheaper(num_tokens, model.d_model, itemsize):
    return None
  if rows % 2 == 0:
    return BY_ROWS
  if rows == 1 and tokens % (2 * settings.serve.page) == 0 and tokens // 2 % mesh.tensor == 0:
    return BY_POSITIONS
  return None


def functions(
  settings: config.Config, model: serving.Model, how: Way, head: Callable
) -> halves.Functions:
  """Returns the model's functions of two halves.

  Args:
    settings: the deployment.
    model: its network.
    how: it is halved.
    head: as `halves.Functions` has it; inputs are the call's `prefill.Batch`.
  """

  def embed(shared, given, carry):
    del carry
    return tuple(model.embed_chunk(shared, half) for half in how.split(given.chunk))

  def begin(half, layers, index, x, given, handed, cache, runs):
    chunk = how.split(given.chunk)[half]
    before = handed if how.hands_over else ()
    return model.attention_of_chunk(layers, index, x, chunk, before, cache, runs)

  def end(half, layers, index, x, given, runs):
    return model.experts_of_chunk(layers, index, x, how.split(given.chunk)[half], runs)

  def pick(y, given):
    chunks = how.split(given.chunk)
    first, second = map(model.pick_last, y, chunks)
    return how.join(first, second, chunks[1])

  inside = axes_inside_host(settings)
  return halves.Functions(embed, begin, end, pick, head, inside)


def _rows(chunk: Chunk) -> tuple[Chunk, Chunk]:
  half = chunk.tokens_bS.shape[0] // 2
  return (
    jax.tree.map(lambda leaf: leaf[:half], chunk),
    jax.tree.map(lambda leaf: leaf[half:], chunk),
  )


def _positions(chunk: Chunk) -> tuple[Chunk, Chunk]:
  size, num_pages = chunk.tokens_bS.shape[1] // 2, chunk.pages_bW.shape[1] // 2
  first = chunk._replace(
    tokens_bS=chunk.tokens_bS[:, :size],
    lengths_b=jnp.minimum(chunk.lengths_b, size),
    pages_bW=chunk.pages_bW[:, :num_pages],
  )
  second = chunk._replace(
    tokens_bS=chunk.tokens_bS[:, size:],
    starts_b=chunk.starts_b + size,
    lengths_b=jnp.maximum(chunk.lengths_b - size, 0),
    pages_bW=chunk.pages_bW[:, num_pages:],
  )
  return first, second


def _last_of_either(first_bD, second_bD, chunk: Chunk):
  return jnp.where((chunk.lengths_b > 0)[:, None], second_bD, first_bD)


BY_ROWS = Way(_rows, lambda first, second, _: jnp.concatenate([first, second]), False)
BY_POSITIONS = Way(_positions, _last_of_either, True)
