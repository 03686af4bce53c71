"""Prefill and decode with a cache against whole forward passes of the oracle, on every mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax.serve import decode, packing
from moe_jax.serve.packing import Wish
from moe_jax.serve.programs import Programs
from moe_jax.train import state, step
from tests.serve import case
from tests.serve.case import LENGTHS, NEW, PROMPTS
from tests.train import parity

MESHES = [(1, 1, 1), (2, 2, 2), (4, 2, 1), (2, 1, 2, 2)]
LOGIT_MARGIN, ROUTER_MARGIN = 1e-4, 1e-5  # float32 moves logits by some 1e-6
ABSOLUTE = 1e-5  # of cached keys and values


@pytest.fixture(scope="module", params=MESHES, ids=str)
def greedy(request):
  """The mesh's generator, parameters, greedy text, and the cache that it left."""
  generate, parameters = case.generator(request.param)
  caches = []
  decode_once = generate.programs.decode

  def recording(*arguments):
    found = decode_once(*arguments)
    caches[:] = [found[0]]
    return found

  generate.programs.decode = recording
  text = generate(parameters, PROMPTS, new_tokens=NEW)
  generate.programs.decode = decode_once
  return generate, parameters, text, caches[0]


def whole(text) -> tuple:
  return tuple((*prompt, *new) for prompt, new in zip(PROMPTS, text, strict=True))


def test_greedy_text_is_the_argmax_of_the_full_forward_at_every_step(greedy):
  _, _, text, _ = greedy
  assert [len(new) for new in text] == [NEW] * len(PROMPTS)
  logits_BSV = case.logits(whole(text))
  assert case.margin(whole(text)) > ROUTER_MARGIN
  for row, prompt, new in zip(logits_BSV, PROMPTS, text, strict=True):
    row_SV = row[len(prompt) - 1 : len(prompt) + NEW - 1]
    np.testing.assert_array_equal(row_SV.argmax(-1), new)
    second, first = np.sort(row_SV, -1)[:, -2:].T
    assert (first - second).min() > LOGIT_MARGIN
  assert len({token for new in text for token in new}) > 50  # not one token over and over


def test_the_cache_holds_the_full_forwards_keys_and_values(greedy):
  generate, _, text, cache = greedy
  settings = generate._settings
  order = state.placement(settings, step.table(settings).layer_order)
  expected = case.keys_and_values([row[:-1] for row in whole(text)])  # the last is not cached yet
  sequences = generate._sequences(PROMPTS, [Wish()] * len(PROMPTS), NEW)
  pages_per_rank = cache.key_lAgJH.shape[1] // settings.mesh.sequence_shares
  for found, wanted in zip(cache[:2], expected, strict=True):
    found, wanted = np.asarray(found), wanted[order]
    for i, one in enumerate(sequences):
      length = LENGTHS[i] + NEW - 1
      held = found[:, one.rank * pages_per_rank + one.pages]
      held = held.swapaxes(2, 3)  # tokens before heads
      held = held.reshape(held.shape[0], -1, *held.shape[3:])[:, :length]
      assert np.abs(held - wanted[:, i, :length]).max() < ABSOLUTE


def test_nothing_compiles_when_other_sequences_come(greedy):
  generate, parameters, _, _ = greedy
  count = generate.programs.num_compiled
  assert count == 3  # prefill without and with context, decode
  with jax.log_compiles(False):
    again = generate(parameters, PROMPTS[3:5], new_tokens=7, wishes=Wish(0.7, 5, 0.9, 1))
  assert generate.programs.num_compiled == count
  assert [len(new) for new in again] == [7, 7]


def test_a_draw_depends_on_its_own_request_alone(greedy):
  generate, parameters, _, _ = greedy
  wishes = [Wish(temperature=1.0, top_k=20 * (i % 2), seed=i) for i in range(len(PROMPTS))]
  together = generate(parameters, PROMPTS, new_tokens=6, wishes=wishes)
  alone = generate(parameters, [PROMPTS[5]], new_tokens=6, wishes=[wishes[5]])
  assert alone[0] == together[5]
  other = generate(parameters, [PROMPTS[5]], new_tokens=6, wishes=Wish(1.0, seed=77))
  assert other[0] != together[5]
  cold = generate(parameters, PROMPTS, new_tokens=6, wishes=Wish(temperature=1e-4, seed=5))
  assert cold == generate(parameters, PROMPTS, new_tokens=6)


