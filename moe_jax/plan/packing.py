"""The memory that arrays take which come and go: as XLA packs them, gaps included.

Knows sizes and moments; must not know what the arrays hold.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Array(NamedTuple):
  """Bytes that are taken from one moment to another, both included."""

  num_bytes: int
  first: int
  last: int


def packed_bytes(arrays: Sequence[Array]) -> int:
  """Returns the bytes from the lowest to the highest.

  The largest array is placed first, each in the smallest gap that holds it of those between arrays
  that are there at the same moment.

  Source: XLA's GlobalDecreasingSizeBestFitHeap (xla/service/heap_simulator).
  """
  placed: list[tuple[int, int, Array]] = []  # where each begins and ends
  highest = 0
  for array in sorted(arrays, key=lambda a: (-a.num_bytes, a.first - a.last)):
    num_bytes, first, last = array
    if not num_bytes:
      break
    busy = [
      (start, stop) for start, stop, other in placed if first <= other.last and other.first <= last
    ]
    start = _place(num_bytes, sorted(busy))
    placed.append((start, start + num_bytes, array))
    highest = max(highest, start + num_bytes)
  return highest


def alive_bytes(arrays: Sequence[Array], moment: int) -> int:
  """Returns the bytes of all arrays that are there at a moment."""
  return sum(array.num_bytes for array in arrays if array.first <= moment <= array.last)


def _place(num_bytes: int, busy: list[tuple[int, int]]) -> int:
  """Returns where in the smallest gap that is large enough, or behind all."""
  end, gaps = 0, []
  for start, stop in busy:
    if start - end >= num_bytes:
      gaps.append((start - end, end))
    end = max(end, stop)
  return min(gaps)[1] if gaps else end
