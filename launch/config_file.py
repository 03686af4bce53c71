"""From `--config=FILE` to a ConfigDict in which every field of a Config can be overridden.

Must not know absl's flag objects, devices or what a program does with its config.
"""

import difflib
import itertools
import pathlib
import re
import traceback
from collections.abc import Sequence

from ml_collections import config_dict

from moe_jax import config as config_lib


def flag_names() -> list[str]:
  """Returns `config` and `config.section.field` for every field."""
  return ["config", *(f"config.{name}" for name in config_lib.field_types())]


def take_path(words: Sequence[str], default: str | None) -> tuple[str, list[str]]:
  """Returns the config file's path, and the command line's words without it.

  config_flags wants the file before its overrides; with the file taken out, any order is right.

  Args:
    words: the command line after the program's name.
    default: the path where `words` name none.

  Raises:
    ValueError: no file, an empty one, or two of them.
  """
  path, rest, ended = None, [], False
  words = iter(words)
  for word in words:
    ended |= word == "--"
    name, equals, value = word.partition("=")
    if ended or name not in ("--config", "-config"):
      rest.append(word)
      continue
    if path is not None:
      other = value if equals else next(words, "")
      raise ValueError(f"--config is given twice, as {path!r} and {other!r}; give it once")
    path = value if equals else next(words, "")
    if not path or path.startswith("-"):
      raise ValueError(f"--config has no file, got {path!r}; give one, as in {_example()}")
  if path is None and default is None:
    names = [word.partition("=")[0] for word in rest if not word.startswith("--config.")]
    near = difflib.get_close_matches("--config", names, n=1)
    got = f", got {near[0]}" if near else ""
    raise ValueError(f"--config is missing{got}; give a file, as in {_example()}")
  return default if path is None else path, rest


def overrides(words: Sequence[str]) -> list[str]:
  """Returns the `words` before a `--`, each `--config.section.field` among them a known field.

  Raises:
    ValueError: one does not exist; the message names the nearest field.
  """
  words = list(itertools.takewhile(lambda word: word != "--", words))
  for word in words:
    override = re.match(r"--?(?:no)?config\.([^=]*)", word)
    if override:
      try:
        config_lib.check_field(override[1])
      except ValueError as error:
        raise ValueError(f"{word}: {error}") from None
  return words


def load(path: str) -> config_dict.ConfigDict:
  """Returns what `get_config()` in the file at `path` returns, completed with every default.

  Raises:
    ValueError: the file is missing, does not run, or does not describe a deployment; the message
      names the file and, where it can, the line.
  """
  returned = _get_config(path)
  try:
    values = config_lib.as_dict(config_lib.from_mapping(returned))
  except (ValueError, config_dict.RequiredValueError) as error:
    raise ValueError(f"--config={path}: {error}") from error
  # A field that refers to another (ConfigDict.get_ref) must follow it when that is overridden.
  for section, fields in returned.items():
    for field, value in fields.items(preserve_field_references=True):
      if isinstance(value, config_dict.FieldReference):
        values[section][field] = value
  return config_dict.ConfigDict(values)


def _get_config(path: str) -> config_dict.ConfigDict:
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    raise ValueError(f"--config={path}: {_what_is_there(file)}")
  namespace = {"__name__": "config_file", "__file__": path}
  try:
    exec(compile(file.read_bytes(), path, "exec"), namespace)
    get_config = namespace.get("get_config")
    returned = get_config() if callable(get_config) else None
  except (Exception, SystemExit) as error:  # the file is somebody's program: anything may happen
    raise ValueError(f"--config={path}: {_failure(path, error)}") from error
  if not callable(get_config):
    raise ValueError(
      f"--config={path}: no function get_config(); define it, returning a ConfigDict"
    )
  if not isinstance(returned, config_dict.ConfigDict):
    raise ValueError(
      f"--config={path}: get_config() returned {returned!r} of type {type(returned).__name__};"
      " return an ml_collections.ConfigDict"
    )
  return returned


def _what_is_there(file: pathlib.Path) -> str:
  if file.is_dir():
    files = sorted(str(f) for f in file.glob("*.py") if f.name != "__init__.py")
    return f"is a folder; give a Python file{', such as ' + files[0] if files else ''}"
  if not file.parent.is_dir():
    return f"no such file, nor a folder {file.parent}"
  siblings = sorted(f.name for f in file.parent.glob("*.py") if f.name != "__init__.py")
  near = difflib.get_close_matches(file.name, siblings, 1)
  if near:
    return f"no such file; did you mean {file.with_name(near[0])}?"
  return f"no such file; {file.parent} has {', '.join(siblings[:12]) or 'no Python file'}"


def _failure(path: str, error: BaseException) -> str:
  lines = [
    line
    for frame, line in traceback.walk_tb(error.__traceback__)
    if frame.f_code.co_filename == path
  ]
  line = lines[-1] if lines else getattr(error, "lineno", None)
  where = f"line {line}: " if line else ""
  return f"{where}{type(error).__name__}: {getattr(error, 'msg', None) or error}"


def _example() -> str:
  files = sorted(f for f in pathlib.Path("configs").glob("*.py") if f.name != "__init__.py")
  return f"--config={files[0] if files else 'configs/laptop.py'}"
