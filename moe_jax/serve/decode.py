"""Decode: the next tokens of every slot, through the pipeline without draining it.

The slots form as many micro-batches as there are stages, and a call makes `serve.decode_tokens`
tokens of each. A micro-batch's next token is known, by the head, in the very tick in which its
next turn on the first stage begins: both stages always have work, but for the first and last
ticks of a call. One manual region. Shapes never change: sequences join and leave by what `Slots`
says. Knows slots; must not know requests or text.
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
from moe_jax.model.serving import Tokens
from moe_jax.model.transformer import Parameters
from moe_jax.parallel import collectives
from moe_jax.parallel.axes import STAGE, TENSOR, TOKENS
from moe_jax.pipeline import forward
from moe_jax.pipeline.schedules import SCHEDULES, forward_only
from moe_jax.pipeline.table import Table
from moe_jax.serve import sampling
from moe_jax.serve.prefill import ROWS, abstract_wishes
from moe_jax.serve.sampling import Wishes

NO_TOKEN = -1


class Slots(NamedTuple):
  """What each slot is at, leaves [U, X * b]; one is active while its position is below its limit.

  Attributes:
    token: the last token, not yet in the cache, int32.
    position: of that token, int32; so many tokens are cached.
    limit: tokens are made while `position` is below it, int32; 0 for a slot without a sequence.
      For n tokens after a prompt of p, the first by prefill, it is p + n - 1.
    stop_token: ends the sequence, and is the last that it makes, int32; -1 for none.
    wishes: of the slot's request.
  """

  token: jax.Array
  position: jax.Array
  limit: jax.Array
  stop_token: jax.Array
  wishes: Wishes


class Result(NamedTuple):
  """What a decode call makes.

  Attributes:
    tokens_TUB: for each of its tokens in turn what every slot made, int32; NO_TOKEN where it was
      not active.
    assigned_LE: as prefill's.
    dropped_L: likewise.
  """

  tokens_TUB: jax.Array
  assigned_LE: jax.Array
  dropped_L: jax.Array


RESULT = Result(P(None, *ROWS), P(STAGE), P(STAGE))  # as prefill.RESULT


def shape(settings: config.Config) -> tuple[int, int]:
  """Returns [U, X * b] of the slots: a micro-batch for each stage, `serve.slots` on each rank."""
  return settings.mesh.stage, settings.serve.slots * settings.mesh.sequence_shares


def decode_step(settings: config.Config, mesh: Mesh, num_tokens: int | None = None) -> Callable:
  """Returns (parameters, cache, pages, Slots) -> (cache, Slots, Result), to be jitted with the
  cache donated.

  `pages` are [U, X * b, W] int32: the pages of each slot's sequence from its first on, numbered
  within the rank; they must hold `limit` tokens, or as many as this call comes to. W is of any
  width that holds the longest: each width is a program, and costs as much as W pages of every slot.

  Args:
    num_tokens: of each slot in a call, default `serve.decode_tokens`.

  Communication: the pipeline's, attention's over `tensor`, the dispatch's; per micro-batch the
  head's.
  """
  num_micro_batches = settings.mesh.stage
  num_tokens = num_tokens or settings.serve.decode_tokens
  schedule = table_of(settings, num_tokens)

  def region(parameters: Parameters, cache: Cache, pages_UbW, slots: Slots):
    layers, shared = collectives.varying(parameters)
    turn = jnp.arange(schedule.num_micro_batches, dtype=jnp.int32)
    functions = _functions(serving.functions(settings), pages_UbW)
    found = forward.run(functions, schedule, layers, shared, turn % num_micro_batches, slots, cache)
    everywhere = lambda leaf: jax.lax.pmax(leaf, (STAGE, TENSOR))
    tokens_TUb = found.outputs.reshape(num_tokens, num_micro_batches, -1)
    counts = jax.lax.psum(found.reports, TOKENS)
    return (
      found.state,
      jax.tree.map(everywhere, found.carry),
      Result(everywhere(tokens_TUb), counts.assigned_E, counts.dropped),
    )

  cache_specs = kv_cache.specs(settings)
  slots_specs = Slots(ROWS, ROWS, ROWS, ROWS, Wishes(*[ROWS] * len(Wishes._fields)))
  return jax.shard_map(
    region,
    mesh=mesh,
    in_specs=(transformer.specs(settings.model), cache_specs, ROWS, slots_specs),
    out_specs=(cache_specs, slots_specs, RESULT),
  )


def abstract_slots(settings: config.Config) -> Slots:
  """Returns shapes and dtypes of the slots."""
  struct = jax.ShapeDtypeStruct(shape(settings), jnp.int32)
  return Slots(struct, struct, struct, struct, abstract_wishes(shape(settings)))


def _functions(model: serving.Model, pages_UbW: jax.Array) -> forward.Functions:
  """Returns the model for the pipeline: the input is a micro-batch's number, the carry `Slots`."""

  def tokens_of(micro, slots: Slots) -> Tokens:
    at = lambda leaf: leaf[micro]
    is_active_b = at(slots.position) < at(slots.limit)
    return Tokens(at(slots.token), at(slots.position), is_active_b, pages_UbW[micro])

  def head(shared, y, micro, slots: Slots):
    tokens = tokens_of(micro, slots)
    logits_bV = model.token_logits(shared, y, tokens)
    wishes = jax.tree.map(lambda leaf: leaf[micro], slots.wishes)
    next_b = sampling.sample(logits_bV, wishes, tokens.positions_b + 1)
    return _advance(slots, micro, tokens, next_b)

  return forward.Functions(
    embed=lambda shared, micro, slots: model.embed_tokens(shared, tokens_of(micro, slots)),
    layer=lambda layers, index, shared, x, micro, slots, cache, runs: model.layer_of_tokens(
      layers, index, x, tokens_of(micro, slots), cache, runs
    ),
    head=head,
  )


def _advance(slots: Slots, micro, tokens: Tokens, next_b):
  """Returns the slots after a micro-batch's tokens, and the tokens."""
  is_active_b = tokens.is_active_b
  limit_b = jnp.where(next_b == slots.stop_token[micro], 0, slots.limit[micro])
  put = lambda leaf, new: leaf.at[micro].set(jnp.where(is_active_b, new, leaf[micro]))
  slots = slots._replace(
    token=put(slots.token, next_b),
    position=put(slots.position, tokens.positions_b + 1),
    limit=put(slots.limit, limit_b),
  )
  return slots, jnp.where(is_active_b, next_b, NO_TOKEN)


def table_of(settings: config.Config, num_tokens: int) -> Table:
  """Returns the schedule of a call: turn t is token t // U of micro-batch t % U.

  Raises:
    ValueError: a turn would begin before the head has made its token.
  """
  pipeline, num_micro_batches = settings.pipeline, settings.mesh.stage
  turns = num_micro_batches * num_tokens
  table = forward_only(SCHEDULES[pipeline.schedule](settings.mesh.stage, turns, pipeline.chunks))
  begins_U, is_made_U = table.forward_tick_UW[:, 0], table.head_tick_U
  if (is_made_U[:-num_micro_batches] > begins_U[num_micro_batches:]).any():
    raise ValueError(
      f"pipeline.schedule={pipeline.schedule} begins a decode micro-batch before its last token is"
      " known; choose 1f1b or interleaved"
    )
  return table
