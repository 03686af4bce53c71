"""Text as tokens come: whole characters, and in the end all of it."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from moe_jax.interop.tokenizer import Bytes, Imported
from moe_jax.serve.text import TextStream
from tests.interop import test_tokenizer

IMPORTED = {
  "sentence_pieces": Imported(test_tokenizer.sentence_pieces()),
  "byte_level": Imported(test_tokenizer.byte_level()),
}
TOKENIZERS = {"bytes": Bytes(), **IMPORTED}
# Beginnings, middles and ends of characters, U+FFFD among them, and bytes of none.
BYTES = b"A\xa9\xac\xbd\xbf\xc3\xe2\xef\xf0\x9f\x98\x80\xff"


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


def single_bytes(tokenizer, content: bytes) -> list[int]:
  return [tokenizer.pieces.index(bytes([byte])) for byte in content]


def is_shown_as_decoded(name: str, row: bytes) -> bool:
  """Whether the text of single bytes in a row stays when more of them come."""
  try:
    row.decode()
  except UnicodeDecodeError as error:
    return name != "sentence_pieces" or error.start == 0
  return True


@st.composite
def rows_of_bytes(draw, name):
  """Ids of any kind in rows of single bytes, with special tokens among these."""
  tokenizer, found = TOKENIZERS[name], []
  special, the = sorted(tokenizer.omitted), tokenizer.encode("the").tolist()[-1:]
  characters = st.text("é€𝄞\ufffd").map(str.encode)
  # Of few bytes at a time, so that beginnings come behind beginnings.
  few = st.lists(st.sampled_from(BYTES), min_size=1, max_size=3)
  anything = few.flatmap(lambda few: st.lists(st.sampled_from(few), max_size=40)).map(bytes)
  is_kept = lambda row: is_shown_as_decoded(name, row)
  for row in draw(st.lists((characters | anything).filter(is_kept), max_size=6)):
    for token in single_bytes(tokenizer, row):
      found += (
        [token, *draw(st.lists(st.sampled_from(special), max_size=2))] if special else [token]
      )
    found += draw(st.sampled_from([the, [400]]))
  return found


@pytest.mark.parametrize("name", TOKENIZERS)
@hypothesis.given(data=st.data())
@hypothesis.settings(deadline=None)
def test_text_of_any_ids_is_what_decoding_them_gives(name, data):
  tokenizer, ids = TOKENIZERS[name], data.draw(rows_of_bytes(name))
  stream = TextStream(tokenizer)
  found = "".join(map(stream.add, ids)) + stream.end()
  assert found == tokenizer.decode(ids)


def test_what_was_returned_is_not_returned_again():
  for content in map(bytes, itertools.product(b"A\xac\xf0", repeat=6)):
    found, end = pieces(content)
    assert "".join(found) + end == content.decode(errors="replace")


@pytest.mark.parametrize("name", IMPORTED)
def test_a_character_goes_on_behind_a_special_token(name):
  tokenizer = IMPORTED[name]
  first, second = single_bytes(tokenizer, "é".encode())
  for special in tokenizer.omitted:
    stream = TextStream(tokenizer)
    assert [stream.add(token) for token in (first, special, second)] == ["", "", "é"]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
  "row",
  [
    b"\xff", b"\xc3", b"\xf0\x9f\x98", b"\xffA", b"\xff\xc3\xa9", b"\xef\xbf\xbd",
    b"\xc3" * 20 + b"A",
  ],
)  # fmt: skip
def test_a_token_decodes_few_others_where_no_ordinary_character_comes(name, row, monkeypatch):
  tokenizer, lengths = TOKENIZERS[name], []
  decode = tokenizer.decode
  ids = single_bytes(tokenizer, row * 100)
  expected = decode(ids)
  monkeypatch.setattr(tokenizer, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
  stream = TextStream(tokenizer)
  found = "".join(map(stream.add, ids))
  longest = max(lengths)
  assert found + stream.end() == expected
  assert longest <= 40


@pytest.mark.parametrize("name", IMPORTED)
def test_special_tokens_are_not_kept(name):
  tokenizer = IMPORTED[name]
  stream = TextStream(tokenizer)
  assert {stream.add(token) for token in [*tokenizer.omitted] * 100} == {""}
  assert stream._ids == []
