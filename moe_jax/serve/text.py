"""Token ids to text as they come, a whole character at a time.

Knows tokenizers; must not know where ids come from or where text goes.
"""

from moe_jax.interop.tokenizer import Tokenizer

_UNKNOWN = "\ufffd"
_LONGEST = 4  # bytes of a character in UTF-8


class TextStream:
  """The text of one sequence: what `add` and `end` return, joined, is the text of all its ids."""

  def __init__(self, tokenizer: Tokenizer):
    """Begins with no ids."""
    self._tokenizer = tokenizer
    self._ids: list[int] = []
    self._text = ""  # returned so far
    self._num_waiting = 0

  def add(self, token: int) -> str:
    """Returns the text that a token completes; empty where it ends within a character."""
    self._ids.append(token)
    self._num_waiting += 1
    text = self._tokenizer.decode(self._ids)
    # After four bytes it is not an unfinished character but one that no text has.
    if text.endswith(_UNKNOWN) and self._num_waiting < _LONGEST:
      return ""
    return self._advance(text)

  def end(self) -> str:
    """Returns what was held back."""
    return self._advance(self._tokenizer.decode(self._ids))

  def _advance(self, text: str) -> str:
    new, self._text, self._num_waiting = text[len(self._text) :], text, 0
    return new
