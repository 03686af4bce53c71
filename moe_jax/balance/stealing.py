"""Who serves whom in this micro-batch: whole-number quotas of each expert's tokens for each rank.

Decided on the device, from the counts of the very micro-batch, with static shapes. Tokens of an
expert that several ranks hold are shared among these; where that does not make the ranks even, the
hottest experts of the busiest ranks become *shadows*: their weights are sent to every rank, and
idle ranks take the excess. Quotas conserve tokens exactly: rows sum to the experts' counts. Knows
counts and who holds what; must not know weights, tokens or how either travels.

Letters: X ranks, E experts, H shadows at most.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_EVEN = 200  # of the mean, a part that a rank may have above it without being relieved
_SHARES = 12  # corrections of the shares of replicas; each about halves what is uneven


class Price(NamedTuple):
  """What a shadow costs and a token takes, for the rule that decides whether stealing pays.

  Attributes:
    shadow_s: seconds to send one expert's weights to every rank and its gradients home.
    token_s: seconds of one token at one expert, forward and backward.
  """

  shadow_s: float
  token_s: float


class Decision(NamedTuple):
  """What the ranks do in a micro-batch, the same on all of them.

  Attributes:
    quota_EX: tokens of each expert that each rank serves, int32.
    shadow_H: the experts whose weights are sent, int32; E where there is none.
    peak_before: tokens of the busiest rank without shadows, int32.
    peak: with them.
  """

  quota_EX: jax.Array
  shadow_H: jax.Array
  peak_before: jax.Array
  peak: jax.Array


def held_once(num_experts: int, num_ranks: int) -> np.ndarray:
  """Returns holds_EX where each rank holds E / X neighbouring experts and no other does."""
  return np.arange(num_experts)[:, None] // (num_experts // num_ranks) == np.arange(num_ranks)


def decide(
  counts_E: jax.Array, holds_EX: jax.Array, num_shadows: int, price: Price | None = None
) -> Decision:
  """Returns the quotas of a micro-batch of one layer.

  Args:
    counts_E: tokens of the micro-batch for each expert, over all devices, int32.
    holds_EX: which ranks hold which expert, each at least one; a numpy array where it is fixed.
    num_shadows: H, at most so many experts' weights are sent.
    price: shadows are left out where they cost more than they save; None takes them whenever they
      make the ranks more even.
  """
  quota_EX = _shared(counts_E, holds_EX)
  load_X = quota_EX.sum(0, dtype=jnp.int32)
  peak = load_X.max()
  # Plus nothing, but of the counts' type: on a mesh both branches differ along the same axes.
  nothing_H = jnp.full(num_shadows, holds_EX.shape[0], jnp.int32) + 0 * peak
  return jax.lax.cond(
    may_pay(load_X, price),
    lambda: _with_shadows(quota_EX, load_X, num_shadows, price),
    lambda: Decision(quota_EX, nothing_H, peak, peak),
  )


def may_pay(load_X: jax.Array, price: Price | None = None) -> jax.Array:
  """Returns whether `decide` has to look for shadows.

  None save more than all that the busiest rank has above the mean, and one is the fewest.

  Args:
    load_X: tokens of each rank without shadows, int32.
    price: as `decide` takes it.
  """
  mean, peak = _mean(load_X), load_X.max()
  is_uneven = peak > _even(mean)
  if price is None:
    return is_uneven
  return is_uneven & ((peak - mean).astype(jnp.float32) * price.token_s > price.shadow_s)


def _with_shadows(quota_EX, load_X, num_shadows: int, price: Price | None) -> Decision:
  """Returns the decision where shadows may pay."""
  num_experts, num_ranks = quota_EX.shape
  shadow_H = _shadows(quota_EX, num_shadows, price)
  # Row E stands for no expert.
  tokens_HX = jnp.concatenate([quota_EX, jnp.zeros((1, num_ranks), jnp.int32)])[shadow_H]
  stolen_HX = _filled(tokens_HX, load_X - tokens_HX.sum(0, dtype=jnp.int32))
  with_EX = quota_EX.at[shadow_H].set(stolen_HX, mode="drop")
  peak_before, peak = load_X.max(), with_EX.sum(0, dtype=jnp.int32).max()
  pays = peak < peak_before
  if price is not None:
    # Besides what `_shadows` foresaw: too few tokens to fill the idle ranks.
    used = jnp.sum(shadow_H < num_experts).astype(jnp.float32)
    saved_s = (peak_before - peak).astype(jnp.float32) * price.token_s
    pays &= saved_s > used * price.shadow_s
  return Decision(
    jnp.where(pays, with_EX, quota_EX),
    jnp.where(pays, shadow_H, num_experts),
    peak_before,
    jnp.where(pays, peak, peak_before),
  )


def even_sends(quota_EX: jax.Array, counts_E: jax.Array) -> jax.Array:
  """Returns sends_EX of a source that splits its own tokens as the quotas do, int32.

  For exchanges whose buffers are alike for every pair of ranks: no source sends one rank much more
  than another does. A source's tokens are conserved; of all sources together a rank gets its quota
  up to one token for each source and expert.

  Args:
    quota_EX: of a Decision.
    counts_E: tokens of the source for each expert, int32.
  """
  end_EX = jnp.cumsum(quota_EX, 1, dtype=jnp.int32)
  all_E1 = end_EX[:, -1:]
  part_EX = end_EX.astype(jnp.float32) / jnp.maximum(all_E1, 1).astype(jnp.float32)
  cut_EX = jnp.round(part_EX * counts_E.astype(jnp.float32)[:, None]).astype(jnp.int32)
  return jnp.diff(jnp.where(end_EX == all_E1, counts_E[:, None], cut_EX), axis=1, prepend=0)


def destinations(sends_EX: jax.Array, expert_A: jax.Array, place_A: jax.Array) -> jax.Array:
  """Returns rank_A, where each assignment of a source goes.

  Args:
    sends_EX: of the source.
    expert_A: the assignment's expert.
    place_A: its place among the source's assignments to that expert, from 0.
  """
  end_EX = jnp.cumsum(sends_EX, 1, dtype=jnp.int32)
  return (place_A[:, None] >= end_EX[expert_A]).sum(1, dtype=jnp.int32)


def _shared(counts_E, holds_EX):
  """Returns quota_EX without shadows: whole numbers, replicas taking more where ranks are idle."""
  if isinstance(holds_EX, np.ndarray) and (holds_EX.sum(1) == 1).all():
    return jnp.where(holds_EX, counts_E[:, None], 0)
  count_E = counts_E.astype(jnp.float32)
  mean = jnp.maximum(count_E.sum() / holds_EX.shape[1], 1.0)
  weight_EX = jnp.asarray(holds_EX, jnp.float32)
  dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)

  # Of each expert that it holds a rank takes in proportion to one weight of its own, so that a
  # correction is two products with a vector.
  def correct(_, weight_X):
    load_X = weight_X * dot(count_E / dot(weight_EX, weight_X), weight_EX)
    return weight_X / jnp.maximum(load_X / mean, 0.05)

  weight_X = jax.lax.fori_loop(0, _SHARES, correct, jnp.ones_like(weight_EX[0]))
  share_EX = weight_EX * weight_X[None]
  share_EX /= share_EX.sum(1, keepdims=True)
  # Rounding where shares end, and not shares, keeps the sum. Ends that are exact would be torn from
  # the count by float32, so the last holder's is the count itself. A product with a triangle adds
  # up in half of the time that `cumsum` takes on a CPU.
  index_X = jnp.arange(holds_EX.shape[1])
  upper_XX = (index_X[:, None] <= index_X[None]).astype(jnp.float32)
  end_EX = jnp.round(dot(share_EX, upper_XX) * count_E[:, None]).astype(jnp.int32)
  is_last_EX = index_X[None] >= jnp.where(holds_EX, index_X[None], 0).max(1, keepdims=True)
  end_EX = jnp.where(is_last_EX, counts_E[:, None], jnp.minimum(end_EX, counts_E[:, None]))
  return jnp.diff(end_EX, axis=1, prepend=0)


def _mean(load_X):
  """Returns the mean rank's tokens, rounded up."""
  return (load_X.sum(dtype=jnp.int32) + load_X.size - 1) // load_X.size


