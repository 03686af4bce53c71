"""A folder of safetensors files: what it holds, parts of its tensors, and how to write one.

`model.safetensors` alone, or several files and `model.safetensors.index.json`, which says what lies
where. A reader gives parts of tensors and a writer gives their places in its files to fill, so that
host memory holds what the caller holds. Knows files, names and shapes; must not know models.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Types of weights as safetensors names them. numpy has no bfloat16; ml_dtypes comes with jax.
DTYPES = {
  "F32": np.dtype(np.float32),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F16": np.dtype(np.float16),
}


class Tensor(NamedTuple):
  """A tensor as its file describes it; `dtype` is a key of DTYPES, or a type that has none."""

  shape: tuple[int, ...]
  dtype: str


class Reader:
  """The tensors of a folder, open until `close`.

  Attributes:
    tensors: every tensor of every file by its name.
  """

  def __init__(self, folder: Path):
    """Opens every file and reads its header.

    Raises:
      ValueError: the folder holds no safetensors, or files and index disagree or are damaged.
      OSError: a file cannot be read.
    """
    self._folder = folder
    file_by_name = _index(folder)
    names = sorted(set(file_by_name.values())) if file_by_name else [SINGLE]
    self._files = {name: _open(folder / name) for name in names}
    self._file_by_tensor = {}
    self.tensors: dict[str, Tensor] = {}
    for file_name, file in self._files.items():
      for name in sorted(file.keys()):
        if name in self.tensors:
          raise ValueError(f"{folder} holds {name} twice; leave out one of its files")
        part = file.get_slice(name)
        self.tensors[name] = Tensor(tuple(part.get_shape()), part.get_dtype())
        self._file_by_tensor[name] = file_name
    misplaced = [name for name, at in file_by_name.items() if self._file_by_tensor.get(name) != at]
    misplaced += sorted(set(self._file_by_tensor) - set(file_by_name)) if file_by_name else []
    if misplaced:
      raise ValueError(f"{folder / INDEX} disagrees with the files about {listed(misplaced)}")

  def read(self, name: str, part: Sequence[slice]) -> np.ndarray:
    """Returns a part of a tensor, in the file's dtype: the only copy in memory."""
    return self._files[self._file_by_tensor[name]].get_slice(name)[tuple(part)]

  def close(self) -> None:
    """Closes the files; what was read stays."""
    self._files.clear()


class Writer:
  """The files of an empty folder, made at once, for arrays to be filled in any order.

  The package's own `save_file` takes all tensors of a file at once, so headers are written here.

  Attributes:
    arrays: by name, the array of each tensor: its place in its file.
  """

  def __init__(self, folder: Path, tensors: Mapping[str, Tensor], largest_file_bytes: int):
    """Writes headers and, for several files, the index.

    Args:
      folder: exists and is empty.
      tensors: what to write, in this order.
      largest_file_bytes: of the tensors in a file, but for a single tensor that is larger.

    Raises:
      OSError: a file cannot be written.
    """
    files = _split(tensors, largest_file_bytes)
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    names = names if len(files) > 1 else [SINGLE]
    self._maps, self.arrays = [], {}
    for file_name, in_file in zip(names, files, strict=True):
      self._add_file(folder / file_name, {name: tensors[name] for name in in_file})
    if len(files) > 1:
      weight_map = {
        name: file for file, in_file in zip(names, files, strict=True) for name in in_file
      }
      total_bytes = sum(map(_num_bytes, tensors.values()))
      index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
      (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

  def close(self) -> None:
    """Returns once what the arrays hold is on disk.

    Raises:
      OSError: it cannot be written.
    """
    for whole in self._maps:
      whole.flush()

  def _add_file(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
    header = _header(tensors)
    with path.open("xb") as file:
      _allocate(file, len(header) + sum(map(_num_bytes, tensors.values())))
      file.write(header)
    whole = np.memmap(path, np.uint8, "r+")
    self._maps.append(whole)
    begin = len(header)
    for name, tensor in tensors.items():
      end = begin + _num_bytes(tensor)
      self.arrays[name] = whole[begin:end].view(DTYPES[tensor.dtype]).reshape(tensor.shape)
      begin = end


def listed(names: Sequence[str], most: int = 8) -> str:
  """Returns how many names there are, and the first of them, for one line."""
  more = f" and {len(names) - most:,} more" if len(names) > most else ""
  return f"{len(names):,} tensor{'s' * (len(names) != 1)} ({', '.join(names[:most])}{more})"


def _index(folder: Path) -> dict[str, str]:
  """Returns the file of each tensor as the index says; nothing where there is no index."""
  if not folder.is_dir():
    raise ValueError(f"{folder} is not a folder; name one with config.json and {SINGLE}")
  path = folder / INDEX
  found = [name for name in (SINGLE, INDEX) if (folder / name).exists()]
  if len(found) != 1:
    reason = "both" if found else "neither"
    raise ValueError(f"{folder} holds {reason} {SINGLE} and {INDEX}; expected one of them")
  if found == [SINGLE]:
    return {}
  try:
    weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    is_sound = all(Path(name).name == name for name in weight_map.values()) and weight_map
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{path} is not an index of safetensors files: {error!r}") from error
  if not is_sound:
    raise ValueError(f"{path} names files outside of its folder, or none; fetch it again")
  return weight_map


def _open(path: Path):
  if not path.is_file():
    raise ValueError(f"{path} is missing, though {INDEX} names it; fetch it again")
  try:
    return safetensors.safe_open(path, framework="numpy")
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path} is damaged: {error}; fetch it again") from error


def _allocate(file: BinaryIO, num_bytes: int) -> None:
  """Gives an empty file its size, and room on disk where the platform can.

  A write through a map of the file that finds no room ends the process by SIGBUS; this raises
  OSError.
  """
  if hasattr(os, "posix_fallocate"):
    os.posix_fallocate(file.fileno(), 0, num_bytes)
  else:
    file.truncate(num_bytes)


def _split(tensors: Mapping[str, Tensor], largest_file_bytes: int) -> list[list[str]]:
  files, room = [[]], largest_file_bytes
  for name, tensor in tensors.items():
    if files[-1] and _num_bytes(tensor) > room:
      files.append([])
      room = largest_file_bytes
    files[-1].append(name)
    room -= _num_bytes(tensor)
  return files


def _header(tensors: Mapping[str, Tensor]) -> bytes:
  """Returns what precedes the tensors' bytes.

  Source: https://huggingface.co/docs/safetensors, section "Format".
  """
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, tensor in tensors.items():
    begin, end = end, end + _num_bytes(tensor)
    header[name] = {
      "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end],
    }  # fmt: skip
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
  return len(text).to_bytes(8, "little") + text


def _num_bytes(tensor: Tensor) -> int:
  return math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
