"""What `--help` and `--helpfull` print.

Must not know what a program does; absl's own help ends with exit code 1 and shows no config fields.
"""

import inspect
import sys
import types
from collections.abc import Iterable, Sequence

from absl import flags

from moe_jax import config as config_lib

NAMES = ("help", "helpfull")
_WORDS = ("-h", "-help", "--help", "--helpshort", "-helpfull", "--helpfull")


def is_asked(argv: Sequence[str]) -> bool:
  """Returns whether the command line asks for help rather than for a run."""
  return any(word in _WORDS for word in argv[1:])


def own_flags() -> dict[str, flags.Flag]:
  """Returns the flags that the program and the `launch` package define, by name."""
  return {
    flag.name: flag
    for module, found in flags.FLAGS.flags_by_module_dict().items()
    if module == sys.argv[0] or module.split(".")[0] == "launch"
    for flag in found
    if not flag.name.startswith("config")
  }


def text(
  program: types.ModuleType, argv: Sequence[str], config: bool, default_config: str | None
) -> str:
  """Returns the program's docstring and its flags; with `--helpfull` also config fields and others.

  Args:
    program: the module whose docstring introduces it.
    argv: the command line.
    config: whether the program takes `--config`.
    default_config: its default file.
  """
  own = own_flags()
  rows = [_row(flag) for flag in sorted(own.values(), key=lambda flag: flag.name)]
  if config:
    default = f" (default {default_config})" if default_config else " (required)"
    rows.insert(
      0, ("--config=FILE", f"Python file whose get_config() returns a ConfigDict{default}")
    )
    rows.insert(1, ("--config.SECTION.FIELD=VALUE", "overrides one field of it"))
  rows.append(("--helpfull", "lists the config fields and the flags of libraries too"))
  parts = [inspect.cleandoc(program.__doc__ or ""), "Flags:\n" + _table(rows)]
  if any("helpfull" in word for word in argv[1:]):
    if config:
      parts.append("Config fields and their defaults:\n" + _table(_field_rows()))
    others = [flag for name, flag in _all_flags() if name not in own]
    parts.append("Flags of libraries:\n" + _table(map(_row, others)))
  return "\n\n".join(part for part in parts if part)


def _all_flags() -> list[tuple[str, flags.Flag]]:
  found = flags.FLAGS.flags_by_module_dict().values()
  return sorted({flag.name: flag for some in found for flag in some}.items())


def _row(flag: flags.Flag) -> tuple[str, str]:
  if flag.boolean:
    name = f"--[no]{flag.name}" if flag.default else f"--{flag.name}"
  else:
    name = f"--{flag.name}={flag.flag_type().upper()}"
  default = "" if flag.default in (None, "", False) else f" (default {flag.default})"
  return name, " ".join((flag.help or "").split()) + default


def _field_rows() -> Iterable[tuple[str, str]]:
  defaults = config_lib.as_dict(config_lib.Config())
  for name, kind in config_lib.field_types().items():
    section, field = name.split(".")
    yield f"--config.{name}={kind.__name__.upper()}", f"default {defaults[section][field]!r}"


def _table(rows: Iterable[tuple[str, str]]) -> str:
  rows = list(rows)
  width = min(34, max((len(name) for name, _ in rows), default=0))
  return "\n".join(f"  {name:<{width}}  {text}".rstrip() for name, text in rows)
