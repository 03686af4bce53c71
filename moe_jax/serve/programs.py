"""The compiled prefill and decode of a deployment, each made once for every width of pages.

What a call costs follows the pages that it looks at, so there is a program for some widths, each
twice the one before: a call takes the narrowest that holds its longest sequence. `compile_all`
makes them, and afterwards nothing compiles. Knows shapes and shardings; must not know requests.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.model import kv_cache, transformer
from moe_jax.model.kv_cache import Cache
from moe_jax.model.transformer import Parameters
from moe_jax.serve import decode, prefill
from moe_jax.serve.prefill import ROWS

_NARROWEST_TOKENS = 128


class Abstract(NamedTuple):
  """Shapes, dtypes and shardings of what every program takes first."""

  parameters: Parameters
  cache: Cache


class Programs:
  """Prefill and decode on a mesh, live or described.

  Attributes:
    abstract: what every program takes first.
    num_compiled: programs made so far.
  """

  def __init__(self, settings: config.Config, mesh: Mesh):
    """Compiles nothing yet."""
    self._settings, self._mesh = settings, mesh
    self.abstract = abstract(settings, mesh)
    self._made: dict[tuple[str, int], Callable] = {}

  @property
  def num_compiled(self) -> int:
    return len(self._made)

  def parameters(self, master: Parameters) -> Parameters:
    """Returns the parameters that the programs take, from master weights in any layout.

    Args:
      master: layers as the schedule of the settings places them.
    """
    dtype = jnp.dtype(self._settings.model.dtype)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract.parameters)
    return jax.jit(lambda p: transformer.cast(p, dtype), out_shardings=shardings)(master)

  def empty_cache(self) -> Cache:
    """Returns a cache of zeros."""
    structs = self.abstract.cache
    make = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), structs)
    return jax.jit(make, out_shardings=self._cache_shardings())()

  def widths(self) -> list[int]:
    """Returns how many pages of a sequence the programs look at, rising."""
    page = self._settings.serve.page
    longest = kv_cache.pages_of(self._settings.serve.max_tokens, page)
    width, found = kv_cache.pages_of(_NARROWEST_TOKENS, page), []
    while width < longest:
      found.append(width)
      width *= 2
    return [*found, longest]

  def width(self, num_tokens: int) -> int:
    """Returns the narrowest width that holds `num_tokens`; 0 for none."""
    if num_tokens == 0:
      return 0
    needed = kv_cache.pages_of(num_tokens, self._settings.serve.page)
    return next(width for width in self.widths() if width >= needed)

  def compile_all(self) -> None:
    """Makes every program that calls of any width take."""
    for width in self.widths():
      self._decode(width)
    for width in [0, *self.widths()]:
      self._prefill(width)

  def prefill(self, parameters: Parameters, cache: Cache, batch: prefill.Batch):
    """Returns (cache, prefill.Result) of a batch that `packing.pack` made; the cache is donated.

    Its context width is one of `widths`, or 0. Results lie as `prefill.RESULT` says; `on_host`
    brings them.
    """
    run = self._prefill(batch.chunk.context_bW.shape[-1])
    return run(parameters, cache, self._put(batch))

  def decode(self, parameters: Parameters, cache: Cache, pages_UBW: np.ndarray, slots):
    """Returns (cache, decode.Slots, decode.Result); the cache is donated, W is one of `widths`.

    Results lie as `decode.RESULT` says; the slots, as they come back, the next call may take.
    """
    run = self._decode(pages_UBW.shape[-1])
    return run(parameters, cache, *self._put((pages_UBW, slots)))

  def lower_prefill(self, context_width: int):
    """Returns the lowered program of a context width, in pages."""
    step = prefill.prefill_step(self._settings, self._mesh)
    tokens = context_width * self._settings.serve.page
    batch = self._place(prefill.abstract_batch(self._settings, tokens))
    results = (self._cache_shardings(), self._shardings(prefill.RESULT))
    jitted = jax.jit(step, donate_argnums=1, out_shardings=results)
    return jitted.lower(*self.abstract, batch)

  def lower_decode(self, width: int):
    """Returns the lowered program of a width, in pages."""
    step = decode.decode_step(self._settings, self._mesh)
    pages = jax.ShapeDtypeStruct((*decode.shape(self._settings), width), jnp.int32)
    given = self._place((pages, decode.abstract_slots(self._settings)))
    slots = NamedSharding(self._mesh, ROWS)
    results = (self._cache_shardings(), slots, self._shardings(decode.RESULT))
    jitted = jax.jit(step, donate_argnums=1, out_shardings=results)
    return jitted.lower(*self.abstract, *given)

  def _prefill(self, width: int) -> Callable:
    return self._make("prefill", width, self.lower_prefill)

  def _decode(self, width: int) -> Callable:
    return self._make("decode", width, self.lower_decode)

  def _make(self, kind: str, width: int, lower: Callable) -> Callable:
    if (kind, width) not in self._made:
      self._made[kind, width] = lower(width).compile()
    return self._made[kind, width]

  def _cache_shardings(self):
    return jax.tree.map(lambda leaf: leaf.sharding, self.abstract.cache)

  def _shardings(self, specs):
    place = lambda spec: NamedSharding(self._mesh, spec)
    return jax.tree.map(place, specs, is_leaf=lambda node: isinstance(node, P))

  def _put(self, tree):
    """Returns host arrays, the same in every process, as the programs take them."""
    if jax.process_count() == 1:  # then a program takes them as they are, which is faster
      return tree
    sharding = NamedSharding(self._mesh, ROWS)
    put = lambda leaf: (
      leaf
      if isinstance(leaf, jax.Array)
      else jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
    )
    return jax.tree.map(put, tree)

  def _place(self, structs):
    sharding = NamedSharding(self._mesh, ROWS)
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), structs
    )


def on_host(result: jax.Array) -> np.ndarray:
  """Returns a result of a program; every process gets the same."""
  if result.is_fully_addressable:
    return np.asarray(result)
  return multihost_utils.process_allgather(result, tiled=True)


def abstract(settings: config.Config, mesh: Mesh) -> Abstract:
  """Returns shapes, dtypes and shardings of the parameters, in the compute dtype, and the cache."""
  model = settings.model
  parameters = jax.eval_shape(
    lambda: transformer.cast(transformer.init(jax.random.key(0), model), jnp.dtype(model.dtype))
  )
  place = lambda leaf, spec: jax.ShapeDtypeStruct(
    leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
  )
  is_spec = lambda node: isinstance(node, P)
  cache = jax.tree.map(
    lambda spec, leaf: place(leaf, spec),
    kv_cache.specs(settings), kv_cache.abstract(settings), is_leaf=is_spec,
  )  # fmt: skip
  return Abstract(jax.tree.map(place, parameters, transformer.specs(model)), cache)
