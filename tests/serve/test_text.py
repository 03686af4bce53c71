"""Text as tokens come: whole characters, and in the end all of it."""

import pytest

from moe_jax.interop.tokenizer import Bytes, Imported
from moe_jax.serve.text import TextStream
from tests.interop import test_tokenizer

IMPORTED = {
  "sentence_pieces": Imported(test_tokenizer.sentence_pieces()),
  "byte_level": Imported(test_tokenizer.byte_level()),
}


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


@pytest.mark.parametrize("name", IMPORTED)
@pytest.mark.parametrize(
  "text", ["the 😀😀 the", "漢字漢字", "the \ufffd\ufffd漢 é", "  the\n", "the</s><|im_end|> the"]
)
def test_text_of_an_imported_tokenizer_comes_whole(name, text):
  tokenizer = IMPORTED[name]
  stream = TextStream(tokenizer)
  ids = tokenizer.encode(text).tolist()
  found = [stream.add(token) for token in ids]
  assert stream.end() == "" and "".join(found) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", IMPORTED)
def test_what_is_no_text_of_an_imported_tokenizer_is_shown_as_such(name):
  tokenizer = IMPORTED[name]
  beginning = tokenizer.pieces.index(b"\xc3")
  the = tokenizer.encode("the").tolist()
  for ids in ([400] * 9, [beginning], [beginning] * 9, [beginning, *the], [400, beginning, 400]):
    stream = TextStream(tokenizer)
    found = [stream.add(token) for token in ids]
    assert "".join(found) + stream.end() == tokenizer.decode(ids)
    assert len(ids) < 9 or sum(map(bool, found)) >= 2


@pytest.mark.parametrize("name", IMPORTED)
def test_text_goes_on_from_its_prompt(name):
  tokenizer = IMPORTED[name]
  ids = tokenizer.encode("漢字 the the 字</s><|im_end|> the").tolist()
  whole = tokenizer.decode(ids)
  for num in range(len(ids) + 1):
    stream = TextStream(tokenizer, ids[:num])
    found = "".join(map(stream.add, ids[num:])) + stream.end()
    before = tokenizer.decode(ids[:num])
    if not before.endswith("\ufffd"):  # and where the prompt ends within a character, all of it
      assert before + found == whole
    assert whole.endswith(found) and "\ufffd" not in found


def test_a_token_decodes_few_others(monkeypatch):
  decode, lengths = Bytes.decode, []
  monkeypatch.setattr(
    Bytes, "decode", lambda self, ids: lengths.append(len(ids)) or decode(self, ids)
  )
  pieces("aé€𝄞".encode() * 50)
  assert max(lengths) <= 8
