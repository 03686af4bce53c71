"""The bar that a trained model has to beat: how well one byte predicts the next.

Counted on the training documents, and judged on exactly the held-out bytes that the evaluation
covers. This module knows bytes; it must not know the network.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from moe_jax.train.corpus import Document

# Added to each of the 65,536 counts, so that no pair is impossible. Small, for most pairs of bytes
# never occur in text; with a corpus of megabytes the loss hardly depends on it.
ADDED_COUNT = 0.1


def fit(documents: Iterable[Document]) -> np.ndarray:
  """Returns the log probability of each byte after each other byte.

  log p(b | a) = log((n_ab + k) / (n_a + 256 k)), n counted within documents, k = ADDED_COUNT.

  Args:
    documents: texts, counted as UTF-8.

  Returns:
    float64, shape [256, 256], in nats: row a, column b.

  Source: Lidstone smoothing; Manning and Schuetze 1999, section 6.2.2.
  """
  counts = np.zeros(256 * 256, np.int64)
  for document in documents:
    before, after = _pairs(document.text.encode())
    counts += np.bincount(before * 256 + after, minlength=256 * 256)
  smoothed = counts.reshape(256, 256) + ADDED_COUNT
  return np.log(smoothed / smoothed.sum(1, keepdims=True))


def loss(
  log_probability: np.ndarray, batches: Iterable[dict[str, np.ndarray]], pieces: Sequence[bytes]
) -> float:
  """Returns the mean loss, in nats per byte, over the bytes that the batches' targets stand for.

  A byte counts if its token is a target of weight 1; it is predicted from the byte before it, which
  the row holds, for such a target never begins a document or a row.

  Args:
    log_probability: what `fit` gave.
    batches: held-out batches of `data.Dataset`.
    pieces: the bytes of each token id, as `Tokenizer.pieces`.

  Raises:
    ValueError: no target has weight 1.
  """
  num_bytes_V = np.array([len(piece) for piece in pieces])
  nats, num_bytes = 0.0, 0
  for batch in batches:
    for tokens, targets, weights in zip(
      batch["tokens"], batch["targets"], batch["weights"], strict=True
    ):
      ids = np.append(tokens[:1], targets)
      counts = np.repeat(np.append(False, weights > 0), num_bytes_V[ids])
      before, after = _pairs(b"".join([pieces[i] for i in ids.tolist()]))
      nats -= log_probability[before, after][counts[1:]].sum()
      num_bytes += np.count_nonzero(counts)
  if not num_bytes:
    raise ValueError("the batches hold no target of weight 1: nothing to judge the bigram model on")
  return float(nats / num_bytes)


def _pairs(text: bytes) -> tuple[np.ndarray, np.ndarray]:
  values = np.frombuffer(text, np.uint8).astype(np.int64)
  return values[:-1], values[1:]
