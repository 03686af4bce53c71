"""Which text a run learns from: finds, reads and checks the files, and sets some of them aside.

The corpus is held in memory. Every file is either a document, or named in the report with the
reason why it was skipped, or the run does not start. This module knows files and text; it must not
know tokens, sequences or steps.
"""

import dataclasses
import glob
import hashlib
import os
import stat
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from moe_jax import config

# Folders of a Python installation that hold other people's packages, tests, or what `make` wrote.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_BUILT_PREFIXES = ("config-", "_sysconfigdata")


@dataclasses.dataclass(frozen=True)
class Document:
  """One text. `name` is the file's path below the corpus's root, with forward slashes."""

  name: str
  text: str


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of the files. `skipped` holds a (name, reason) pair for each file left out."""

  root: str
  num_train_files: int
  num_train_bytes: int
  num_held_out_files: int
  num_held_out_bytes: int
  skipped: tuple[tuple[str, str], ...]
  note: str = ""

  def __str__(self) -> str:
    text = (
      f"{self.root}: {self.num_train_files:,} files, {self.num_train_bytes:,} bytes to train on;"
      f" {self.num_held_out_files:,} files, {self.num_held_out_bytes:,} bytes held out"
    )
    if self.note:
      text += f"; {self.note}"
    if self.skipped:
      shown = _shown([f"{name} ({reason})" for name, reason in self.skipped])
      text += f"; skipped {len(self.skipped):,}: {shown}"
    return text


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The documents of a run, in the order of their names.

  `fingerprint` is a hash over names, contents and the split: equal exactly if the data are.
  """

  train_documents: tuple[Document, ...]
  held_out_documents: tuple[Document, ...]
  report: Report
  fingerprint: str


def load_corpus(data: config.Data) -> Corpus:
  """Returns the documents that `data` names, split by file into training and held-out.

  Args:
    data: `paths` are comma-separated globs (`**` descends, `~` is the home folder). A path that
      names a folder means every file below it, links followed. As in a shell, hidden files count
      only where a pattern names them. Empty: the source of this Python's standard library, without
      its tests.

  Returns:
    The corpus. A single file is cut in two: its last `held_out_fraction` is held out.

  Raises:
    ValueError: a glob matches no file; a file is binary or cannot be read (in the standard library
      such files are skipped, counted and named in the report instead); every file is empty.
  """
  if data.paths:
    source = f"data.paths={data.paths}"
    root, paths = _named_files(data.paths)
  else:
    root, paths = _library_files()
    source = f"Python's standard library in {root}"
  documents, skipped, unreadable = _read(root, paths)
  if unreadable and data.paths:
    raise ValueError(
      f"cannot train on {_shown([f'{path} ({reason})' for path, reason in unreadable])};"
      " data.paths must name readable UTF-8 text files: leave these out"
    )
  if not documents:
    raise ValueError(f"{source} holds no text: {_shown([str(p) for p in paths])}, all empty")
  train, held_out, note = _split(documents, data.held_out_fraction)
  report = Report(
    root=str(root),
    num_train_files=len(train),
    num_train_bytes=_num_bytes(train),
    num_held_out_files=len(held_out),
    num_held_out_bytes=_num_bytes(held_out),
    skipped=tuple(sorted(skipped + [(_name(root, path), reason) for path, reason in unreadable])),
    note=note,
  )
  return Corpus(train, held_out, report, _fingerprint(train, held_out))


def _library_files() -> tuple[Path, list[Path]]:
  root = Path(sysconfig.get_path("stdlib"))
  paths = [
    path
    for path in _below(root)
    if path.suffix == ".py"
    and not _NOT_LIBRARY.intersection(path.relative_to(root).parts)
    and not any(part.startswith(_BUILT_PREFIXES) for part in path.relative_to(root).parts)
  ]
  if not paths:
    raise ValueError(
      f"this Python has no source of its standard library in {root};"
      " name text of your own with data.paths, such as data.paths=~/notes/**/*.txt"
    )
  return root, paths


def _named_files(patterns: str) -> tuple[Path, list[Path]]:
  paths_by_target = {}
  for pattern in filter(None, (part.strip() for part in patterns.split(","))):
    matches = _matches(os.path.abspath(os.path.expanduser(pattern)))
    if not matches:
      raise ValueError(
        f"data.paths: {pattern} matches no file; name files, folders or globs such as src/**/*.py,"
        " separated by commas"
      )
    for path in sorted(matches):
      paths_by_target.setdefault(os.path.realpath(path), path)
  if not paths_by_target:
    raise ValueError(f"data.paths={patterns!r} names no file; leave it empty for the default text")
  paths = list(paths_by_target.values())
  return Path(os.path.commonpath([path.parent for path in paths])), paths


