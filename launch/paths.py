"""Flags that name files and folders, and how a program writes what it found.

A file that could not be written is refused with the command line, before the work, which may take
minutes. `~` is the home folder, which no shell puts in the middle of a word. Must not know what
files hold.
"""

import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

from absl import flags


def define(name: str, about: str, kind: str = "folder", required: bool = False) -> flags.FlagHolder:
  """Returns the flag of a file or folder to read, or of a folder that its program makes; None by
  default, and never empty, as an unset variable would leave it.
  """
  return _define(
    name, about, lambda path: None if path else f"it is empty; name a {kind}", required
  )


def define_workdir() -> flags.FlagHolder:
  """Returns the flag `--workdir`, which is required."""
  return define("workdir", "folder of the run", required=True)


def define_file(name: str, about: str, endings: tuple[str, ...] = ()) -> flags.FlagHolder:
  """Returns the flag of a file to write, None by default.

  Args:
    name: of the flag.
    about: its help.
    endings: of which the file's name must have one, in small or capital letters; none is any.
  """
  return _define(name, about, lambda path: _problem_of_file(path, endings))


def define_folder(name: str, about: str) -> flags.FlagHolder:
  """Returns the flag of a folder to write files to, None by default."""
  return _define(name, about, _problem_of_folder)


def define_json(about: str) -> flags.FlagHolder:
  """Returns the flag `--json`."""
  return define_file("json", about)


def define_png(name: str, about: str) -> flags.FlagHolder:
  """Returns the flag of a picture, whose name must be that of the PNG that it becomes."""
  return define_file(name, about, (".png",))


def write(path: str | pathlib.Path, content: str) -> None:
  """Writes a text file, in folders that need not be there yet.

  Raises:
    OSError: it cannot be written.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(content, encoding="utf-8")


def write_json(path: str | pathlib.Path, found: Any) -> None:
  """Writes figures as `write` does."""
  write(path, json.dumps(found, indent=2) + "\n")


class _Path(flags.ArgumentParser):
  """Of a path's text, in which a home folder is still to be put."""

  def parse(self, argument: str) -> str:
    return os.path.expanduser(argument)

  def flag_type(self) -> str:
    return "string"


def _define(
  name: str, about: str, problem: Callable[[str], str | None], required: bool = False
) -> flags.FlagHolder:
  serializer = flags.ArgumentSerializer()
  found = flags.DEFINE(_Path(), name, None, about, serializer=serializer, required=required)

  def check(path: str | None) -> bool:
    why = None if path is None else problem(path)
    if why:
      raise flags.ValidationError(why)
    return True

  flags.register_validator(found, check)
  return found


def _problem_of_file(path: str, endings: tuple[str, ...]) -> str | None:
  """Returns why a file cannot be written, None if nothing speaks against it."""
  if not path:
    return "it is empty; name a file"
  if endings and not path.lower().endswith(endings):
    kinds = " or ".join(ending[1:].upper() for ending in endings)
    return f"it is no name of a {kinds}; choose one that ends in {' or '.join(endings)}"
  if pathlib.Path(path).is_dir():
    return "it is a folder; name a file"
  return _problem_of_place(pathlib.Path(path))


def _problem_of_folder(path: str) -> str | None:
  """Returns likewise why files cannot be written to a folder."""
  return _problem_of_place(pathlib.Path(path) / "file") if path else "it is empty; name a folder"


def _problem_of_place(file: pathlib.Path) -> str | None:
  there = next(place for place in (file.absolute(), *file.absolute().parents) if place.exists())
  if there != file.absolute() and not there.is_dir():
    return f"{there} is a file, not a folder; choose another place"
  if not os.access(there, os.W_OK):
    return f"{there} may not be written to; choose another"
  if there.is_dir():
    try:  # for access is not all: a file without a name, of which nothing is left
      tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
      return f"{error.strerror} in {there}; choose another place"
  return None