def test_a_stop_token_ends_its_sequence_only(greedy):
  generate, parameters, text, _ = greedy
  stop = text[2][10]
  found = generate(parameters, PROMPTS, new_tokens=20, stop_token=stop)
  cut = lambda new: new[: new.index(stop) + 1] if stop in new else new
  assert found == [cut(new[:20]) for new in text]
  assert len(found[2]) <= 11 and any(len(new) == 20 for new in found)


def test_prefill_counts_padding_and_drops_nothing():
  generate, parameters = case.generator((1, 1, 1))
  counts, padding, rows = [], [], []
  prefill_once = generate.programs.prefill

  def recording(parameters, cache, batch):
    padding.append(packing.num_padding(batch))
    rows.append(int((batch.chunk.lengths_b > 0).sum()))
    cache, found = prefill_once(parameters, cache, batch)
    counts.append(jax.device_get(found))
    return cache, found

  generate.programs.prefill = recording
  generate(parameters, PROMPTS, new_tokens=1)
  generate.programs.prefill = prefill_once
  real = sum(LENGTHS)
  assert sum(padding) == len(counts) * 2 * 8 - real
  # Choices in layers; in the last layer, on one stage, the last token of each row alone has any.
  served = real * 3 + sum(rows)
  assert sum(each.assigned_LE.sum() for each in counts) == served * 2
  assert sum(each.dropped_L.sum() for each in counts) == 0


def test_the_cache_is_written_in_place():
  """No program holds a second copy of the cache, whatever its size."""
  settings = case.settings_of((1, 1, 1), max_tokens=2000)
  settings = dataclasses.replace(
    settings, serve=dataclasses.replace(settings.serve, slots=64, decode_tokens=1)
  )
  programs = Programs(settings, parity.mesh_of(settings))
  cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in programs.abstract.cache[:2])
  for lowered in (programs.lower_decode(8), programs.lower_prefill(8)):
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes < cache_bytes / 4
    assert memory.alias_size_in_bytes >= cache_bytes


@pytest.mark.parametrize(
  ("prompts", "given", "message"),
  [
    ([], {}, "0 prompts; give 1 to 8"),
    ([[1]] * 9, {}, "9 prompts; give 1 to 8, or raise serve.slots"),
    ([[1], []], {}, "prompt 1 has 0 tokens; give 1 to 95"),
    ([[1] * 96], {}, "prompt 0 has 96 tokens; give 1 to 95, for serve.max_tokens=100"),
    ([[1, 256]], {}, "prompt 0 has token 256; tokens are 0 to 255"),
    ([[1]], {"new_tokens": 0}, "new_tokens=0 is not positive"),
    ([[1]], {"wishes": [Wish(), Wish()]}, "2 wishes for 1 prompts"),
    ([[1]], {"wishes": Wish(temperature=-1.0)}, "temperature=-1.0 is not a number from 0 up"),
    ([[1]], {"wishes": Wish(temperature=float("nan"))}, "temperature=nan is not a number"),
    ([[1]], {"wishes": Wish(temperature=2e-38)}, "temperature=2e-38 is too low to divide by"),
    ([[1]], {"wishes": Wish(top_p=1.5)}, "top_p=1.5 is not a fraction"),
    ([[1]], {"wishes": Wish(top_k=-1)}, "top_k=-1 is no number of tokens"),
    ([[1]], {"wishes": Wish(seed=-1)}, "seed=-1 does not fit 32 bits"),
  ],
)
def test_what_cannot_be_continued_is_refused(prompts, given, message):
  generate, parameters = case.generator((1, 1, 1))
  with pytest.raises(ValueError, match=message):
    generate.stream(parameters, prompts, **{"new_tokens": 5, **given})


def test_slots_say_who_is_active():
  settings = case.settings_of((2, 2, 2))
  assert decode.shape(settings) == (2, 4)
