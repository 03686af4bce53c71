"""Checks of single values, each with a message that says what, expected, got and what to do.

All raise ValueError. Knows names and numbers; must not know which sections there are.
"""

import difflib


def positive(part, section: str, *names: str) -> None:
  """Checks that fields of a section are above 0."""
  for name in names:
    value = getattr(part, name)
    if not value > 0:
      least = "at least 1" if isinstance(value, int) else "a number above 0"
      raise ValueError(f"{section}.{name}={value} is not positive; choose {least}")


def not_negative(part, section: str, *names: str) -> None:
  """Checks that fields of a section are 0 or more."""
  for name in names:
    if not getattr(part, name) >= 0:
      raise ValueError(f"{section}.{name}={getattr(part, name)} is negative; choose 0 or more")


def fraction(part, section: str, *names: str) -> None:
  """Checks that fields of a section are from 0 to 1."""
  for name in names:
    if not 0 <= getattr(part, name) <= 1:
      raise ValueError(
        f"{section}.{name}={getattr(part, name)} is not a fraction; choose from 0 to 1"
      )


def one_of(part, section: str, name: str, choices) -> None:
  """Checks that a field of a section is one of `choices`; a near one is named."""
  value = getattr(part, name)
  if value not in choices:
    near = difflib.get_close_matches(str(value), choices, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{section}.{name}={value!r} is not one of {', '.join(choices)}{hint}")


def divides(name: str, size: int, by_name: str, by: int) -> None:
  """Checks that `size` is a multiple of `by`; says which sizes of either would fit."""
  if size % by:
    # No mesh has more ranks than this; looking further would take minutes for a mistyped 10**10.
    fits = [d for d in range(1, min(size, 4096) + 1) if size % d == 0]
    shown = ", ".join(map(str, fits if len(fits) <= 12 else [*fits[:11], "..."]))
    multiple = -(-size // by) * by
    raise ValueError(
      f"{name}={size} is not divisible by {by_name}={by}; choose {by_name} from {shown}"
      f" or {name}={multiple}"
    )
