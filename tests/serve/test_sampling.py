"""Draws from the distribution that temperature, top-k and top-p leave, against sorting in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.serve import sampling
from moe_jax.serve.sampling import Wishes

V, DRAWS = 24, 4000
LOGITS = np.random.default_rng(0).normal(0, 2, V).astype(np.float32)


def expected(temperature, top_k, top_p):
  """Returns the probability of each token, by sorting."""
  order = np.argsort(-LOGITS)
  p = np.exp(LOGITS.astype(np.float64) / temperature)
  kept = order[: top_k or V]
  p = np.where(np.isin(np.arange(V), kept), p, 0)
  p /= p.sum()
  before = np.cumsum(p[order]) - p[order]  # of more likely tokens
  is_in = np.zeros(V, bool)
  is_in[order] = (before < top_p) | (np.arange(V) == 0)
  p = np.where(is_in, p, 0)
  return p / p.sum()


def draw(logits_BV, temperature, top_k, top_p):
  B = len(logits_BV)
  wishes = Wishes(
    jnp.full(B, temperature, jnp.float32), jnp.full(B, top_k, jnp.int32),
    jnp.full(B, top_p, jnp.float32), jnp.arange(B, dtype=jnp.uint32),
  )  # fmt: skip
  return np.asarray(sampling.sample(jnp.asarray(logits_BV), wishes, jnp.full(B, 7, jnp.int32)))


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.0])
@pytest.mark.parametrize("top_k", [0, 1, 5])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_draws_follow_the_distribution(temperature, top_k, top_p):
  found = draw(np.tile(LOGITS, (DRAWS, 1)), temperature, top_k, top_p)
  share = np.bincount(found, minlength=V) / DRAWS
  wanted = expected(temperature, top_k, top_p)
  assert set(np.flatnonzero(share)) <= set(np.flatnonzero(wanted))
  deviation = np.sqrt(wanted * (1 - wanted) / DRAWS)
  assert (np.abs(share - wanted) <= 5 * deviation + 1e-9).all()


def test_rows_have_their_own_wishes_and_zero_is_greedy():
  logits_BV = np.tile(LOGITS, (4, 1))
  wishes = Wishes(
    jnp.asarray([0.0, 5.0, 5.0, 1.0], jnp.float32), jnp.asarray([0, 1, 0, 0], jnp.int32),
    jnp.asarray([1.0, 1.0, 0.0, 1.0], jnp.float32), jnp.zeros(4, jnp.uint32),
  )  # fmt: skip
  found = sampling.sample(jnp.asarray(logits_BV), wishes, jnp.zeros(4, jnp.int32))
  assert found[:3].tolist() == [LOGITS.argmax()] * 3


def test_equals_of_the_last_of_top_k_stay():
  logits = np.array([0.0, 3.0, 1.0, 1.0, -2.0], np.float32)
  assert set(draw(np.tile(logits, (300, 1)), 3.0, 2, 1.0)) == {1, 2, 3}


def test_a_draw_depends_on_seed_and_position():
  wishes = lambda seed: Wishes(
    jnp.ones(1), jnp.zeros(1, jnp.int32), jnp.ones(1), jnp.full(1, seed, jnp.uint32)
  )
  flat = jnp.zeros((1, 4096))
  at = lambda seed, position: int(
    sampling.sample(flat, wishes(seed), jnp.full(1, position, jnp.int32))[0]
  )
  assert at(0, 0) == at(0, 0)
  assert len({at(seed, position) for seed in range(4) for position in range(4)}) == 16
