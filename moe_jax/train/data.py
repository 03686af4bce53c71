"""Batches of packed sequences: the global batch is a function of (seed, step) alone.

Documents are laid end to end and cut into windows of S + 1 tokens, one every S, so that each token
is a target once an epoch; where documents meet, segments and positions tell the model to start
afresh and the target that would cross has weight 0. grain shuffles the windows, each epoch in
another order, and any step can be asked for directly: a process builds the whole batch and takes
its rows of it, so that the number of processes changes nothing. This module knows numpy arrays; it
must not know jax, devices or meshes.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator

import grain
import numpy as np

from moe_jax.interop.tokenizer import Tokenizer
from moe_jax.train.corpus import Corpus, Document

Batch = dict[str, np.ndarray]

# Of each of these the checkpoint keeps the value that the data were made with.
_STATE_FIELDS = ("fingerprint", "tokenizer", "seed", "batch", "sequence")


@dataclasses.dataclass(frozen=True)
class Stream:
  """Documents laid end to end: their tokens, and the index at which each document starts."""

  tokens: np.ndarray
  starts: np.ndarray

  @property
  def num_tokens(self) -> int:
    return len(self.tokens)


def lay_end_to_end(documents: tuple[Document, ...], tokenizer: Tokenizer) -> Stream:
  """Returns the stream of `documents`, in their order, in the narrowest type that holds the ids."""
  narrow = np.min_scalar_type(tokenizer.vocab - 1)
  parts = [tokenizer.encode(document.text).astype(narrow) for document in documents]
  lengths = np.array([len(part) for part in parts], np.int64)
  # A document of no tokens would count as a segment that nothing is in.
  starts = (np.cumsum(lengths) - lengths)[lengths > 0]
  return Stream(np.concatenate(parts) if parts else np.zeros(0, narrow), starts)


def window(stream: Stream, sequence: int, window_id: int) -> Batch:
  """Returns one packed row of `stream`.

  Args:
    stream: documents laid end to end.
    sequence: S, tokens in a row.
    window_id: the row starts at token window_id * S; one past the end is all padding.

  Returns:
    Arrays of shape [S]. int32: `tokens`; `targets`, the next token of each; `positions` in the
    document, from 0 at its start or at the row's; `segments`, the document's number in the row,
    from 1. float32: `weights`, 1, and 0 where the target belongs to another document. Past the
    stream's end everything is 0.
  """
  lo = window_id * sequence
  hi = min(lo + sequence + 1, stream.num_tokens)
  index = np.arange(lo, hi)
  document = np.searchsorted(stream.starts, index, side="right") - 1
  tokens = stream.tokens[lo:hi]
  row = {
    "tokens": tokens[:-1].astype(np.int32),
    "targets": tokens[1:].astype(np.int32),
    "positions": (index - np.maximum(stream.starts[document], lo))[:-1].astype(np.int32),
    "segments": (document - document[:1] + 1)[:-1].astype(np.int32),
    "weights": (document[1:] == document[:-1]).astype(np.float32),
  }
  return {name: np.pad(values, (0, sequence - len(values))) for name, values in row.items()}


@dataclasses.dataclass(frozen=True)
class _Windows:
  """The rows of a stream as a source that grain can index.

  `ids` past the end give rows from the beginning, of weight 0: tokens of padding alone would all
  choose the same experts, and take the room of text there.
  """

  stream: Stream
  sequence: int
  ids: np.ndarray

  def __len__(self) -> int:
    return len(self.ids)

  def __getitem__(self, i: int) -> Batch:
    turn, number = divmod(int(self.ids[i]), _num_windows(self.stream, self.sequence))
    row = window(self.stream, self.sequence, number)
    return row | {"weights": np.zeros_like(row["weights"])} if turn else row


class Dataset:
  """The batches of one run, training and held-out; every array has shape [B, S], as `window` says.

  Args:
    corpus: the documents.
    tokenizer: turns them into ids.
    batch: B, sequences in the global batch.
    sequence: S, tokens in a sequence.
    seed: of the shuffle.
    eval_batches: the most held-out batches to make.

  Attributes:
    num_windows: training rows in an epoch.
    num_eval_batches: held-out batches, at most `eval_batches`.
    num_eval_bytes: bytes of text that their targets of weight 1 stand for.

  Raises:
    ValueError: fewer than S + 1 tokens to train on, or held out; or no document of two tokens.
  """

  def __init__(
    self,
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    batch: int,
    sequence: int,
    seed: int,
    eval_batches: int,
  ):
    self.tokenizer = tokenizer
    self._made_with = {
      "fingerprint": corpus.fingerprint,
      "tokenizer": tokenizer.identity,
      "seed": seed,
      "batch": batch,
      "sequence": sequence,
    }
    train = lay_end_to_end(corpus.train_documents, tokenizer)
    held_out = lay_end_to_end(corpus.held_out_documents, tokenizer)
    _enough("to train on", train, sequence)
    _enough("held out", held_out, sequence)

    # The last token is only a target, never an input; what is too short for a row is in no epoch.
    self.num_windows = (train.num_tokens - 1) // sequence
    # grain's shuffle takes 4 rounds: thorough from some 1,000 windows on, but of 11
    # windows one of six seeds tried left 9 in place (0.2.18).
    self._train = (
      grain.MapDataset.source(_Windows(train, sequence, np.arange(self.num_windows)))
      .shuffle(seed=_shuffle_seed(seed))
      .repeat()
      .batch(batch)
    )
    eval_ids = _spread(_num_windows(held_out, sequence), batch, eval_batches)
    self._eval = grain.MapDataset.source(_Windows(held_out, sequence, eval_ids)).batch(batch)
    self.num_eval_batches = len(self._eval)

    self._num_bytes_V = np.array([len(piece) for piece in tokenizer.pieces], np.int64)
    batches = [self.eval_batch(i) for i in range(self.num_eval_batches)]
    self.num_eval_bytes = sum(self.num_target_bytes(b) for b in batches)

  def train_batch(self, step: int) -> Batch:
    """Returns the global batch of `step`, from 0: a function of the seed and the step alone."""
    return self._train[step]

  def eval_batch(self, i: int) -> Batch:
    """Returns held-out batch i, the same at every call; rows past the text are of weight 0.

    Together they hold each held-out target once, if they may be as many as that takes; if not, they
    hold rows spread evenly over the held-out text.

    Raises:
      IndexError: i is not below `num_eval_batches`.
    """
    # grain would start again from the first.
    if not 0 <= i < self.num_eval_batches:
      raise IndexError(f"eval batch {i}: there are {self.num_eval_batches}")
    return self._eval[i]

  def batches(self, start_step: int, read_ahead: int = 2) -> Iterator[tuple[int, Batch]]:
    """Yields (step, batch) from `start_step` on, without end, read ahead in a thread.

    Args:
      start_step: the first step to yield.
      read_ahead: batches to have ready or in the making.

    Returns:
      A generator; its `close()` ends the thread, once it has made the batches in hand.
    """
    with concurrent.futures.ThreadPoolExecutor(1, "moe_jax-data") as pool:
      ahead = collections.deque()
      for step in itertools.count(start_step):
        while len(ahead) <= read_ahead:
          ahead.append(pool.submit(self.train_batch, step + len(ahead)))
        yield step, ahead.popleft().result()

  def num_target_bytes(self, batch: Batch) -> int:
    """Returns the bytes of text that the targets of weight 1 stand for.

    A summed loss in nats, divided by it, is in nats per byte, whatever the tokenizer.
    """
    return int(self._num_bytes_V[batch["targets"][batch["weights"] > 0]].sum())

  def state(self, next_step: int) -> dict:
    """Returns what a checkpoint keeps, plain JSON: `next_step` and what the data depend on."""
    return {"next_step": next_step, **self._made_with}

  def resume(self, state: dict) -> tuple[int, list[str]]:
    """Returns where a run goes on, and how its data differ from those it was trained on until then.

    Args:
      state: what `state` gave when the checkpoint was saved.

    Returns:
      The next step, and one line for each difference; none means that the batches continue exactly.

    Raises:
      ValueError: `state` lacks a field, or the tokenizer differs, so that ids mean other text.
    """
    missing = [name for name in ("next_step", *_STATE_FIELDS) if name not in state]
    if missing:
      raise ValueError(
        f"the checkpoint's data position lacks {', '.join(missing)};"
        " it was not saved by this program: name another --workdir"
      )
    if state["tokenizer"] != self._made_with["tokenizer"]:
      raise ValueError(
        f"the checkpoint was trained with tokenizer {state['tokenizer']:.16}, this run has"
        f" {self._made_with['tokenizer']:.16}: give data.tokenizer and tokenizer.json as they were,"
        " or name another --workdir"
      )
    differences = [
      _difference(name, state[name], self._made_with[name])
      for name in _STATE_FIELDS
      if state[name] != self._made_with[name]
    ]
    return int(state["next_step"]), differences


def _num_windows(stream: Stream, sequence: int) -> int:
  return -(-(stream.num_tokens - 1) // sequence)


def _spread(num_windows: int, batch: int, eval_batches: int) -> np.ndarray:
  """Returns the held-out windows to evaluate, in whole batches; the last may be past the end."""
  num_rows = min(-(-num_windows // batch), eval_batches) * batch
  if num_rows >= num_windows:
    return np.arange(num_rows)
  return np.arange(num_rows) * num_windows // num_rows


def _enough(what: str, stream: Stream, sequence: int) -> None:
  if stream.num_tokens < sequence + 1:
    raise ValueError(
      f"the corpus has {stream.num_tokens:,} tokens {what}, but train.sequence={sequence} needs at"
      f" least {sequence + 1:,}; name more text in data.paths, or change train.sequence or"
      " data.held_out_fraction"
    )
  if stream.num_tokens == len(stream.starts):
    raise ValueError(
      f"each of the {len(stream.starts):,} documents {what} is a single token, which leaves nothing"
      " to predict; name longer texts in data.paths"
    )


def _shuffle_seed(seed: int) -> int:
  # grain shuffles epoch e by seed + e, so that neighbouring seeds would share their epochs; the
  # seed that it would derive by itself may change from version to version.
  return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")


def _difference(name: str, before, now) -> str:
  if name == "fingerprint":
    return (
      "the text differs from the checkpoint's (data.paths, held_out_fraction, or files changed)"
    )
  return f"train.{name}={now}, the checkpoint had {before}: batches come in another order"
