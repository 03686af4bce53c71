"""Packing: by hand, and by what no packing may break."""

from hypothesis import given
from hypothesis import strategies as st

from moe_jax.plan.packing import Array, alive_bytes, packed_bytes


def test_by_hand():
  """The largest lies at 0 until moment 1; the next two do not meet it and take its place, side by
  side; what meets all three lies above them.
  """
  largest, left, right, above = Array(8, 0, 1), Array(5, 2, 3), Array(2, 2, 3), Array(1, 0, 3)
  assert packed_bytes([largest, left, right]) == 8
  assert packed_bytes([largest, left, right, above]) == 9
  # 4 lie above the 5 that they meet, and leave room for one 3 below them, not for two.
  gap = [Array(5, 0, 0), Array(4, 0, 1), Array(3, 1, 1), Array(3, 1, 1)]
  assert alive_bytes(gap, 1) == 10
  assert packed_bytes(gap) == 12
  assert packed_bytes([]) == 0


_ARRAYS = st.lists(
  st.builds(
    lambda size, first, more: Array(size, first, first + more),
    st.integers(1, 100),
    st.integers(0, 5),
    st.integers(0, 5),
  ),
  max_size=12,
)


@given(_ARRAYS)
def test_no_less_than_is_alive_and_no_more_than_all(arrays):
  alive = max((alive_bytes(arrays, moment) for moment in range(12)), default=0)
  assert alive <= packed_bytes(arrays) <= sum(array.num_bytes for array in arrays)


@given(_ARRAYS)
def test_arrays_that_never_meet_share_their_place(arrays):
  apart = [Array(array.num_bytes, i, i) for i, array in enumerate(arrays)]
  assert packed_bytes(apart) == max((array.num_bytes for array in arrays), default=0)
  together = [Array(array.num_bytes, 0, 0) for array in arrays]
  assert packed_bytes(together) == sum(array.num_bytes for array in arrays)
