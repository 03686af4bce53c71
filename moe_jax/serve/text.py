"""Token ids to text as they come, a whole character at a time.

Knows tokenizers; must not know where ids come from or where text goes.
"""

import codecs
from collections.abc import Sequence

from moe_jax.interop.tokenizer import Tokenizer

_UNKNOWN = "\ufffd"
_LONGEST_BEGINNING = 3  # bytes of a character in UTF-8 that is not whole yet
_MOST_BEFORE = 16  # tokens before others that are looked at


class TextStream:
  """The text of one sequence: what `add` and `end` return, joined, is the text of all its ids.

  One thing differs, for what was returned is not taken back: of single bytes in a row that are not
  UTF-8 SentencePiece shows every one as unknown, characters at the row's beginning too.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
    """Begins with no ids.

    Args:
      tokenizer: of the ids.
      prompt: ids that they go on from, whose text is not returned. The first word is shown as it
        is behind them, with its space.
    """
    self._tokenizer = tokenizer
    # The last ids alone: to decode all of them at each token takes the square of their number.
    self._ids: list[int] = []
    self._num_whole = 0  # of the ids, that end with a character
    self._num_returned = 0  # characters of their text
    self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in _end_of(prompt, tokenizer):
      self.add(token)

  def add(self, token: int) -> str:
    """Returns the text that a token completes; empty where it ends within a character."""
    if token in self._tokenizer.omitted:  # even from within a character, which goes on behind it
      return ""
    self._ids.append(token)
    pieces = self._tokenizer.pieces
    # As what is no id is decoded: a byte that UTF-8 never uses.
    self._bytes.decode(pieces[token] if 0 <= token < len(pieces) else b"\xff")
    beginning, _ = self._bytes.getstate()
    num_last = len(self._ids) - self._num_whole
    if beginning and num_last <= _LONGEST_BEGINNING:
      return ""
    text = self._tokenizer.decode(self._ids)
    new = self._return(text, len(text) - len(beginning))
    if not beginning:
      self._forget(new)
    elif num_last > _MOST_BEFORE:
      # No character ends in them, so that as single bytes the last ones alone are unknown too.
      del self._ids[:-_MOST_BEFORE]
      self._num_whole = 0
      self._num_returned -= len(text) - len(self._tokenizer.decode(self._ids))
    return new

  def end(self) -> str:
    """Returns what was held back."""
    text = self._tokenizer.decode(self._ids)
    return self._return(text, len(text))

  def _return(self, text: str, end: int) -> str:
    end = max(end, self._num_returned)  # several bytes of a beginning may be one character
    new = text[self._num_returned : end]
    self._num_returned = end
    return new

  def _forget(self, new: str) -> None:
    """Keeps of the ids, which end with a character, those on which later text depends.

    Args:
      new: text that was not returned before them.
    """
    last = self._ids[self._num_whole :]
    alone = self._tokenizer.decode(last)
    if new == _UNKNOWN * len(last) != alone:
      # Single bytes that are unknown only because of those before them in their row, as the next
      # ones will be: those stay.
      del self._ids[self._num_whole :]
      self._num_returned -= len(new)
    elif new:
      self._ids, self._num_returned = last, len(alone)
    self._num_whole = len(self._ids)


def _end_of(prompt: Sequence[int], tokenizer: Tokenizer) -> Sequence[int]:
  """Returns the fewest last ids of a prompt whose text begins with a whole character."""
  for num in range(1, min(len(prompt), _MOST_BEFORE)):
    text = tokenizer.decode(prompt[-num:])
    if text and not text.startswith(_UNKNOWN):
      return prompt[-num:]
  return prompt[-_MOST_BEFORE:]
