"""The next token from logits, each row by its own request's wishes: greedy, temperature, top-k,
top-p.

A draw depends on the request's seed and the token's position alone, so a request gets the same
tokens whatever else is in the batch. Thresholds are found digit by digit in the bits of a float:
exact, and without sorting the vocabulary. Knows logits; must not know the model or the cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_BITS = 32
_BITS_AT_ONCE = 4
# Names the branches in a compiled program that the requests' wishes decide.
SCOPE = "sampling"


class Wishes(NamedTuple):
  """How each row's request wants its tokens, leaves [B].

  Attributes:
    temperature: divides the logits, float32; 0 takes the most likely token.
    top_k: draws from that many most likely tokens, int32; 0 from all.
    top_p: draws from the fewest most likely tokens that hold this share of the probability, of
      what `top_k` left, float32; 1 from all. Of both, equals of the last token are kept.
    seed: of the draws, uint32.
  """

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  seed: jax.Array


@jax.named_scope(SCOPE)
def sample(logits_BV: jax.Array, wishes: Wishes, positions_B: jax.Array) -> jax.Array:
  """Returns the next token of each row, int32 [B].

  Args:
    logits_BV: float32.
    wishes: of each row.
    positions_B: of the token to be drawn in its sequence, int32.
  """
  greedy_B = logits_BV.argmax(-1).astype(jnp.int32)
  wants_draw_B = wishes.temperature > 0

  def draw():
    scaled_BV = logits_BV / jnp.where(wants_draw_B, wishes.temperature, 1.0)[:, None]
    kept_BV = _restrict(scaled_BV, wishes)
    drawn_B = jax.vmap(_draw)(kept_BV, wishes.seed, positions_B)
    return jnp.where(wants_draw_B, drawn_B, greedy_B)

  return jax.lax.cond(wants_draw_B.any(), draw, lambda: greedy_B)


def _draw(logits_V, seed, position):
  key = jax.random.fold_in(jax.random.key(seed), position)
  return (logits_V + jax.random.gumbel(key, logits_V.shape)).argmax().astype(jnp.int32)


def _restrict(logits_BV, wishes: Wishes):
  """Returns the logits with -inf for the tokens that top-k and top-p leave out."""
  is_asked_B = (wishes.top_k > 0) | (wishes.top_p < 1)

  def restrict():
    order_BV = _ordered(logits_BV)
    num = jnp.where(wishes.top_k > 0, wishes.top_k, logits_BV.shape[1])
    weight_BV = jnp.exp(logits_BV - logits_BV.max(-1, keepdims=True))
    above = lambda t_BC: order_BV[:, None] > t_BC[..., None]
    # A token is kept if fewer than k are above it; of those, if less than p's share is above it.
    k_B = _lowest(lambda t_BC: above(t_BC).sum(-1, dtype=jnp.int32) < num[:, None], order_BV)
    weight_BV = jnp.where(order_BV >= k_B[:, None], weight_BV, 0.0)
    mass_above = lambda t_BC: jnp.where(above(t_BC), weight_BV[:, None], 0.0).sum(-1)
    share_B1 = wishes.top_p[:, None] * weight_BV.sum(-1, keepdims=True)
    p_B = _lowest(lambda t_BC: mass_above(t_BC) < share_B1, order_BV)
    # top_p = 0 has no token with less than nothing above it: the most likely one stays.
    least_B = jnp.minimum(jnp.maximum(k_B, p_B), order_BV.max(-1))
    least_B = jnp.where(wishes.top_p < 1, least_B, k_B)
    return jnp.where(order_BV >= least_B[:, None], logits_BV, -jnp.inf)

  return jax.lax.cond(is_asked_B.any(), restrict, lambda: logits_BV)


def _ordered(x):
  """Returns uint32 numbers in the order of the floats `x`: their bits, turned over below 0."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  sign = jnp.uint32(1 << (_BITS - 1))
  return jnp.where(bits >= sign, ~bits, bits | sign)


def _lowest(fits, order_BV):
  """Returns the lowest t_B, uint32, with `fits(t_B1)`, which holds from some number on upwards.

  Args:
    fits: of several numbers for each row, [B, C], asked at once.
  """
  digit_1C = jnp.arange((1 << _BITS_AT_ONCE) - 1, dtype=jnp.uint32)[None]

  def step(i, t_B):
    # A digit after the other, the highest first: it is above those with which, whatever follows,
    # nothing fits yet.
    shift = jnp.uint32(_BITS - _BITS_AT_ONCE) - _BITS_AT_ONCE * i.astype(jnp.uint32)
    lower = (jnp.uint32(1) << shift) - jnp.uint32(1)
    digit_B = (~fits(t_B[:, None] | (digit_1C << shift) | lower)).sum(-1, dtype=jnp.uint32)
    return t_B | (digit_B << shift)

  return jax.lax.fori_loop(0, _BITS // _BITS_AT_ONCE, step, jnp.zeros_like(order_BV[:, 0]))
