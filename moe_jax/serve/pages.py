"""Who holds which page of the cache: a free list for each rank of `data` and `expert`, on the host.

Knows page numbers; must not know arrays on devices, or why a sequence wants pages.
"""

import numpy as np

NO_PAGE = -1


class Pages:
  """The pages of every rank; a page is free or held, never both."""

  def __init__(self, num_ranks: int, num_pages: int):
    """Begins with all pages free.

    Args:
      num_ranks: of `expert`.
      num_pages: of each rank.
    """
    self.num_pages = num_pages
    # The last is given out next: a page just given back is likely still in a cache.
    self._free = [list(range(num_pages - 1, -1, -1)) for _ in range(num_ranks)]
    self._is_free = np.ones((num_ranks, num_pages), bool)

  def num_free(self, rank: int) -> int:
    """Returns how many pages of a rank are free."""
    return len(self._free[rank])

  def take(self, rank: int, count: int) -> np.ndarray:
    """Returns `count` pages of a rank, int32, which are then held.

    Raises:
      ValueError: fewer are free; nothing is taken.
    """
    free = self._free[rank]
    if count > len(free):
      raise ValueError(
        f"{count} pages asked for on rank {rank} of expert, {len(free)} of {self.num_pages} are"
        " free; ask num_free first, or raise serve.pages_fraction"
      )
    pages = np.array([free.pop() for _ in range(count)], np.int32)
    self._is_free[rank, pages] = False
    return pages

  def give_back(self, rank: int, pages: np.ndarray) -> None:
    """Makes held pages free.

    Raises:
      ValueError: one of them is not held, or is named twice.
    """
    pages = np.asarray(pages)
    if self._is_free[rank, pages].any() or len(set(pages.tolist())) < len(pages):
      raise ValueError(
        f"pages {pages.tolist()} of rank {rank} of expert are not all held; give back, once, what"
        " take returned"
      )
    self._is_free[rank, pages] = True
    self._free[rank] += pages.tolist()


def table(pages_of_rows: list[np.ndarray], width: int) -> np.ndarray:
  """Returns [rows, width] int32: each row's pages, cut off or filled up with NO_PAGE."""
  found = np.full((len(pages_of_rows), width), NO_PAGE, np.int32)
  for row, pages in zip(found, pages_of_rows, strict=True):
    row[: min(width, len(pages))] = pages[:width]
  return found