def _even(mean):
  """Returns how many tokens a rank may have without being relieved."""
  return mean + mean // _EVEN


def _shadows(quota_EX, num_shadows: int, price: Price | None):
  """Returns shadow_H: again and again the hottest expert of the rank that is then the busiest,
  until no rank has more than the mean, or one more costs more than it saves.
  """
  num_experts = quota_EX.shape[0]
  mean = _mean(quota_EX.sum(0, dtype=jnp.int32))
  even = _even(mean)

  def take(state, _):
    fixed_EX, load_X = state
    rank = load_X.argmax()
    expert = fixed_EX[:, rank].argmax().astype(jnp.int32)
    is_hot = load_X[rank] > even
    row_X = jnp.where(is_hot, fixed_EX[expert], 0)
    fixed_EX = fixed_EX.at[expert].add(-row_X)
    load_X -= row_X
    return (fixed_EX, load_X), (jnp.where(is_hot, expert, num_experts), load_X.max())

  state = (quota_EX, quota_EX.sum(0, dtype=jnp.int32))
  _, (shadow_H, left_H) = jax.lax.scan(take, state, length=num_shadows)
  if price is None:
    return shadow_H
  # What the busiest rank has left with the first h shadows, h from 0; idle ranks take the rest.
  peak_H1 = jnp.maximum(jnp.concatenate([state[1].max()[None], left_H]), mean).astype(jnp.float32)
  cost_H1 = (
    peak_H1 * price.token_s + jnp.arange(num_shadows + 1, dtype=jnp.float32) * price.shadow_s
  )
  wanted = jnp.arange(num_shadows) < cost_H1.argmin()
  return jnp.where(wanted, shadow_H, num_experts)


