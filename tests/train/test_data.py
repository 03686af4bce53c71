import itertools
import json
import re
import threading

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from moe_jax.interop import tokenizer
from moe_jax.train import corpus, data

FIELDS = {"tokens", "targets", "positions", "segments", "weights"}


def documents(*texts):
  return tuple(corpus.Document(f"{i}.txt", text) for i, text in enumerate(texts))


def make(train, held_out=("x" * 200,), name="bytes", vocab=256, **changes):
  train, held_out = documents(*train), documents(*held_out)
  made = tokenizer.TOKENIZERS[name].train([d.text for d in train], vocab)
  loaded = corpus.Corpus(train, held_out, report=None, fingerprint=f"{train}{held_out}")
  sizes = {"batch": 4, "sequence": 8, "seed": 0, "eval_batches": 1000}
  return data.Dataset(loaded, made, **(sizes | changes))


def random_texts(seed, num_texts, longest):
  random = np.random.default_rng(seed)
  letters = list("abcdefgh é🙂\n")
  return [
    "".join(random.choice(letters, random.integers(1, longest + 1))) for _ in range(num_texts)
  ]


def oracle(texts, sequence, encode):
  """Every row of the packed texts, one token at a time."""
  stream = [(t, d, p) for d, text in enumerate(texts) for p, t in enumerate(encode(text))]
  rows = []
  for lo in range(0, len(stream) - 1, sequence):
    row = {name: [0] * sequence for name in FIELDS}
    seen = []
    for i in range(min(sequence, len(stream) - 1 - lo)):
      token, document, position = stream[lo + i]
      target, target_document, _ = stream[lo + i + 1]
      if document not in seen:
        seen.append(document)
      row["tokens"][i] = int(token)
      row["targets"][i] = int(target)
      row["segments"][i] = len(seen)
      row["weights"][i] = 1 if document == target_document else 0
      # A document that the row's start cuts counts from there.
      row["positions"][i] = position if stream[lo][1] != document else i
    rows.append(row)
  return rows


def as_rows(batch):
  return [
    {name: values[b].astype(int).tolist() for name, values in batch.items()}
    for b in range(len(batch["tokens"]))
  ]


def key(row):
  return json.dumps(row, sort_keys=True)


def assert_same(left, right):
  assert left.keys() == right.keys()
  for name in left:
    np.testing.assert_array_equal(left[name], right[name])


def test_shapes_and_types():
  batch = make(random_texts(0, 20, 30), batch=3, sequence=5).train_batch(0)
  assert batch.keys() == FIELDS
  for name, values in batch.items():
    assert values.shape == (3, 5)
    assert values.dtype == (np.float32 if name == "weights" else np.int32)


def test_a_row_by_hand():
  batch = make(["abc", "de", "fghij"], batch=1, sequence=9).train_batch(0)
  assert as_rows(batch) == [
    {
      "tokens": list(b"abcdefghi"),
      "targets": list(b"bcdefghij"),
      "positions": [0, 1, 2, 0, 1, 0, 1, 2, 3],
      "segments": [1, 1, 1, 2, 2, 3, 3, 3, 3],
      "weights": [1, 1, 0, 1, 0, 1, 1, 1, 1],
    }
  ]


@hypothesis.given(
  texts=st.lists(st.text("abé🙂", min_size=1, max_size=12), min_size=1, max_size=12),
  sequence=st.integers(1, 20),
)
@hypothesis.settings(deadline=None)
def test_windows_against_oracle(texts, sequence):
  made = tokenizer.Bytes()
  stream = data.lay_end_to_end(documents(*texts), made)
  expected = oracle(texts, sequence, made.encode)
  for window_id, row in enumerate(expected):
    found = data.window(stream, sequence, window_id)
    assert {name: values.tolist() for name, values in found.items()} == row
  past = data.window(stream, sequence, len(expected) + 1)
  assert all(len(values) == sequence and not values.any() for values in past.values())


