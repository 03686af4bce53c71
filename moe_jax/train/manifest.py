"""What a folder must hold, byte for byte: written last, checked before anything is believed.

Knows files, sizes and digests. It must not know jax, orbax, steps or what the files mean.
"""

import concurrent.futures
import hashlib
import json
import os
from pathlib import Path

NAME = "manifest.json"
# Hashing releases the interpreter's lock, so threads run it on several files at once.
_THREADS = 8


def write(folder: Path) -> None:
  """Lists every file under `folder` with size and SHA-256 in its manifest, all flushed to disk.

  The manifest appears whole or not at all, and only after every file it lists is on disk.

  Raises:
    OSError: a file cannot be read or the manifest cannot be written.
  """
  paths = sorted(path for path in folder.rglob("*") if path.is_file())
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    entries = list(pool.map(_flushed_entry, paths))
  for path in folder.rglob("*"):
    if path.is_dir():
      flush(path)
  names = [path.relative_to(folder).as_posix() for path in paths]
  unfinished = folder / f"{NAME}.tmp"
  with unfinished.open("x") as file:
    file.write(_text(dict(zip(names, entries, strict=True))))
    file.flush()
    os.fsync(file.fileno())
  os.replace(unfinished, folder / NAME)
  flush(folder)


def damage(folder: Path) -> str | None:
  """Returns which file of `folder` differs from its manifest and how, or None if none does.

  A manifest that is missing or does not agree with itself is damage too. Files that it does not
  list are not looked at.
  """
  try:
    text = (folder / NAME).read_text(encoding="utf-8")
    entries = json.loads(text)["files"]
    agrees = text == _text(entries)
  except FileNotFoundError:
    return f"{NAME} is missing"
  except OSError as error:
    return f"{NAME} cannot be read: {error.strerror}"
  except (ValueError, KeyError, TypeError):
    agrees = False
  if not agrees:
    return f"{NAME} is not as it was written"
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    flaws = pool.map(lambda name: _flaw(folder / name, entries[name]), entries)
    return next((f"{name} {flaw}" for name, flaw in zip(entries, flaws, strict=True) if flaw), None)


def flush(folder: Path) -> None:
  """Returns once the names in `folder` (not its files' contents) are on disk.

  Raises:
    OSError: the folder cannot be opened or flushed.
  """
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _text(entries: dict) -> str:
  listed = json.dumps(entries, indent=1)
  own = hashlib.sha256(listed.encode()).hexdigest()
  return json.dumps({"sha256": own, "files": entries}, indent=1)


def _flushed_entry(path: Path) -> dict:
  with path.open("rb") as file:
    os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flaw(path: Path, entry: dict) -> str | None:
  try:
    size = path.stat().st_size
    if size != entry["bytes"]:
      return f"has {size} bytes, expected {entry['bytes']}"
    with path.open("rb") as file:
      if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
        return "has other contents than were saved"
  except FileNotFoundError:
    return "is missing"
  except OSError as error:
    return f"cannot be read: {error.strerror}"
  return None
