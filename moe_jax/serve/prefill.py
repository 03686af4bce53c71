"""Prefill: chunks of prompts through the pipeline, the cache written, a token after each.

One manual region, a forward-only schedule of micro-batches. A prompt longer than a chunk takes
several, in later calls or in later micro-batches of one call, for a micro-batch reads what earlier
ones wrote. Knows arrays of a fixed shape; must not know requests.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.model import kv_cache, serving, transformer
from moe_jax.model.kv_cache import Cache
from moe_jax.model.serving import Chunk
from moe_jax.model.transformer import Parameters
from moe_jax.parallel import collectives
from moe_jax.parallel.axes import SEQUENCES, STAGE, TENSOR, TOKENS
from moe_jax.pipeline import forward, halves
from moe_jax.pipeline.schedules import SCHEDULES, forward_only
from moe_jax.pipeline.table import Table
from moe_jax.serve import halving, sampling
from moe_jax.serve.sampling import Wishes

ROWS = P(None, SEQUENCES)  # [micro-batches, rows of all ranks of data and expert, ...]


class Batch(NamedTuple):
  """A prefill call. Rows of rank x are x * b to x * b + b - 1; a row that is not used has length 0.

  Attributes:
    chunk: leaves [U, X * b, ...]; pages are numbered within the rank.
    wishes: of each row's request, leaves [U, X * b].
  """

  chunk: Chunk
  wishes: Wishes


class Result(NamedTuple):
  """What a prefill call finds.

  Attributes:
    tokens_UB: the token after each row's last one, drawn as its request wishes, int32; of use
      where the row ends its prompt.
    assigned_LE: assignments per layer (in the pipeline's placement) and expert, int32; where a
      micro-batch is worked whole on one stage, of the last layer those of each row's last token.
    dropped_L: assignments that no expert served, int32.
  """

  tokens_UB: jax.Array
  assigned_LE: jax.Array
  dropped_L: jax.Array


# Where a call leaves them: tokens with their rows, for nothing on the devices waits for others'.
RESULT = Result(ROWS, P(STAGE), P(STAGE))


def rows(settings: config.Config) -> int:
  """Returns the rows of a micro-batch, of all ranks of `data` and `expert`."""
  return settings.serve.prefill_rows * settings.mesh.sequence_shares


def chunk_tokens(settings: config.Config) -> int:
  """Returns S, the tokens of a row: whole pages, in equal shares for the ranks of `tensor`."""
  serve, tensor = settings.serve, settings.mesh.tensor
  num_pages = kv_cache.pages_of(serve.prefill_chunk, serve.page)
  while num_pages * serve.page % tensor:
    num_pages += 1
  return num_pages * serve.page


def prefill_step(settings: config.Config, mesh: Mesh) -> Callable:
  """Returns (parameters, cache, Batch) -> (cache, Result), to be jitted with the cache donated.

  Any number of micro-batches, rows, tokens of a chunk (a multiple of `serve.page` and of
  `mesh.tensor`) and pages of context makes a program; nothing else does. Parameters come in the
  compute dtype, laid out by `transformer.specs`.

  Communication: the pipeline's, attention's over `tensor`, the dispatch's; per micro-batch the
  head's.
  """
  model = serving.functions(settings)

  def head(shared, last_bD, given: Batch, carry):
    position_b = given.chunk.starts_b + given.chunk.lengths_b
    return carry, sampling.sample(model.last_logits(shared, last_bD), given.wishes, position_b)

  whole = forward.Functions(
    embed=lambda shared, given, carry: model.embed_chunk(shared, given.chunk),
    layer=lambda layers, index, shared, x, given, carry, cache, runs: model.layer_of_chunk(
      layers, index, x, given.chunk, cache, runs
    ),
    head=head,
    pick=lambda y, given: model.pick_last(y, given.chunk),
    last_layer=lambda layers, index, shared, x, given, carry, cache, runs: (
      model.last_layer_of_chunk(layers, index, x, given.chunk, cache, runs)
    ),
  )

  def region(parameters: Parameters, cache: Cache, batch: Batch):
    layers, shared = collectives.varying(parameters)
    num_micro_batches, *shape = batch.chunk.tokens_bS.shape
    table = table_of(settings, num_micro_batches)
    way = halving.way(settings, *shape)
    if way is None:
      found = forward.run(whole, table, layers, shared, batch, state=cache)
    else:
      functions = halving.functions(settings, model, way, head)
      found = halves.run(functions, table, layers, shared, batch, cache)
    return found.state, Result(
      tokens_UB=jax.lax.pmax(found.outputs, (STAGE, TENSOR)),
      assigned_LE=jax.lax.psum(found.reports.assigned_E, TOKENS),
      dropped_L=jax.lax.psum(found.reports.dropped, TOKENS),
    )

  cache_specs = kv_cache.specs(settings)
  batch_specs = Batch(Chunk(*[ROWS] * len(Chunk._fields)), Wishes(*[ROWS] * len(Wishes._fields)))
  return jax.shard_map(
    region,
    mesh=mesh,
    in_specs=(transformer.specs(settings.model), cache_specs, batch_specs),
    out_specs=(cache_specs, RESULT),
  )


def abstract_batch(settings: config.Config, context_tokens: int = 0) -> Batch:
  """Returns shapes and dtypes of a call as `settings.serve` sizes it.

  Args:
    context_tokens: most tokens before a chunk.
  """
  serve = settings.serve
  shape = (serve.prefill_micro_batches, rows(settings))
  struct = lambda *more, dtype=jnp.int32: jax.ShapeDtypeStruct((*shape, *more), dtype)
  size = chunk_tokens(settings)
  chunk = Chunk(
    tokens_bS=struct(size),
    starts_b=struct(),
    lengths_b=struct(),
    context_bW=struct(kv_cache.pages_of(context_tokens, serve.page)),
    pages_bW=struct(size // serve.page),
  )
  return Batch(chunk, abstract_wishes(shape))


def abstract_wishes(shape: tuple[int, ...]) -> Wishes:
  """Returns shapes and dtypes of the wishes of rows in this shape."""
  struct = lambda dtype: jax.ShapeDtypeStruct(shape, dtype)
  return Wishes(struct(jnp.float32), struct(jnp.int32), struct(jnp.float32), struct(jnp.uint32))


def table_of(settings: config.Config, num_micro_batches: int) -> Table:
  """Returns the schedule of a call; one stage has all layers in one chunk, in the same order."""
  pipeline = settings.pipeline
  if settings.mesh.stage == 1:
    return forward_only(SCHEDULES["1f1b"](1, num_micro_batches, 1))
  return forward_only(
    SCHEDULES[pipeline.schedule](settings.mesh.stage, num_micro_batches, pipeline.chunks)
  )
