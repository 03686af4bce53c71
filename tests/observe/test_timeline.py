"""observe.timeline: what is drawn, and where."""

import xml.etree.ElementTree as ET

import pytest

from moe_jax.observe import timeline
from moe_jax.observe.timeline import Bar

ROWS = {"a": "first <row>", "b": "second row"}
BARS = [
  Bar("a", "product", "experts", 0.0, 40e-6),
  Bar("b", "all-to-all", "dispatch+combine", 10e-6, 30e-6, is_backward=True, more={"tick": 3}),
  Bar("a", "all-to-all", "exposed", 40e-6, 47e-6),
]
_SVG = "{http://www.w3.org/2000/svg}"


def _rects():
  picture = ET.fromstring(timeline.svg(BARS, ROWS, "a <tick>", "of & on"))
  return picture, list(picture.iter(f"{_SVG}rect"))


def test_every_bar_lies_at_its_time_in_its_row():
  _, rects = _rects()
  x, y, width = ([float(rect.get(name)) for rect in rects] for name in ("x", "y", "width"))
  assert len(rects) == len(BARS) and y[0] == y[2] < y[1]
  scale = (x[2] - x[0]) / 40
  assert width == pytest.approx([40 * scale, 20 * scale, 7 * scale], abs=0.01)
  assert x[1] - x[0] == pytest.approx(10 * scale, abs=0.01)


def test_backward_is_hatched_and_what_is_drawn_is_in_the_legend():
  picture, rects = _rects()
  patterns = {f"url(#{each.get('id')})" for each in picture.iter(f"{_SVG}pattern")}
  assert [rect.get("fill") in patterns for rect in rects] == [False, True, False]
  words = [each.text for each in picture.iter(f"{_SVG}text")]
  assert {"experts", "exposed", "several phases", "hatched: backward"} <= set(words)
  assert "attention" not in words and {"a <tick>", "of & on", "first <row>"} <= set(words)
  assert rects[1][0].text == "all-to-all, dispatch+combine, backward: 20.0 us"


@pytest.mark.parametrize(
  ("end_us", "marks"),
  [(47, ["0 us", "5 us", "45 us"]), (1, ["0 us", "0.1 us", "1 us"]), (407, ["0 us", "50 us"])],
)
def test_marks_are_round(end_us, marks):
  picture = ET.fromstring(timeline.svg([BARS[0]._replace(end_s=end_us * 1e-6)], ROWS, ""))
  found = [text.text for text in picture.iter(f"{_SVG}text") if text.get("font-size") == "11"]
  assert set(marks) <= set(found) and len(found) <= 14


def test_the_trace_says_all_of_it():
  trace = timeline.trace(BARS, ROWS)["traceEvents"]
  assert [each["args"]["name"] for each in trace[:2]] == list(ROWS.values())
  second = trace[3]
  assert (second["tid"], second["ts"], second["dur"]) == pytest.approx((1, 10, 20))
  assert second["args"] == {"phase": "dispatch+combine", "is_backward": True, "tick": 3}
