import json
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from moe_jax import config
from moe_jax.interop import tokenizer

TEXTS = [
  "def f(x):\n  return x + 1\n" * 20,
  "Grüße, 世界! 🙂 naïve café\n" * 10,
  "the then there\n" * 30,
]

TRAINED = ["bpe", "bytes"]
# transformers has a tokenizer of its own for each, whose rules for white space differ.
ARCHITECTURES = ["mixtral", "qwen3_moe", "olmoe"]
WHITE_SPACE = "def f(x):\n  if x:\n\n    return  x + 12\t# it's\n\n\n   the  then "

# Every character whose UTF-8 needs each of its lengths, among others.
any_text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module", params=TRAINED)
def made(request):
  return tokenizer.TOKENIZERS[request.param].train(TEXTS, 400)


def test_table_holds_what_config_allows():
  assert set(tokenizer.TOKENIZERS) == set(config.TOKENIZERS)


@hypothesis.given(text=any_text)
@hypothesis.settings(deadline=None)
def test_round_trip(made, text):
  ids = made.encode(text)
  assert ids.dtype == np.int32 and ids.ndim == 1
  assert made.decode(ids) == text
  assert b"".join(made.pieces[i] for i in ids) == text.encode()


def test_ids_are_below_vocab_and_all_bytes_are_there(made):
  assert made.vocab == len(made.pieces) <= 400
  assert len(set(made.pieces)) == made.vocab
  assert {bytes([byte]) for byte in range(256)} <= set(made.pieces)


def test_bytes_are_utf8():
  np.testing.assert_array_equal(tokenizer.Bytes().encode("aé"), [0x61, 0xC3, 0xA9])


def test_bpe_learns_merges():
  bpe = tokenizer.Bpe.train(TEXTS, 400)
  assert bpe.vocab > 256
  assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 2


@pytest.mark.parametrize("ids", [[0xC3], [-1], [10**6], np.array([0xFF], np.int32)])
def test_decode_shows_what_is_no_text(ids):
  assert tokenizer.Bytes().decode(ids) == "\ufffd"


def test_decode_of_a_sampled_id_past_the_bpe_vocabulary():
  bpe = tokenizer.Bpe.train(TEXTS, 300)
  assert bpe.decode([*bpe.encode("the"), bpe.vocab]) == "the\ufffd"


def test_letters_are_those_of_the_package():
  letters = tokenizer._byte_by_letter()
  assert set(letters) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  # These characters hold every byte that UTF-8 can hold but the leads of rare planes.
  for point in [*range(0x800), *range(0x800, 0xD800, 61), *range(0x10000, 0x110000, 4093)]:
    ((mapped, _),) = split.pre_tokenize_str(chr(point))
    assert bytes(letters[letter] for letter in mapped) == chr(point).encode()


def test_save_and_load(made, tmp_path):
  made.save(tmp_path)
  loaded = type(made).load(tmp_path, 400)
  assert loaded.identity == made.identity
  assert loaded.pieces == made.pieces
  for text in TEXTS:
    np.testing.assert_array_equal(loaded.encode(text), made.encode(text))
  assert not list(tmp_path.glob("*.partial"))


def test_identity_tells_tokenizers_apart():
  identities = {
    tokenizer.Bytes().identity,
    tokenizer.Bpe.train(TEXTS, 300).identity,
    tokenizer.Bpe.train(TEXTS, 301).identity,
    tokenizer.Bpe.train(TEXTS[::2], 301).identity,
  }
  assert len(identities) == 4


def test_training_is_the_same_in_every_process():
  program = (
    "from tests.interop import test_tokenizer as t;"
    "print(t.tokenizer.Bpe.train(t.TEXTS, 400).identity)"
  )
  runs = [
    subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for _ in range(2)
  ]
  assert {run.stdout.strip() for run in runs} == {tokenizer.Bpe.train(TEXTS, 400).identity}


@pytest.mark.parametrize("name", TRAINED)
def test_vocab_without_room_for_bytes(name, tmp_path):
  with pytest.raises(ValueError, match=rf"model\.vocab=255 .*tokenizer={name}.* at least 256"):
    tokenizer.TOKENIZERS[name].train(TEXTS, 255)


def test_load_refuses_a_larger_vocabulary(tmp_path):
  bpe = tokenizer.Bpe.train(TEXTS, 300)
  bpe.save(tmp_path)
  with pytest.raises(ValueError, match=r"model\.vocab=299 cannot hold .*tokenizer\.json.* 300"):
    tokenizer.Bpe.load(tmp_path, 299)
  with pytest.raises(ValueError, match=r"model\.vocab=255 cannot hold"):
    tokenizer.Bytes.load(tmp_path, 255)


def test_load_names_a_missing_file(tmp_path):
  with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
    tokenizer.Bpe.load(tmp_path, 300)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b'{"version": "1.0"}'])
def test_load_names_a_damaged_file(content, tmp_path):
  (tmp_path / "tokenizer.json").write_bytes(content)
  with pytest.raises(ValueError, match=r"tokenizer\.json is not a byte-level BPE tokenizer"):
    tokenizer.Bpe.load(tmp_path, 300)


def test_load_refuses_a_tokenizer_of_words(tmp_path):
  words = tokenizers.models.WordLevel({"new word": 0, "b": 1}, unk_token="b")
  tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(ValueError, match=r"not a byte-level BPE tokenizer.*'new word'"):
    tokenizer.Bpe.load(tmp_path, 300)


