"""train.streaming: which weights lie in shares, and a model of which none would."""

import jax
import pytest

from moe_jax.model import transformer
from moe_jax.train import streaming
from tests.train import parity

MESH = (4, 2, 1)


def settings_of(**different):
  return parity.settings_of(MESH, model={"layers": 4, "d_model": 64}, **different)


def test_attentions_matrices_lie_in_shares_where_layers_are_gathered_ahead():
  whole, streamed = settings_of(), settings_of(pipeline={"prefetch_layers": 1})
  of = lambda settings: streaming.specs(settings, parity.mesh_of(settings))
  pairs = zip(*map(jax.tree.leaves, (of(whole), of(streamed))), strict=True)
  assert sum(one != other for one, other in pairs) == 4


def test_they_lie_in_shares_where_a_schedule_lets_them_come_beside_ticks():
  of = lambda settings: jax.tree.leaves(streaming.specs(settings, parity.mesh_of(settings)))
  chunks = {"schedule": "interleaved", "chunks": 2}
  whole, arriving = of(settings_of()), of(settings_of(pipeline=chunks))
  assert sum(one != other for one, other in zip(whole, arriving, strict=True)) == 4
  # One rank of `expert` holds everything.
  alone = parity.settings_of((1, 2, 2), model={"layers": 4, "d_model": 64}, pipeline=chunks)
  assert of(alone) == jax.tree.leaves(transformer.specs(alone.model))


def test_streaming_nothing_is_refused():
  model = {"layers": 32, "d_model": 16}
  settings = parity.settings_of(MESH, model=model, pipeline={"prefetch_layers": 1})
  with pytest.raises(ValueError, match=r"prefetch_layers=1 gathers .* as large as model.layers=32"):
    streaming.specs(settings, parity.mesh_of(settings))