@hypothesis.given(
  texts=st.lists(st.text("abé🙂", min_size=2, max_size=40), min_size=3, max_size=12),
  sequence=st.integers(1, 5),
  batch=st.integers(1, 5),
)
@hypothesis.settings(deadline=None, max_examples=30)
def test_every_window_once_an_epoch_and_every_held_out_row_once(texts, sequence, batch):
  dataset = make(texts, texts, sequence=sequence, batch=batch)
  rows = [key(row) for row in oracle(texts, sequence, tokenizer.Bytes().encode)]
  full = rows[: dataset.num_windows]
  assert dataset.num_windows == (len("".join(texts).encode()) - 1) // sequence

  # As many epochs as it takes for batches and epochs to end together.
  steps = dataset.num_windows
  seen = [key(row) for step in range(steps) for row in as_rows(dataset.train_batch(step))]
  for epoch in range(batch):
    assert sorted(seen[epoch * len(full) : (epoch + 1) * len(full)]) == sorted(full)

  held_out = [
    key(row) for i in range(dataset.num_eval_batches) for row in as_rows(dataset.eval_batch(i))
  ]
  assert held_out[: len(rows)] == rows
  of_text = oracle(texts, sequence, tokenizer.Bytes().encode)
  weightless = [key(row | {"weights": [0] * sequence}) for row in of_text]
  filled = itertools.islice(itertools.cycle(weightless), len(held_out) - len(rows))
  assert held_out[len(rows) :] == list(filled)


@pytest.mark.parametrize("name, vocab", [("bytes", 256), ("bpe", 300)])
def test_both_tokenizers_pack_alike(name, vocab):
  texts = random_texts(1, 12, 60)
  dataset = make(texts, texts, name, vocab)
  rows = oracle(texts, 8, dataset.tokenizer.encode)
  held_out = [
    row for i in range(dataset.num_eval_batches) for row in as_rows(dataset.eval_batch(i))
  ]
  assert held_out[: len(rows)] == rows


def test_batch_is_a_function_of_seed_and_step():
  texts = random_texts(2, 30, 50)
  first, again = make(texts, seed=7), make(texts, seed=7)
  # Asked for in any order.
  expected = {step: first.train_batch(step) for step in (0, 1, 5, 3, 1000)}
  for step in (1000, 3, 0, 5, 1):
    assert_same(again.train_batch(step), expected[step])
  assert key(as_rows(make(texts, seed=8).train_batch(0))) != key(as_rows(expected[0]))
  assert key(as_rows(expected[1])) != key(as_rows(expected[0]))


def test_order_is_the_same_in_every_process_and_version():
  # Recorded: a change of the order would break the resumption of every older run.
  texts = ["".join(chr(33 + i) for i in range(90))]
  dataset = make(texts, batch=11, sequence=8, seed=0)
  order = dataset.train_batch(0)["tokens"][:, 0]
  np.testing.assert_array_equal(sorted(order), range(33, 121, 8))
  np.testing.assert_array_equal(order, RECORDED_ORDER)


RECORDED_ORDER = [89, 65, 57, 97, 113, 49, 105, 81, 33, 73, 41]


def test_epochs_and_neighbouring_seeds_are_shuffled_differently():
  texts = random_texts(3, 30, 50)
  orders = set()
  for seed in range(4):
    dataset = make(texts, seed=seed, batch=1)
    for epoch in range(4):
      steps = range(epoch * dataset.num_windows, (epoch + 1) * dataset.num_windows)
      orders.add(key([as_rows(dataset.train_batch(step)) for step in steps]))
  assert len(orders) == 16


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_any_number_of_processes_has_the_same_batch(num_processes):
  texts = random_texts(4, 30, 50)
  whole = make(texts).train_batch(5)
  size = 4 // num_processes
  parts = [
    {
      name: rows_BS[p * size : (p + 1) * size]
      for name, rows_BS in make(texts).train_batch(5).items()
    }
    for p in range(num_processes)
  ]
  assert {len(part["tokens"]) for part in parts} == {size}
  assert_same({name: np.concatenate([part[name] for part in parts]) for name in whole}, whole)


@pytest.mark.parametrize("seed", [0, 2**31, 2**40])
def test_any_seed(seed):
  make(random_texts(5, 20, 30), seed=seed).train_batch(2)