def sentence_pieces() -> tokenizers.Tokenizer:
  """A tokenizer as Mixtral's: U+2581 for spaces, single bytes, a token before the text."""
  pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
  pieces += ["\u2581", "\u2581the", "t", "h", "e", "th", "the", "n"]
  merges = [("t", "h"), ("th", "e"), ("\u2581", "the")]
  vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
  found = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
  )
  found.normalizer = tokenizers.normalizers.Sequence(
    [
      tokenizers.normalizers.Prepend("\u2581"),
      tokenizers.normalizers.Replace(" ", "\u2581"),
    ]
  )
  found.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.Replace("\u2581", " "),
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Fuse(),
      tokenizers.decoders.Strip(" ", 1, 0),
    ]
  )
  found.add_special_tokens(["<unk>", "<s>", "</s>"])
  found.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  return found


def byte_level() -> tokenizers.Tokenizer:
  """A tokenizer as Qwen3's: byte-level BPE, special tokens behind a gap in the ids."""
  found = tokenizers.Tokenizer.from_str(tokenizer.Bpe.train(TEXTS, 300)._encoder.to_str())
  found.add_special_tokens(["<|im_start|>", "<|im_end|>"])
  found.enable_truncation(3)
  found.enable_padding()
  return found


@pytest.fixture(params=[sentence_pieces, byte_level])
def imported(request, tmp_path):
  request.param().save(str(tmp_path / "tokenizer.json"))
  return tokenizer.Imported.load(tmp_path, 400), tmp_path


@pytest.mark.parametrize(
  "text", ["the then there", "Grüße, 世界! 🙂\n", "", "the </s><|im_end|> the"]
)
def test_an_imported_tokenizer_gives_the_ids_of_transformers(imported, text):
  transformers = pytest.importorskip("transformers", reason="pip install transformers")
  ours, folder = imported
  theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
  ids = ours.encode(text)
  assert ids.dtype == np.int32 and ids.ndim == 1
  np.testing.assert_array_equal(ids, theirs(text, truncation=False, padding=False)["input_ids"])
  assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_pieces_of_an_imported_tokenizer_are_its_text(imported):
  ours, _ = imported
  text = "the Grüße 世界\n"
  pieces = b"".join(ours.pieces[i] for i in ours.encode(text)).decode()
  assert pieces.removeprefix("<s>").removeprefix(" ") == text
  assert ours.vocab == len(ours.pieces)


def test_an_imported_tokenizer_omits_special_tokens_and_gaps():
  encoder = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 4}, unk_token="a"))
  encoder.add_tokens(["<think>"])
  encoder.add_special_tokens(["<end>"])
  ours = tokenizer.Imported(encoder)
  assert ours.pieces == (b"a", b"", b"<think>", b"<end>", b"b") and ours.omitted == {1, 3}
  assert [i for i in range(ours.vocab) if not ours.decode([i])] == sorted(ours.omitted)


def test_an_imported_tokenizer_shows_ids_past_its_vocabulary(imported):
  ours, _ = imported
  ids = [int(i) for i in ours.encode("the")]
  assert ours.decode([*ids, ours.vocab, -1, 10**6]) == "the" + "\ufffd" * 3


def test_an_imported_tokenizer_is_saved_and_not_trained(imported, tmp_path_factory):
  ours, _ = imported
  folder = tmp_path_factory.mktemp("saved")
  ours.save(folder)
  again = tokenizer.Imported.load(folder, 400)
  assert (again.identity, again.pieces) == (ours.identity, ours.pieces)
  with pytest.raises(ValueError, match=r"model\.vocab=100 cannot hold .*tokenizer\.json"):
    tokenizer.Imported.load(folder, 100)
  with pytest.raises(ValueError, match="cannot be trained; to begin a run choose"):
    tokenizer.Imported.train(TEXTS, 400)


def test_an_imported_tokenizer_must_be_there(tmp_path):
  with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
    tokenizer.Imported.load(tmp_path, 300)
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
    tokenizer.Imported.load(tmp_path, 300)


def exported(made, kind, folder):
  """Returns what transformers takes for the tokenizer of a model of that kind."""
  transformers = pytest.importorskip("transformers", reason="pip install transformers")
  made.export(folder)
  (folder / "config.json").write_text(json.dumps({"model_type": kind}))
  return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("name", TRAINED)
def test_an_exported_tokenizer_gives_transformers_the_same_ids(name, kind, tmp_path):
  made = tokenizer.TOKENIZERS[name].train(TEXTS, 400)
  theirs = exported(made, kind, tmp_path)
  again = tokenizer.Imported.load(tmp_path, 400)
  assert again.pieces == made.pieces
  for text in [*TEXTS, WHITE_SPACE]:
    ids = made.encode(text)
    np.testing.assert_array_equal(theirs(text)["input_ids"], ids)
    np.testing.assert_array_equal(again.encode(text), ids)
    assert again.decode(ids) == theirs.decode(ids) == text


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_imported_tokenizer_is_exported_as_it_encodes(imported, kind, tmp_path_factory):
  ours, _ = imported
  theirs = exported(ours, kind, tmp_path_factory.mktemp("exported"))
  for text in [*TEXTS, WHITE_SPACE, "the </s><|im_end|> the"]:
    ids = ours.encode(text)
    np.testing.assert_array_equal(theirs(text)["input_ids"], ids)
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
