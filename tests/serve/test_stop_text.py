"""Stop strings, however the text is cut."""

import hypothesis
from hypothesis import strategies

from moe_jax.serve.stop_text import StopText

LETTERS = strategies.text("ab", max_size=12)


@hypothesis.given(
  strategies.lists(LETTERS), strategies.lists(strategies.text("ab", min_size=1, max_size=5))
)
def test_the_text_ends_where_a_stop_string_would_begin_first(pieces, stops):
  stop, shown = StopText(stops), ""
  for piece in pieces:
    shown += stop.add(piece)
    assert not any(each in shown for each in stops)
  shown += stop.end()
  whole = "".join(pieces)
  for end in range(len(whole) + 1):
    complete = [each for each in stops if whole[:end].endswith(each)]
    if complete:
      assert stop.is_stopped and shown == whole[: end - max(map(len, complete))]
      return
  assert not stop.is_stopped and shown == whole


def test_nothing_is_held_back_without_need():
  stop = StopText(["\n\n", "END"])
  assert [stop.add(piece) for piece in ("a\n", "b", "E", "N", "x", "\nE", "ND", "c")] == [
    "a", "\nb", "", "", "ENx", "\n", "", "",
  ]  # fmt: skip
  assert stop.is_stopped and stop.end() == ""
  assert StopText([]).add("all") == "all"
