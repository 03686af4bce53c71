"""Who writes to a folder: one run at a time, however the one before it ended.

Knows folders and processes; must not know what is written. Readers do not ask.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from moe_jax.train import processes

_NAME = ".lock"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
  """Makes `folder` and holds it for this run, until the context or process 0 ends.

  A folder that is made here and holds nothing at the end is taken away again. On file systems that
  lock no files, and in a folder that cannot be written, nobody is refused.

  Raises:
    ValueError: another run holds it; all processes raise it.
    OSError: the folder cannot be made; likewise.

  Communication: as `processes.from_first`.
  """
  with contextlib.ExitStack() as stack:
    processes.from_first(lambda: stack.enter_context(_held_here(folder)))
    yield


@contextlib.contextmanager
def _held_here(folder: Path) -> Iterator[None]:
  made = [each for each in (folder, *folder.parents) if not each.exists()]
  with contextlib.ExitStack() as stack:
    stack.callback(_remove_empty, made)
    folder.mkdir(parents=True, exist_ok=True)
    file = _locked(folder / _NAME)
    if file is not None:
      stack.enter_context(file)
      stack.callback(_unlink, folder / _NAME)  # before it is closed, which gives it free
    yield


def _locked(path: Path) -> TextIO | None:
  """Returns the open file, locked if the file system locks any; None where it cannot be written."""
  while True:
    try:
      file = path.open("a")
    except OSError:
      return None
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.close()
      raise ValueError(
        f"another run writes to {path.parent}; stop it, or name another --workdir"
      ) from error
    except OSError:
      return file
    if _is_at(path, file):
      return file
    file.close()  # whoever held it took it away before it was free


def _is_at(path: Path, file: TextIO) -> bool:
  try:
    return os.path.samestat(path.stat(), os.fstat(file.fileno()))
  except FileNotFoundError:
    return False


def _unlink(path: Path) -> None:
  with contextlib.suppress(OSError):
    path.unlink()


def _remove_empty(folders: list[Path]) -> None:
  for each in folders:
    with contextlib.suppress(OSError):
      each.rmdir()