def _matches(pattern: str) -> list[Path]:
  # A name that exists is taken literally, so that `notes[1].txt` needs no quoting.
  if os.path.isdir(pattern):
    return list(_below(Path(pattern)))
  if os.path.lexists(pattern):
    return [Path(pattern)]
  return [Path(match) for match in glob.glob(pattern, recursive=True) if not os.path.isdir(match)]


def _below(folder: Path) -> Iterator[Path]:
  def refuse(error: OSError):
    raise ValueError(f"cannot read the folder {error.filename} ({error.strerror})") from error

  found = set()
  for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
    target = os.path.realpath(parent)
    if target in found:  # a link to it led here before, perhaps from its own inside
      folders.clear()
      continue
    found.add(target)
    # In order, so that it is the same name everywhere under which a folder is met first.
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    yield from (Path(parent, name) for name in names if not name.startswith("."))


def _read(root: Path, paths: list[Path]):
  documents, skipped, unreadable = [], [], []
  for path in paths:
    try:
      text = _text(path)
    except (OSError, ValueError) as error:
      unreadable.append((path, getattr(error, "strerror", None) or str(error)))
      continue
    if text:
      documents.append(Document(_name(root, path), text))
    else:
      skipped.append((_name(root, path), "empty"))
  return sorted(documents, key=lambda document: document.name), skipped, unreadable


def _text(path: Path) -> str:
  # Opening a pipe would wait for a writer for ever.
  if not stat.S_ISREG(path.stat().st_mode):
    raise ValueError("not a regular file")
  content = path.read_bytes()
  if b"\0" in content:
    raise ValueError(f"binary: a NUL byte at offset {content.index(0)}")
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    raise ValueError(f"binary or not UTF-8: byte {error.start} is wrong") from error


def _split(documents: list[Document], fraction: float):
  """Returns training documents, held-out documents and a note.

  A hash of the name, not the name, orders the files, so that one folder does not make up the whole
  held-out set. In that order each file is held out that still fits the fraction of the bytes.
  """
  if len(documents) == 1:
    return _cut(documents[0], fraction)
  room_bytes = fraction * _num_bytes(documents)
  held_out_names = set()
  for document in sorted(documents, key=lambda document: _digest(document.name)):
    if _num_bytes([document]) <= room_bytes:
      room_bytes -= _num_bytes([document])
      held_out_names.add(document.name)
  note = ""
  if not held_out_names:
    smallest = min(documents, key=lambda document: _num_bytes([document]))
    held_out_names.add(smallest.name)
    note = f"no file is as small as {fraction:.1%} of the text, so the smallest is held out"
  train = tuple(d for d in documents if d.name not in held_out_names)
  held_out = tuple(d for d in documents if d.name in held_out_names)
  return train, held_out, note


def _cut(document: Document, fraction: float):
  name, text = document.name, document.text
  if len(text) < 2:
    raise ValueError(f"{name} is the only text and has 1 character; it cannot be split")
  cut = min(max(int(len(text) * (1 - fraction)), 1), len(text) - 1)
  # Between lines where one ends near by; where lines are long, that may be far from the share.
  line = text.rfind("\n", 0, cut) + 1
  if line > 0 and cut - line <= -(-(len(text) - cut) // 10):
    cut = line
  note = f"{name} is the only text, so its end is held out"
  return (Document(name, text[:cut]),), (Document(f"{name}#end", text[cut:]),), note


def _fingerprint(train: tuple[Document, ...], held_out: tuple[Document, ...]) -> str:
  digest = hashlib.sha256()
  for side, documents in (("train", train), ("held_out", held_out)):
    for document in documents:
      # Each part is hashed alone first, so that no two corpora run together to the same bytes.
      digest.update((side + _digest(document.name) + _digest(document.text)).encode())
  return digest.hexdigest()


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def _num_bytes(documents) -> int:
  return sum(len(document.text.encode()) for document in documents)


def _name(root: Path, path: Path) -> str:
  # A file name need not be UTF-8; printed and hashed, it has to be.
  return path.relative_to(root).as_posix().encode(errors="backslashreplace").decode()


def _shown(names: list[str], most: int = 3) -> str:
  more = len(names) - most
  return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")
