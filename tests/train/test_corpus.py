import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from moe_jax import config
from moe_jax.train import corpus


def write(folder, contents):
  for name, content in contents.items():
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def load(paths, held_out_fraction=0.05):
  return corpus.load_corpus(config.Data(paths=str(paths), held_out_fraction=held_out_fraction))


def names(loaded):
  return sorted(d.name for d in loaded.train_documents + loaded.held_out_documents)


@pytest.fixture(scope="module")
def library():
  return corpus.load_corpus(config.Data())


def test_library_is_the_default(library):
  found = names(library)
  assert {"os.py", "json/decoder.py"} <= set(found)
  for name in found:
    assert name.endswith(".py")
    assert not {"test", "tests", "site-packages", "__pycache__"}.intersection(name.split("/"))
  text = {d.name: d.text for d in library.train_documents + library.held_out_documents}
  assert text["os.py"].encode() == Path(os.__file__).read_bytes()


def test_library_is_the_same_every_time(library):
  assert corpus.load_corpus(config.Data()) == library


def test_library_split(library):
  report = library.report
  held_out = report.num_held_out_bytes / (report.num_held_out_bytes + report.num_train_bytes)
  assert 0.04 < held_out <= 0.05
  assert report.num_held_out_files > 10
  assert not {d.name for d in library.train_documents} & {
    d.name for d in library.held_out_documents
  }
  assert report.num_held_out_bytes == sum(len(d.text.encode()) for d in library.held_out_documents)
  assert report.num_train_bytes == sum(len(d.text.encode()) for d in library.train_documents)
  assert [d.name for d in library.train_documents] == sorted(
    d.name for d in library.train_documents
  )


def test_library_reports_what_it_skips(library):
  assert ("urllib/__init__.py", "empty") in library.report.skipped
  assert f"skipped {len(library.report.skipped)}" in str(library.report)


def test_library_with_files_that_are_no_text(tmp_path, monkeypatch):
  write(
    tmp_path, {"a.py": "x" * 9, "b.py": "yy", "bad.py": b"\xff", "test/c.py": "z", "d.txt": "z"}
  )
  write(tmp_path, {"config-3/e.py": "z", "_sysconfigdata_x.py": "z", "nul.py": b"a\0"})
  monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
  loaded = corpus.load_corpus(config.Data())
  assert names(loaded) == ["a.py", "b.py"]
  assert [name for name, _ in loaded.report.skipped] == ["bad.py", "nul.py"]


def test_python_without_source(tmp_path, monkeypatch):
  monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
  with pytest.raises(ValueError, match=r"no source of its standard library.*data\.paths"):
    corpus.load_corpus(config.Data())


