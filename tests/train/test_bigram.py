import collections
import itertools
import math

import numpy as np
import pytest

from moe_jax.interop import tokenizer
from moe_jax.train import bigram, corpus, data
from tests.train.test_data import documents, random_texts

TRAIN = [*random_texts(20, 20, 80), "die Füße\n" * 5]
HELD_OUT = [*random_texts(21, 6, 80), "z"]


def slow_fit(texts):
  counts, totals = collections.Counter(), collections.Counter()
  for text in texts:
    content = text.encode()
    for before, after in itertools.pairwise(content):
      counts[before, after] += 1
      totals[before] += 1
  k = bigram.ADDED_COUNT
  return lambda before, after: math.log((counts[before, after] + k) / (totals[before] + 256 * k))


def make(name, vocab, **changes):
  made = tokenizer.TOKENIZERS[name].train(TRAIN, vocab)
  loaded = corpus.Corpus(documents(*TRAIN), documents(*HELD_OUT), report=None, fingerprint="")
  sizes = {"batch": 3, "sequence": 7, "seed": 0, "eval_batches": 1000}
  return data.Dataset(loaded, made, **(sizes | changes))


def test_fit_against_counting():
  log_probability = bigram.fit(documents(*TRAIN))
  slow = slow_fit(TRAIN)
  expected = [[slow(before, after) for after in range(256)] for before in range(256)]
  np.testing.assert_allclose(log_probability, expected, rtol=1e-12)


def test_rows_are_distributions():
  np.testing.assert_allclose(np.exp(bigram.fit(documents(*TRAIN))).sum(1), 1, rtol=1e-12)


def test_pairs_do_not_cross_documents():
  np.testing.assert_array_equal(
    bigram.fit(documents("ab", "ba")), bigram.fit(documents("ba", "ab"))
  )
  assert not np.array_equal(bigram.fit(documents("ab", "ba")), bigram.fit(documents("abba")))


@pytest.mark.parametrize("name, vocab", [("bytes", 256), ("bpe", 300)])
@pytest.mark.parametrize("eval_batches", [2, 1000])
def test_loss_against_a_loop(name, vocab, eval_batches):
  dataset = make(name, vocab, eval_batches=eval_batches)
  batches = [dataset.eval_batch(i) for i in range(dataset.num_eval_batches)]
  pieces, slow = dataset.tokenizer.pieces, slow_fit(TRAIN)
  nats = []
  for batch in batches:
    for row in range(3):
      for i in range(7):
        if batch["weights"][row, i]:
          before = pieces[batch["tokens"][row, i]][-1]
          for after in pieces[batch["targets"][row, i]]:
            nats.append(-slow(before, after))
            before = after
  assert len(nats) == dataset.num_eval_bytes
  found = bigram.loss(bigram.fit(documents(*TRAIN)), iter(batches), pieces)
  assert found == pytest.approx(sum(nats) / len(nats), rel=1e-12)


def test_bytes_judge_on_every_pair_of_the_held_out_text():
  dataset = make("bytes", 256)
  slow = slow_fit(TRAIN)
  nats = [
    -slow(before, after) for text in HELD_OUT for before, after in itertools.pairwise(text.encode())
  ]
  found = bigram.loss(
    bigram.fit(documents(*TRAIN)),
    (dataset.eval_batch(i) for i in range(dataset.num_eval_batches)),
    dataset.tokenizer.pieces,
  )
  assert found == pytest.approx(sum(nats) / len(nats), rel=1e-12)


def test_no_target_to_judge_on():
  batch = {name: np.zeros((2, 3), np.int32) for name in ("tokens", "targets", "weights")}
  with pytest.raises(ValueError, match="no target of weight 1"):
    bigram.loss(bigram.fit(documents("ab")), [batch], tokenizer.Bytes().pieces)