def _filled(tokens_HX, load_X):
  """Returns quota_HX: the shadows' tokens poured over the ranks, the idlest filled first; what fits
  stays where the expert is held.

  Args:
    tokens_HX: what each holder would have without shadows.
    load_X: what the ranks have besides.
  """
  room_X = _level(load_X, tokens_HX.sum(dtype=jnp.int32)) - load_X
  before_HX = jnp.cumsum(tokens_HX, 0, dtype=jnp.int32) - tokens_HX
  stays_HX = jnp.clip(room_X[None] - before_HX, 0, tokens_HX)
  left_H = (tokens_HX - stays_HX).sum(1, dtype=jnp.int32)
  room_X -= stays_HX.sum(0, dtype=jnp.int32)
  end_H1, end_1X = jnp.cumsum(left_H)[:, None], jnp.cumsum(room_X)[None]
  shared_HX = jnp.minimum(end_H1, end_1X) - jnp.maximum(
    end_H1 - left_H[:, None], end_1X - room_X[None]
  )
  return stays_HX + jnp.maximum(shared_HX, 0)


def _level(load_X, tokens):
  """Returns the loads after `tokens` more, the idlest ranks raised to one level, or one above."""
  num_ranks = load_X.size
  sorted_X, rank_X = jax.lax.sort(
    (load_X, jnp.arange(num_ranks, dtype=jnp.int32)), num_keys=1, is_stable=True
  )
  number_X = jnp.arange(1, num_ranks + 1, dtype=jnp.int32)
  total_X = jnp.cumsum(sorted_X, dtype=jnp.int32)
  # Raising the first k to the k-th takes less than there is: these are filled, the rest are not.
  filled = jnp.maximum(jnp.sum(sorted_X * number_X - total_X < tokens, dtype=jnp.int32), 1)
  level, more = jnp.divmod(tokens + total_X[filled - 1], filled)
  raised_X = jnp.where(number_X <= filled, level + (number_X <= more).astype(jnp.int32), sorted_X)
  return jnp.zeros_like(load_X).at[rank_X].set(raised_X, unique_indices=True)
