"""Text as tokens come: whole characters, and in the end all of it."""

import pytest

from moe_jax.interop.tokenizer import Bytes
from moe_jax.serve.text import TextStream


def pieces(content: bytes):
  stream = TextStream(Bytes())
  return [stream.add(byte) for byte in content], stream.end()


def test_a_character_comes_whole():
  found, end = pieces("aé€𝄞".encode())
  assert found == ["a", "", "é", "", "", "€", "", "", "", "𝄞"] and end == ""


@pytest.mark.parametrize(
  "content",
  [b"a\xff\xffb", bytes([249, 146, 225, 128, 146, 0]), b"\xe2\x82", b"\xff" * 9, b"", b"ok\xc3"],
)
def test_what_is_not_a_character_is_shown_as_such(content):
  found, end = pieces(content)
  assert "".join(found) + end == content.decode(errors="replace")


def test_bytes_of_no_character_do_not_stop_the_stream():
  found, _ = pieces(b"\xff" * 9)
  assert sum(map(bool, found)) >= 2
