"""Checkpoints of arrays over many devices: saved in the background, believed only when intact.

orbax writes and reshards the arrays, but restores a file with a flipped bit as if nothing were
wrong: so a manifest of digests is written last, and checked before anything is restored. Restoring
changes no file. `checkpoint_folder` says which folder names mean what.

Knows arrays by path, shape and dtype. It must not know the model, the optimizer or the config: they
come as a pytree and as `meta`.
"""

import json
import operator
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from moe_jax.train import checkpoint_folder, manifest, processes

_ARRAYS, _META = "arrays", "meta.json"
# How long a process waits for the others' files; orbax's own limit.
_SAVE_TIMEOUT_S = 1200


class Checkpoints:
  """The checkpoints in one folder, which every process sees under the same path.

  With several processes, all of them call `save`, `wait`, `restore` and `close` in the same order,
  but for the `close` of one that has failed; process 0 keeps the folder, and all raise when a
  checkpoint of one fails.
  """

  def __init__(self, folder: str | Path, *, keep: int, report: Callable[[str], None]):
    """Touches no file.

    Args:
      folder: where the checkpoints lie; made by the first save.
      keep: how many complete checkpoints to keep.
      report: takes one line for each incomplete or damaged checkpoint; process 0 calls it.

    Raises:
      ValueError: `keep` is not positive, or `folder` is a file.
    """
    # tensorstore takes absolute paths only.
    self._folder = Path(folder).absolute()
    if keep < 1:
      raise ValueError(f"keep={keep} checkpoints would leave none to resume from; keep at least 1")
    if self._folder.exists() and not self._folder.is_dir():
      raise ValueError(f"checkpoint folder {self._folder} is a file; name a folder")
    self._keep, self._report = keep, report
    self._orbax = ocp.AsyncCheckpointer(
      ocp.StandardCheckpointHandler(),
      async_options=ocp.options.AsyncOptions(timeout_secs=_SAVE_TIMEOUT_S),
    )
    self._saving: tuple[int, threading.Thread] | None = None
    self._error: Exception | None = None
    self._damaged: list[Path] = []

  def save(self, step: int, arrays, meta: dict) -> None:
    """Saves in the background; returns once the devices' buffers are copied and may be donated.

    Waits for the save before it. An existing checkpoint of the same step is replaced once this
    one is complete.

    Args:
      step: names the checkpoint; not negative.
      arrays: pytree of jax.Arrays, each sharded over any devices of any processes.
      meta: what else to keep, as plain JSON.

    Raises:
      ValueError: a negative step, a leaf that cannot be saved, or `meta` is not JSON.
      OSError: the folder cannot be written, or the save before this one failed.
    """
    self.wait()
    step = operator.index(step)
    if step < 0:
      raise ValueError(f"step={step} is negative; a checkpoint's step counts from 0")
    array_by_name = _by_name(arrays)
    _check_saveable(array_by_name)
    meta_text = _meta_text(step, meta, array_by_name)
    processes.from_first(lambda: self._begin(step))
    path = checkpoint_folder.staging(self._folder, step)
    try:
      self._orbax.save(path / _ARRAYS, args=ocp.args.StandardSave(array_by_name))
    except OSError as error:
      raise OSError(self._save_failed(step, error)) from error
    thread = threading.Thread(target=self._finish, args=(step, meta_text), name="checkpoint")
    self._saving = (step, thread)
    thread.start()

  def wait(self) -> None:
    """Returns once the last save is complete, on every process.

    Raises:
      OSError: it failed; the checkpoints before it are as they were.

    Communication: with several processes, one all-gather of 1 element.
    """
    if self._saving is None:
      return
    step, thread = self._saving
    thread.join()
    self._saving = None
    error, self._error = self._error, None
    if not processes.of_each(np.array(error is not None)).any():
      return
    self._abandon(step)
    raise OSError(self._save_failed(step, error or "on another process")) from error

  def close(self, *, failed: bool = False) -> None:
    """Waits for the last save, then ends orbax's threads; no call may follow.

    Args:
      failed: whether this process ends by an error of its own, which the others, who may be in a
        collective, do not know of: it waits for its own part of the save, meets nobody and raises
        nothing.

    Raises:
      OSError: the last save failed.
    """
    try:
      if not failed:
        self.wait()
      elif self._saving is not None:
        step, thread = self._saving
        thread.join()
        if self._error is not None:
          self._abandon(step)
    finally:
      self._orbax.close()

  def latest_step(self) -> int | None:
    """Returns the step of the newest complete checkpoint by this process's look at the folder.

    Only names are looked at: `restore` may find it damaged and take the one before.
    """
    return next((step for step, _ in checkpoint_folder.complete(self._folder)), None)

  def restore(self, abstract) -> tuple[int, object, dict] | None:
    """Returns the newest intact checkpoint on the devices that `abstract` names; changes no file.

    Args:
      abstract: pytree of jax.ShapeDtypeStruct with shardings, which may differ from the saved ones.

    Returns:
      (step, arrays, meta), or None where no checkpoint was ever completed.

    Raises:
      ValueError: every checkpoint is damaged, or it is of another model.
      OSError: the folder cannot be read, or the last save failed.

    Communication: with several processes, two broadcasts of the checkpoint's description, as bytes.
    """
    self.wait()
    wanted_by_name = _by_name(abstract)
    for name, wanted in wanted_by_name.items():
      if getattr(wanted, "sharding", None) is None:
        raise ValueError(
          f"{name} has no sharding; give each leaf of abstract the one to restore to"
        )
    found = processes.from_first(self._newest_intact)
    if found is None:
      return None
    path = self._folder / found["name"]
    _check_same_model(found["leaves"], wanted_by_name, path)
    restored_by_name = self._orbax.restore(
      path / _ARRAYS, args=ocp.args.StandardRestore(wanted_by_name)
    )
    leaves = [restored_by_name[name] for name in wanted_by_name]
    return found["step"], jax.tree.unflatten(jax.tree.structure(abstract), leaves), found["meta"]

  def _newest_intact(self) -> dict | None:
    for _, path in checkpoint_folder.incomplete(self._folder):
      self._report(f"checkpoint {path} is incomplete: its saving was interrupted; skipped")
    self._damaged, flaws = [], []
    for _, path in checkpoint_folder.complete(self._folder):
      flaw = manifest.damage(path)
      if flaw is None and not (path / _META).exists():
        flaw = f"{_META} is missing"  # from its manifest too
      if flaw is None:
        return {"name": path.name, **json.loads((path / _META).read_text(encoding="utf-8"))}
      self._report(f"checkpoint {path} is damaged: {flaw}; trying the one before")
      self._damaged.append(path)
      flaws.append(f"{path.name}: {flaw}")
    if flaws:
      raise ValueError(
        f"every checkpoint in {self._folder} is damaged ({'; '.join(flaws)});"
        " put a copy in place, or name an empty folder to start anew"
      )
    return None

  def _begin(self, step: int) -> None:
    try:
      for path in self._damaged:
        checkpoint_folder.put_aside(path)
      self._damaged = []
      checkpoint_folder.begin(self._folder, step)
    except OSError as error:
      raise OSError(self._save_failed(step, error)) from error

  def _finish(self, step: int, meta_text: str) -> None:
    try:
      self._orbax.wait_until_finished()
      if jax.process_index() == 0:
        path = checkpoint_folder.staging(self._folder, step)
        (path / _META).write_text(meta_text, encoding="utf-8")
        checkpoint_folder.finish(self._folder, step, keep=self._keep)
    except Exception as error:
      self._error = error  # of whatever kind: `wait` raises it where it can be acted on

  def _abandon(self, step: int) -> None:
    if jax.process_index() == 0:
      checkpoint_folder.abandon(self._folder, step)

  def _save_failed(self, step: int, error) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
      f"saving checkpoint {step} in {self._folder} failed: {reason};"
      " the checkpoints before it are as they were; make room or name another folder"
    )


