"""Ends a text where a given string would begin, however the text is cut into pieces.

Knows text as it comes; must not know tokens.
"""

from collections.abc import Sequence


class StopText:
  """What `add` and `end` return, joined, is the text up to a stop string.

  It is the one that is complete first; of those complete at the same character the longest.

  Attributes:
    is_stopped: whether one was found; nothing comes any more.
  """

  def __init__(self, stops: Sequence[str]):
    """Begins with no text.

    Args:
      stops: none of them empty.
    """
    self._stops = tuple(stops)
    self._held = ""  # may be the beginning of a stop string
    self.is_stopped = False

  def add(self, text: str) -> str:
    """Returns what can no longer belong to a stop string."""
    if self.is_stopped:
      return ""
    text = self._held + text
    found = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stops if stop in text]
    if found:
      end, minus_length = min(found)
      self.is_stopped, self._held = True, ""
      return text[: end + minus_length]
    longest = max((_overlap(text, stop) for stop in self._stops), default=0)
    cut = len(text) - longest
    self._held = text[cut:]
    return text[:cut]

  def end(self) -> str:
    """Returns what was held back, for no more text comes."""
    text, self._held = self._held, ""
    return text


def _overlap(text: str, stop: str) -> int:
  """Returns how many of the last characters of the text begin the stop string, not all of it."""
  lengths = range(min(len(text), len(stop) - 1), 0, -1)
  return next((length for length in lengths if text.endswith(stop[:length])), 0)