@pytest.mark.parametrize("eval_batches", [1, 2, 3, 5])
def test_few_held_out_batches_are_spread_evenly(eval_batches):
  text = "".join(chr(33 + i % 90) for i in range(30 * 8 + 1))
  dataset = make([text], [text], batch=5, eval_batches=eval_batches)
  rows = [row for i in range(dataset.num_eval_batches) for row in as_rows(dataset.eval_batch(i))]
  assert dataset.num_eval_batches == eval_batches
  everything = [key(row) for row in oracle([text], 8, tokenizer.Bytes().encode)]
  places = [everything.index(key(row)) for row in rows]
  assert len(set(places)) == 5 * eval_batches
  assert places == [i * 30 // (5 * eval_batches) for i in range(5 * eval_batches)]


def test_eval_batch_past_the_end():
  dataset = make(random_texts(6, 20, 30))
  for i in (-1, dataset.num_eval_batches):
    with pytest.raises(IndexError, match=f"eval batch {i}: there are {dataset.num_eval_batches}"):
      dataset.eval_batch(i)


def num_targets(dataset):
  """Returns how many held-out targets have weight 1."""
  batches = (dataset.eval_batch(i) for i in range(dataset.num_eval_batches))
  return sum(np.count_nonzero(batch["weights"]) for batch in batches)


@pytest.mark.parametrize("name, vocab", [("bytes", 256), ("bpe", 300)])
def test_bytes_of_the_targets(name, vocab):
  texts = random_texts(7, 12, 60)
  dataset = make(texts, texts, name, vocab)
  # Every token but each document's first is a target.
  encoded = [dataset.tokenizer.encode(text) for text in texts]
  expected = sum(len(dataset.tokenizer.pieces[i]) for ids in encoded for i in ids[1:])
  assert dataset.num_eval_bytes == expected
  num_tokens = num_targets(dataset)
  assert num_tokens == sum(len(ids) - 1 for ids in encoded)
  if name == "bytes":
    assert dataset.num_eval_bytes == num_tokens
  else:
    assert dataset.num_eval_bytes > num_tokens


def test_batches_reads_ahead_in_order_from_anywhere():
  dataset = make(random_texts(8, 30, 50))
  batches = dataset.batches(17)
  for step in range(17, 24):
    found, batch = next(batches)
    assert found == step
    assert_same(batch, dataset.train_batch(step))
  batches.close()


def test_batches_close_stops_its_thread():
  def readers():
    return [t for t in threading.enumerate() if t.name.startswith("moe_jax-data")]

  assert not readers()
  batches = make(random_texts(9, 30, 50)).batches(0, read_ahead=3)
  next(batches)
  assert len(readers()) == 1
  batches.close()
  assert not readers()


def test_batches_are_ready_before_they_are_asked_for(monkeypatch):
  dataset = make(random_texts(10, 30, 50))
  made, third = [], threading.Event()
  train_batch = dataset.train_batch

  def watched(step):
    made.append(step)
    if step == 2:
      third.set()
    return train_batch(step)

  monkeypatch.setattr(dataset, "train_batch", watched)
  batches = dataset.batches(0, read_ahead=2)
  next(batches)
  assert third.wait(60)
  batches.close()
  assert made == [0, 1, 2]


def test_batches_raises_what_the_thread_raises(monkeypatch):
  dataset = make(random_texts(11, 30, 50))

  def fail(step):
    raise OSError(f"step {step}")

  monkeypatch.setattr(dataset, "train_batch", fail)
  with pytest.raises(OSError, match="step 4"):
    next(dataset.batches(4))


def test_state_is_json_and_resumes():
  texts = random_texts(12, 20, 30)
  state = json.loads(json.dumps(make(texts).state(41)))
  assert make(texts).resume(state) == (41, [])


@pytest.mark.parametrize(
  "changes, line",
  [
    ({"seed": 1}, r"train\.seed=1, the checkpoint had 0"),
    ({"batch": 2}, r"train\.batch=2, the checkpoint had 4"),
    ({"sequence": 4}, r"train\.sequence=4, the checkpoint had 8"),
    ({"held_out": ("y" * 200,)}, r"the text differs"),
  ],
)
def test_resume_says_what_differs(changes, line):
  texts = random_texts(13, 20, 30)
  step, differences = make(texts, **changes).resume(make(texts).state(41))
  assert step == 41
  assert len(differences) == 1
  assert re.search(line, differences[0])


def test_resume_refuses_another_tokenizer_and_a_strange_state():
  texts = random_texts(14, 20, 30)
  with pytest.raises(ValueError, match=r"tokenizer bytes, this run has bpe-.*data\.tokenizer"):
    make(texts, name="bpe", vocab=270).resume(make(texts).state(1))
  with pytest.raises(ValueError, match=r"lacks next_step, fingerprint.*--workdir"):
    make(texts).resume({"tokenizer": "bytes"})


@pytest.mark.parametrize(
  "train, held_out, message",
  [
    (["a" * 8], ["b" * 9], r"has 8 tokens to train on, but train\.sequence=8 needs at least 9"),
    (["a" * 9], ["b" * 5, "c"], r"has 6 tokens held out, but train\.sequence=8 needs at least 9"),
    (["a"] * 9, ["b" * 9], r"each of the 9 documents to train on is a single token"),
    (["a" * 9], ["b"] * 10, r"each of the 10 documents held out is a single token"),
  ],
)
def test_too_little_text(train, held_out, message):
  with pytest.raises(ValueError, match=message):
    make(train, held_out)


def test_just_enough_text():
  dataset = make(["a" * 9], ["b" * 9])
  assert (dataset.num_windows, dataset.num_eval_batches, num_targets(dataset)) == (1, 1, 8)
