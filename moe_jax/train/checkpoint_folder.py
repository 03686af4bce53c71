"""The life of a checkpoint's folder: begun, completed, replaced, put aside, deleted.

Every name on the right exists only when all that is on its left is on disk:

  30.saving/(anything)  ->  30.saving/manifest.json  ->  30/

A save that is killed leaves a `.saving` folder without a manifest, and all else as it was. A folder
that bears only a step's number was complete once; if its manifest is gone, that is damage.

Knows folders and manifests. It must not know jax, orbax or what is in a checkpoint.
"""

import contextlib
import itertools
import re
import shutil
from pathlib import Path

from moe_jax.train import manifest

_STEP = re.compile(r"(0|[1-9][0-9]*)(\.saving)?", re.ASCII)
_LEFTOVER = re.compile(r"[0-9]+(\.saving)?\.(replaced|deleting)", re.ASCII)


def staging(folder: Path, step: int) -> Path:
  """Returns where the files of checkpoint `step` are to be written."""
  return folder / f"{step}.saving"


def complete(folder: Path) -> list[tuple[int, Path]]:
  """Returns (step, path) of each completed checkpoint, damaged or not, newest first."""
  return [(step, path) for step, path in _steps(folder) if not _is_incomplete(path)]


def incomplete(folder: Path) -> list[tuple[int, Path]]:
  """Returns (step, path) of each checkpoint that was not completed, newest first."""
  return [(step, path) for step, path in _steps(folder) if _is_incomplete(path)]


def begin(folder: Path, step: int) -> None:
  """Makes the empty staging folder of `step`.

  Raises:
    OSError: the folder cannot be written.
  """
  folder.mkdir(parents=True, exist_ok=True)
  path = staging(folder, step)
  if (path / manifest.NAME).exists():
    _rename_to_step(folder, step)  # it was completed, and only the last rename was interrupted
  elif path.exists():
    shutil.rmtree(path)
  path.mkdir()


def finish(folder: Path, step: int, *, keep: int) -> None:
  """Completes `step`, whose files are all written, then deletes what it makes superfluous.

  Of the complete checkpoints up to `step` the newest `keep` stay; nothing newer than it is touched.

  Raises:
    OSError: a file cannot be read or written; what was complete before still is.
  """
  manifest.write(staging(folder, step))
  _rename_to_step(folder, step)
  superfluous = [path for saved, path in complete(folder) if saved <= step][keep:]
  superfluous += [path for saved, path in incomplete(folder) if saved < step]
  # What cannot be deleted now is tried again at the next save: this one is complete.
  for path in superfluous:
    with contextlib.suppress(OSError):
      # Renamed first, so that no interruption leaves half a checkpoint under a step's name.
      path.rename(path.with_name(f"{path.name}.deleting"))
  for path in folder.iterdir():
    if _LEFTOVER.fullmatch(path.name):
      shutil.rmtree(path, ignore_errors=True)


def abandon(folder: Path, step: int) -> None:
  """Gives back the room that the incomplete save of `step` takes, as far as the disk lets it."""
  path = staging(folder, step)
  if _is_incomplete(path):
    shutil.rmtree(path, ignore_errors=True)


def put_aside(path: Path) -> None:
  """Renames a damaged checkpoint to `<step>.damaged` (or `.damaged-2`, ...) and so keeps it.

  Raises:
    OSError: it cannot be renamed.
  """
  step = path.name.partition(".")[0]
  names = itertools.chain([f"{step}.damaged"], (f"{step}.damaged-{n}" for n in itertools.count(2)))
  free = next(name for name in names if not path.with_name(name).exists())
  if path.exists():
    path.rename(path.with_name(free))


def _rename_to_step(folder: Path, step: int) -> None:
  final, replaced = folder / str(step), folder / f"{step}.replaced"
  if final.exists():
    # Killed between these renames, the staging folder is complete and found by its manifest.
    if replaced.exists():
      shutil.rmtree(replaced)
    final.rename(replaced)
  staging(folder, step).rename(final)
  manifest.flush(folder)


def _is_incomplete(path: Path) -> bool:
  return path.suffix == ".saving" and not (path / manifest.NAME).exists()


def _steps(folder: Path) -> list[tuple[int, Path]]:
  if not folder.is_dir():
    return []
  paths = [path for path in folder.iterdir() if _STEP.fullmatch(path.name) and path.is_dir()]
  steps = [(int(path.name.partition(".")[0]), path) for path in paths]
  # Of one step, a complete staging folder is newer than the checkpoint that it was to replace.
  return sorted(steps, key=lambda item: (item[0], item[1].name), reverse=True)
