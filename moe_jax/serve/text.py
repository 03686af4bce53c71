"""Token ids to text as they come, a whole character at a time.

Knows tokenizers; must not know where ids come from or where text goes.
"""

from moe_jax.interop.tokenizer import Tokenizer

_UNKNOWN = "\ufffd"
_LONGEST_BEGINNING = 3  # bytes of a character in UTF-8 that is not whole yet


class TextStream:
  """The text of one sequence: what `add` and `end` return, joined, is the text of all its ids."""

  def __init__(self, tokenizer: Tokenizer):
    """Begins with no ids."""
    self._tokenizer = tokenizer
    self._ids: list[int] = []
    self._num_returned = 0  # characters

  def add(self, token: int) -> str:
    """Returns the text that a token completes; empty where it ends within a character."""
    self._ids.append(token)
    text = self._tokenizer.decode(self._ids)
    # What ends in unknown characters may be the beginning of one; more of them than one has bytes
    # are none.
    whole = len(text.rstrip(_UNKNOWN))
    return self._return(text, max(whole, len(text) - _LONGEST_BEGINNING))

  def end(self) -> str:
    """Returns what was held back."""
    text = self._tokenizer.decode(self._ids)
    return self._return(text, len(text))

  def _return(self, text: str, end: int) -> str:
    new = text[self._num_returned : end]
    self._num_returned = max(end, self._num_returned)
    return new