def _by_name(tree) -> dict:
  """The tree's leaves under their paths: one flat dict, whatever containers the tree is made of."""
  leaf_by_name = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name in leaf_by_name:
      raise ValueError(f"two leaves are called {name}; rename one")
    leaf_by_name[name] = leaf
  if not leaf_by_name:
    raise ValueError("the tree of arrays has no leaf; expected at least one")
  return leaf_by_name


def _check_saveable(array_by_name: dict) -> None:
  for name, array in array_by_name.items():
    if not isinstance(array, jax.Array):
      raise ValueError(
        f"{name} is a {type(array).__name__}; expected a jax.Array (or put it in meta)"
      )
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
      raise ValueError(f"{name} is a random key; save jax.random.key_data of it")
    if not array.size:
      raise ValueError(f"{name} is {_kind(array)} and so has no elements to save; leave it out")
    if jax.process_count() > 1 and array.is_fully_addressable:
      raise ValueError(f"{name} lies on one process's devices only; place it on the whole mesh")


def _kind(leaf) -> str:
  return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _meta_text(step: int, meta: dict, array_by_name: dict) -> str:
  kind_by_name = {name: _kind(array) for name, array in array_by_name.items()}
  try:
    return json.dumps({"step": step, "meta": meta, "leaves": kind_by_name}, indent=1)
  except TypeError as error:
    raise ValueError(f"meta is not plain JSON: {error}; convert it") from error


def _check_same_model(saved_by_name: dict, wanted_by_name: dict, path: Path) -> None:
  for name in [*wanted_by_name, *saved_by_name]:
    expected = _kind(wanted_by_name[name]) if name in wanted_by_name else "no such leaf"
    got = saved_by_name.get(name, "no such leaf")
    if expected != got:
      raise ValueError(
        f"checkpoint {path} is of another model: {name}: expected {expected}, got {got};"
        " take the config that it was saved with, or another folder"
      )
