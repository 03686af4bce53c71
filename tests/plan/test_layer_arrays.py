"""Arrays of the layers: by hand at one moment, and what must hold for every policy and dispatch."""

import pytest

from moe_jax import config
from moe_jax.plan import cost, steps
from moe_jax.plan.layer_arrays import LayerArrays, Moment
from moe_jax.plan.packing import alive_bytes, packed_bytes
from tests import runs


def test_the_backward_kernel_of_a_layer_by_hand():
  """2 x 2 x 2, two layers a stage, 4 sequences of 16 positions, 32 tokens a rank, float32.

  With room for every choice each rank sends 256 rows of 16: 16,384 bytes. A layer waits for the
  cotangents of the one behind it, and its experts' gradients, due beside its exchanges, are there:
  no rows or hidden units wait for them.
  """
  gathered, activation, sent = 64 * 16 * 4, 32 * 16 * 4, 16_384
  heads = 4 * 64 * 4 * 4 * 4  # queries, keys, values and output of 4 heads of 4
  turns = 8 * 64 * 2 * 4  # sines and cosines of half a head's width
  again = gathered + heads + turns + 6 * activation
  padded = 4 * 64 * 4 * 16 * 4  # to 64 positions and a width of 16
  weights = 3 * 4 * 16 * 8 * 4  # gate, up and down of 4 experts of 8 hidden units
  # Four go into the kernel and three come out.
  expected = 7 * padded + again + sent + weights
  found = _arrays().alone()
  assert alive_bytes(found, Moment.ATTENTION) == expected == 518_144


@pytest.mark.parametrize("save", config.SAVE)
@pytest.mark.parametrize("dispatch", ("capacity", *cost.EVERY_ASSIGNMENT))
def test_every_policy_and_dispatch_has_arrays_that_begin_before_they_end(save, dispatch):
  layers = _arrays(pipeline={"save": save}, moe={"dispatch": dispatch})
  for arrays in (layers.alone(), layers.beside(), layers.on_one_device(True)):
    assert all(array.num_bytes >= 0 and array.first <= array.last for array in arrays)
    assert all(array.last <= Moment.ATTENTION for array in arrays)
    assert alive_bytes(arrays, Moment.HIDDEN) > 0


@pytest.mark.parametrize("save", config.SAVE)
def test_twice_the_tokens_never_take_less(save):
  few, many = (
    _arrays(pipeline={"save": save}, train={"batch": batch, "sequence": 64}) for batch in (32, 64)
  )
  assert packed_bytes(few.alone()) < packed_bytes(many.alone())
  assert packed_bytes(few.beside()) < packed_bytes(many.beside())


def _arrays(**sections):
  settings = runs.settings(**sections)
  return LayerArrays(settings, steps.sizes(settings))
