"""Text to token ids and back: bytes as they are, a byte-level BPE trained on the corpus, or the
tokenizer that came with an imported model.

The first two can encode any text, and decoding gives it back; what an imported one does with text
is its own affair. This module knows text and ids; it must not
know where the text comes from or what the ids are for.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import tokenizers

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"


class Tokenizer(Protocol):
  """What every entry of TOKENIZERS is.

  `pieces[i]` are the bytes that id i stands for; they need not be UTF-8 alone. `omitted` are ids
  that decoding leaves out. `identity` is equal exactly if two tokenizers encode alike.
  """

  pieces: Sequence[bytes]
  omitted: frozenset[int]
  identity: str

  @property
  def vocab(self) -> int:
    """Number of ids: they are 0 to vocab - 1."""

  @classmethod
  def train(cls, texts: Iterable[str], vocab: int) -> Self:
    """Returns a tokenizer with at most `vocab` ids, the same for the same texts."""

  @classmethod
  def load(cls, folder: str | os.PathLike, vocab: int) -> Self:
    """Returns the tokenizer that `save` left in `folder`; ValueError if it has over `vocab` ids."""

  def save(self, folder: str | os.PathLike) -> None:
    """Writes to `folder` whatever `load` needs."""

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of `text`, int32 of one dimension."""

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`; what is not UTF-8, and ids past the vocabulary, become U+FFFD."""

  def export(self, folder: str | os.PathLike) -> None:
    """Writes to `folder` the files that give transformers the same ids."""


class Bytes:
  """The 256 bytes of UTF-8, each its own id. Nothing to learn, so nothing to save."""

  pieces = tuple(bytes([byte]) for byte in range(256))
  omitted = frozenset()
  identity = "bytes"
  vocab = 256

  @classmethod
  def train(cls, texts: Iterable[str], vocab: int) -> Self:
    _fits("data.tokenizer=bytes", cls.vocab, vocab)
    return cls()

  @classmethod
  def load(cls, folder: str | os.PathLike, vocab: int) -> Self:
    _fits("data.tokenizer=bytes", cls.vocab, vocab)
    return cls()

  def save(self, folder: str | os.PathLike) -> None:
    pass

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    return _decode(self.pieces, ids)

  def export(self, folder: str | os.PathLike) -> None:
    _export(_byte_level(tokenizers.models.BPE(dict(_BYTE_BY_LETTER), merges=[])), folder)


class Bpe:
  """Byte-level byte-pair encoding: 256 bytes, and the merges that shorten the training text most.

  Source: Sennrich et al. 2016 (arXiv:1508.07909), section 3.2; over bytes as in GPT-2.
  """

  omitted = frozenset()

  def __init__(self, encoder: tokenizers.Tokenizer):
    self._encoder = encoder
    letters = sorted(encoder.get_vocab().items(), key=lambda item: item[1])
    if [token_id for _, token_id in letters] != list(range(len(letters))):
      raise ValueError("its ids have gaps")
    self.pieces = tuple(_bytes_of_letters(token) for token, _ in letters)
    self.identity = "bpe-" + hashlib.sha256(encoder.to_str().encode()).hexdigest()

  @property
  def vocab(self) -> int:
    return len(self.pieces)

  @classmethod
  def train(cls, texts: Iterable[str], vocab: int) -> Self:
    _fits("data.tokenizer=bpe", 256, vocab)
    encoder = _byte_level(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=vocab, initial_alphabet=list(_BYTE_BY_LETTER), show_progress=False
    )
    encoder.train_from_iterator(texts, trainer)
    return cls(encoder)

  @classmethod
  def load(cls, folder: str | os.PathLike, vocab: int) -> Self:
    path = Path(folder, FILE)
    if not path.is_file():
      raise ValueError(
        f"{path} is missing; the tokenizer of a bpe run is saved in the run's folder"
      )
    try:
      tokenizer = cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
    except Exception as error:  # the package raises no narrower type than Exception
      raise ValueError(f"{path} is not a byte-level BPE tokenizer: {error}") from error
    _fits(str(path), tokenizer.vocab, vocab)
    return tokenizer

  def save(self, folder: str | os.PathLike) -> None:
    _save(self._encoder, folder)

  def encode(self, text: str) -> np.ndarray:
    return np.asarray(self._encoder.encode(text, add_special_tokens=False).ids, np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    return _decode(self.pieces, ids)

  def export(self, folder: str | os.PathLike) -> None:
    _export(self._encoder, folder)


class Imported:
  """The tokenizer.json of an imported model, of whatever kind.

  Text gets the special tokens that the file puts round it, and names of special tokens in the text
  are those tokens; decoding leaves them out. Both as transformers does.
  """

  def __init__(self, encoder: tokenizers.Tokenizer):
    # Text of any length, all of it and nothing else.
    encoder.no_truncation()
    encoder.no_padding()
    self._encoder = encoder
    self.pieces = _pieces(encoder)
    self.omitted = _omitted(encoder)
    self.identity = "imported-" + hashlib.sha256(encoder.to_str().encode()).hexdigest()

  @property
  def vocab(self) -> int:
    return len(self.pieces)

  @classmethod
  def train(cls, texts: Iterable[str], vocab: int) -> Self:
    raise ValueError(
      "data.tokenizer=imported comes with an imported model (python -m launch.convert) and cannot"
      " be trained; to begin a run choose data.tokenizer=bpe or bytes"
    )

  @classmethod
  def load(cls, folder: str | os.PathLike, vocab: int) -> Self:
    path = Path(folder, FILE)
    if not path.is_file():
      raise ValueError(f"{path} is missing; an imported model's tokenizer lies beside its weights")
    try:
      tokenizer = cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
    except Exception as error:  # the package raises no narrower type than Exception
      raise ValueError(f"{path} is not a tokenizer: {error}") from error
    _fits(str(path), tokenizer.vocab, vocab)
    return tokenizer

  def save(self, folder: str | os.PathLike) -> None:
    _save(self._encoder, folder)

  def encode(self, text: str) -> np.ndarray:
    return np.asarray(self._encoder.encode(text).ids, np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    # The package leaves out what is no id: here it shows.
    is_known = lambda token_id: 0 <= token_id < self.vocab
    runs = itertools.groupby(map(int, ids), is_known)
    return "".join(
      self._encoder.decode(list(run)) if known else "\ufffd" * len(list(run)) for known, run in runs
    )

  def export(self, folder: str | os.PathLike) -> None:
    _export(self._encoder, folder)


TOKENIZERS: dict[str, type[Tokenizer]] = {"bytes": Bytes, "bpe": Bpe, "imported": Imported}


def _byte_by_letter() -> dict[str, int]:
  """Returns the byte that each letter of byte-level BPE stands for.

  The 188 bytes that print in Latin-1 stand for themselves, the others follow from U+0100 on.

  Source: openai/gpt-2, src/encoder.py, bytes_to_unicode.
  """
  printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(0x100) if byte not in printing]
  letters = {chr(byte): byte for byte in printing}
  return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_BY_LETTER = _byte_by_letter()
_SINGLE_BYTE = re.compile("<0x([0-9A-F]{2})>")  # in SentencePiece with byte fallback


def _bytes_of_letters(token: str) -> bytes:
  foreign = set(token) - set(_BYTE_BY_LETTER)
  if foreign:
    raise ValueError(f"its token {token!r} is not made of bytes")
  return bytes(_BYTE_BY_LETTER[letter] for letter in token)


def _byte_level(model) -> tokenizers.Tokenizer:
  encoder = tokenizers.Tokenizer(model)
  encoder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  encoder.decoder = tokenizers.decoders.ByteLevel()
  return encoder


def _save(encoder: tokenizers.Tokenizer, folder: str | os.PathLike) -> None:
  path = Path(folder, FILE)
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  partial.write_text(encoder.to_str(pretty=True), encoding="utf-8")
  # At once or not at all, whenever the process is killed.
  partial.replace(path)


def _export(encoder: tokenizers.Tokenizer, folder: str | os.PathLike) -> None:
  _save(encoder, folder)
  # The class that takes the file as it is: without a name transformers takes its architecture's,
  # and Qwen2Tokenizer puts its own pre-tokenizer in place of the file's.
  fields = {"tokenizer_class": "PreTrainedTokenizerFast"}
  Path(folder, CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _pieces(encoder: tokenizers.Tokenizer) -> tuple[bytes, ...]:
  """Returns the bytes of each id; of a special token its name's, of a gap between ids none.

  The file's decoder tells byte-level letters from SentencePiece's spaces and single bytes.
  """
  is_byte_level = '"ByteLevel"' in json.dumps(json.loads(encoder.to_str())["decoder"])
  added = {token.content for token in encoder.get_added_tokens_decoder().values()}
  id_by_token = encoder.get_vocab()
  pieces = [b""] * (max(id_by_token.values(), default=-1) + 1)
  for token, token_id in id_by_token.items():
    if token in added:
      pieces[token_id] = token.encode()
    else:
      pieces[token_id] = _bytes_of_letters(token) if is_byte_level else _bytes_of_piece(token)
  return tuple(pieces)


def _omitted(encoder: tokenizers.Tokenizer) -> frozenset[int]:
  """Returns the ids of special tokens, and of gaps between ids."""
  added, ids = encoder.get_added_tokens_decoder(), encoder.get_vocab().values()
  special = {token_id for token_id, token in added.items() if token.special}
  return frozenset(set(range(max(ids, default=-1) + 1)).difference(ids) | special)


def _bytes_of_piece(token: str) -> bytes:
  single = _SINGLE_BYTE.fullmatch(token)
  return bytes([int(single[1], 16)]) if single else token.replace("\u2581", " ").encode()


def _decode(pieces: Sequence[bytes], ids: Iterable[int]) -> str:
  # A byte that UTF-8 never uses stands for what is no id, so that it shows as U+FFFD as well.
  parts = (pieces[i] if 0 <= i < len(pieces) else b"\xff" for i in map(int, ids))
  return b"".join(parts).decode(errors="replace")


def _fits(what: str, needed: int, vocab: int) -> None:
  if needed > vocab:
    raise ValueError(f"model.vocab={vocab} cannot hold {what}; it needs at least {needed}")