@pytest.mark.parametrize(
  "patterns, expected",
  [
    ("{0}", ["a.txt", "b.md", "sub/c.txt", "sub/x[1].txt"]),
    ("{0}/*.txt,{0}/b.md", ["a.txt", "b.md"]),
    (" {0}/**/*.txt , ", ["a.txt", "sub/c.txt", "sub/x[1].txt"]),
    ("{0}/sub", ["c.txt", "x[1].txt"]),
    ("{0}/sub/x[1].txt,{0}/a.txt", ["a.txt", "sub/x[1].txt"]),
    ("{0}/a.txt,{0}/*,{0}/link.txt", ["a.txt", "b.md"]),
    ("{0}/a.txt,{0}/.hidden/d.txt", [".hidden/d.txt", "a.txt"]),
    ("~/*.txt,~/b.md", ["a.txt", "b.md"]),
  ],
)
def test_patterns(patterns, expected, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  write(tmp_path, {"a.txt": "aaa", "b.md": "bbb", "sub/c.txt": "ccc", "sub/x[1].txt": "ddd"})
  write(tmp_path, {".hidden/d.txt": "eee"})
  (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
  if "*.txt" in patterns or patterns == "{0}":
    (tmp_path / "link.txt").unlink()
  assert names(load(patterns.format(tmp_path))) == expected


def test_a_link_and_its_file_are_one_document(tmp_path):
  write(tmp_path, {"a.txt": "aaa", "b.txt": "bbb"})
  (tmp_path / "z.txt").symlink_to("a.txt")
  assert names(load(tmp_path)) == ["a.txt", "b.txt"]


def test_folders_behind_links_are_read_once_each(tmp_path):
  write(tmp_path / "all", {"a.txt": "aaa", "real/b.txt": "bbb", "real/deep/c.txt": "ccc"})
  write(tmp_path / "elsewhere", {"d.txt": "ddd"})
  for link, target in (
    ("linked", "../elsewhere"), ("other", "../elsewhere"), ("real/loop", ".."), ("same", "real"),
  ):  # fmt: skip
    (tmp_path / "all" / link).symlink_to(target)
  found = load(tmp_path / "all")
  assert names(found) == ["a.txt", "linked/d.txt", "real/b.txt", "real/deep/c.txt"]


def test_relative_patterns_start_here(tmp_path, monkeypatch):
  write(tmp_path, {"a.txt": "aaa", "b.txt": "bbb"})
  monkeypatch.chdir(tmp_path)
  assert load("*.txt") == load(tmp_path)


@hypothesis.given(
  sizes=st.lists(st.integers(1, 5000), min_size=2, max_size=30),
  fraction=st.floats(0.001, 0.999),
)
@hypothesis.settings(deadline=None)
def test_split_properties(sizes, fraction):
  documents = [corpus.Document(f"{i}.txt", "x" * size) for i, size in enumerate(sizes)]
  train, held_out, note = corpus._split(documents, fraction)
  assert train and held_out
  assert sorted([*train, *held_out], key=documents.index) == documents
  held_out_bytes = sum(len(d.text) for d in held_out)
  if note:
    assert len(held_out) == 1 and held_out_bytes == min(sizes) > fraction * sum(sizes)
  else:
    assert held_out_bytes <= fraction * sum(sizes)


def test_split_does_not_depend_on_the_order_of_patterns(tmp_path):
  write(tmp_path, {f"{i}.txt": "x" * (i + 1) for i in range(20)})
  forward = load(",".join(f"{tmp_path}/{i}.txt" for i in range(20)), 0.3)
  assert forward == load(",".join(f"{tmp_path}/{i}.txt" for i in reversed(range(20))), 0.3)


@pytest.mark.parametrize(
  "text, train, held_out",
  [
    ("abc\ndef\nghi\n", "abc\ndef\n", "ghi\n"),
    ("abcdefgh", "abcdef", "gh"),
    ("ab", "a", "b"),
    ("é🙂", "é", "🙂"),
  ],
)
def test_a_single_file_is_cut(text, train, held_out, tmp_path):
  write(tmp_path, {"one.txt": text, "empty.txt": ""})
  loaded = load(tmp_path, 0.25)
  assert [d.text for d in loaded.train_documents] == [train]
  assert [d.text for d in loaded.held_out_documents] == [held_out]
  assert "only text" in str(loaded.report)


@pytest.mark.parametrize(("text", "num_held_out"), [
  ("Title\n" + "x" * 100_000, 5_000), ("Title\n" + "é" * 100_000, 10_000),
  ("".join("x" * 49 + "\n" for _ in range(2_001)), 5_050),
])  # fmt: skip
def test_a_single_file_is_cut_near_its_share_also_where_lines_are_long(
  text, num_held_out, tmp_path
):
  write(tmp_path, {"one.txt": text})
  report = load(tmp_path).report
  assert report.num_held_out_bytes == pytest.approx(num_held_out, rel=1e-3)
  assert report.num_train_bytes + report.num_held_out_bytes == len(text.encode())


def test_an_empty_file_among_others_is_named(tmp_path):
  write(tmp_path, {"a.txt": "aaa", "b.txt": "bbb", "none.txt": ""})
  loaded = load(tmp_path)
  assert names(loaded) == ["a.txt", "b.txt"]
  assert loaded.report.skipped == (("none.txt", "empty"),)
  assert "skipped 1: none.txt (empty)" in str(loaded.report)


def test_fingerprint(tmp_path):
  contents = {f"{i}.txt": str(i) * 10 for i in range(9)}
  write(tmp_path / "first", contents)
  first = load(tmp_path / "first").fingerprint
  write(tmp_path / "moved", contents)
  assert load(tmp_path / "moved").fingerprint == first

  write(tmp_path / "content", contents | {"3.txt": "3333333334"})
  write(tmp_path / "name", {("ten.txt" if n == "3.txt" else n): c for n, c in contents.items()})
  write(tmp_path / "border", contents | {"3.txt": "3" * 9, "4.txt": "3" + "4" * 10})
  others = [load(tmp_path / other).fingerprint for other in ("content", "name", "border")]
  others.append(load(tmp_path / "first", 0.5).fingerprint)
  assert len({first, *others}) == 5


def test_fingerprint_keeps_names_and_texts_apart(tmp_path):
  write(tmp_path / "left", {"x": "ytext", "z": "z"})
  write(tmp_path / "right", {"xy": "text", "z": "z"})
  assert load(tmp_path / "left").fingerprint != load(tmp_path / "right").fingerprint


def test_line_ends_are_kept(tmp_path):
  write(tmp_path, {"a.txt": b"a\r\nb\rc\n", "b.txt": b"long enough to be trained on"})
  assert load(tmp_path).held_out_documents[0].text == "a\r\nb\rc\n"


@pytest.mark.parametrize(
  "contents, paths, message",
  [
    ({}, "{0}/*.txt", r"data\.paths: .*/\*\.txt matches no file"),
    ({"a.txt": "a"}, "{0}/a.txt,{0}/missing.txt", r"missing\.txt matches no file"),
    ({"sub/a.txt": "a"}, "{0}/*", r"/\* matches no file"),
    ({}, "{0}", r"matches no file"),
    ({"a.txt": "a"}, " , ", r"data\.paths=' , ' names no file"),
    ({"a.txt": "", "b.txt": ""}, "{0}", r"holds no text: .*a\.txt.*all empty"),
    ({"a.txt": "text", "b.bin": b"x\0y"}, "{0}", r"b\.bin \(binary: a NUL byte at offset 1\)"),
    ({"a.txt": "text", "b.bin": b"xy\xff"}, "{0}", r"b\.bin \(binary or not UTF-8: byte 2"),
    ({f"{i}.bin": b"\0" for i in range(9)}, "{0}", r"\.bin .* and 6 more"),
    ({"a.txt": "x"}, "{0}", r"a\.txt is the only text and has 1 character"),
  ],
)  # fmt: skip
def test_bad_input(contents, paths, message, tmp_path):
  write(tmp_path, contents)
  with pytest.raises(ValueError, match=message) as raised:
    load(paths.format(tmp_path))
  assert "\n" not in str(raised.value)


def test_a_link_to_nowhere_is_named(tmp_path):
  write(tmp_path, {"a.txt": "aaa"})
  (tmp_path / "gone.txt").symlink_to("nowhere")
  with pytest.raises(ValueError, match=r"gone\.txt \(No such file or directory\)"):
    load(tmp_path)


def test_a_pipe_is_named_and_not_waited_for(tmp_path):
  write(tmp_path, {"a.txt": "aaa"})
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(ValueError, match=r"pipe \(not a regular file\)"):
    load(tmp_path)


@contextlib.contextmanager
def ordinary_user():
  """For root, who may read everything, be somebody else for a while."""
  if os.geteuid():
    yield
    return
  os.seteuid(65534)
  try:
    yield
  finally:
    os.seteuid(0)


@pytest.mark.parametrize("locked, message", [("b.txt", r"b\.txt \(Perm"), ("sub", r"sub \(Perm")])
def test_what_may_not_be_read_is_named(locked, message):
  folder = tempfile.mkdtemp()  # pytest's own are closed to other users
  try:
    os.chmod(folder, 0o755)
    write(folder, {"a.txt": "aaa", "b.txt": "bbb", "sub/c.txt": "ccc"})
    os.chmod(Path(folder, locked), 0)
    with ordinary_user(), pytest.raises(ValueError, match=message):
      load(folder)
  finally:
    os.chmod(Path(folder, locked), 0o700)
    shutil.rmtree(folder)
