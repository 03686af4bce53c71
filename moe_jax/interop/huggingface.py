"""Parameters from Hugging Face's folders of safetensors, and to them.

A folder holds config.json and safetensors files. Tensors pass one by one, so that host memory holds
parts of one tensor at a time, whatever the model's size; every tensor of the folder must be known
and every parameter must be there. Knows parameters, names and files; must not know training.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from moe_jax import config
from moe_jax.interop import architectures, config_json
from moe_jax.interop.architectures import Weight
from moe_jax.interop.safetensors_folder import DTYPES, Reader, Tensor, Writer, listed
from moe_jax.interop.slabs import Part, Slabs
from moe_jax.interop.tokenizer import Tokenizer
from moe_jax.model import transformer
from moe_jax.model.transformer import Parameters

CONFIG, GENERATION = "config.json", "generation_config.json"
_COMPUTE = {"float32": "F32", "bfloat16": "BF16"}


def read_fields(folder: str | Path, name: str = CONFIG) -> dict:
  """Returns the fields of a folder's config.json, or of another file.

  Raises:
    ValueError: it is missing, or not an object in JSON.
  """
  path = Path(folder, name)
  if not path.is_file():
    raise ValueError(f"{path} is missing; name a folder with {name} and safetensors files")
  try:
    fields = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}; fetch it again") from error
  if not isinstance(fields, Mapping):
    raise ValueError(f"{path} is a {type(fields).__name__}; expected an object of fields")
  return dict(fields)


def read_model(folder: str | Path, dtype: str | None = None) -> config.Model:
  """Returns the model in a folder.

  Args:
    dtype: of the computation; by default that of the folder's weights.

  Raises:
    ValueError: this program does not compute that model, or not in that dtype.
  """
  fields = read_fields(folder)
  stored = fields.get("dtype", fields.get("torch_dtype"))
  if dtype is None and stored not in config.DTYPES:
    raise ValueError(
      f"{Path(folder, CONFIG)}: its weights are of dtype {stored!r}, in which this program does not"
      f" compute; choose one of {', '.join(config.DTYPES)}"
    )
  return config_json.model_of(fields, dtype or stored)


def read_end_tokens(folder: str | Path, vocab: int) -> tuple[int, ...]:
  """Returns the tokens each of which ends a text; an imported run's folder keeps them likewise.

  As in transformers, generation_config.json goes before config.json.

  Args:
    vocab: of the folder's model.

  Raises:
    ValueError: a file is not an object in JSON, or names what is no token.
  """
  for name in (GENERATION, CONFIG):
    if Path(folder, name).is_file():
      fields = read_fields(folder, name)
      try:
        found = config_json.end_tokens_of(fields, vocab)
      except ValueError as error:
        raise ValueError(f"{Path(folder, name)}: {error}") from error
      if found:
        return found
  return ()


def load(folder: str | Path, like: Parameters, order: np.ndarray) -> Parameters:
  """Returns a folder's parameters, each tensor read and sent to its devices before the next.

  Args:
    folder: with config.json and safetensors files.
    like: shape, dtype and NamedSharding of every parameter; files may be of another float dtype.
    order: the layer at each place along L, [L].

  Raises:
    ValueError: the folder is of another model than `like`, or tensors are missing, unknown,
      misshaped or of another kind; nothing was put on a device.
    OSError: a file cannot be read.
  """
  folder = Path(folder)
  model = read_model(folder, "float32")
  structs, shapes = _leaves(like), _leaves(_abstract(model))
  _check_same_model(folder, structs, shapes)
  weights = architectures.weights(model, read_fields(folder)["model_type"])
  reader = Reader(folder)
  try:
    _check(folder, reader.tensors, _expected(weights, shapes))
    _check_one_dtype(folder, reader.tensors, weights, shapes)
    found = {w.path: _fill(reader, w, structs[w.path], order) for w in weights}
  finally:
    reader.close()
  return jax.tree_util.tree_map_with_path(lambda path, _: found[_name(path)], like)


def save(
  folder: str | Path,
  parameters: Parameters,
  model: config.Model,
  order: np.ndarray,
  tokenizer: Tokenizer,
  *,
  num_positions: int,
  end_tokens: Sequence[int] = (),
  dtype: str = "float32",
  largest_file_bytes: int = 5 * 10**9,
) -> None:
  """Writes parameters as a folder that transformers loads; it appears whole or not at all.

  Args:
    folder: must not exist yet.
    parameters: on any mesh of this process.
    model: of the parameters.
    order: the layer at each place along L, [L].
    tokenizer: goes to tokenizer.json and tokenizer_config.json.
    num_positions: what config.json says the model was trained for.
    end_tokens: what config.json says ends a text.
    dtype: of the tensors, float32 or bfloat16.
    largest_file_bytes: of one safetensors file, but for a tensor that is larger.

  Raises:
    ValueError: the folder exists or is being written, no architecture of Hugging Face's computes
      the model, or the parameters lie on other processes' devices too.
    OSError: a file cannot be written.
  """
  folder = Path(folder)
  fields = config_json.fields_of(model, dtype, num_positions, end_tokens)
  leaves = _leaves(parameters)
  remote = [path for path, leaf in leaves.items() if not leaf.is_fully_addressable]
  if remote:
    raise ValueError(f"{remote[0]} lies on several processes' devices; export from one process")
  weights = architectures.weights(model, fields["model_type"])
  tensors = {
    name: Tensor(shape, _COMPUTE[dtype])
    for name, shape in sorted(_expected(weights, leaves).items())
  }
  with new_folder(folder) as partial:
    text = json.dumps(fields, indent=2) + "\n"
    (partial / CONFIG).write_text(text, encoding="utf-8")
    tokenizer.export(partial)
    writer = Writer(partial, tensors, largest_file_bytes)
    for weight in weights:
      _take(writer.arrays, weight, leaves[weight.path], order, DTYPES[_COMPUTE[dtype]])
    writer.close()


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
  """Yields an empty folder beside `folder`; it becomes that one, or on any error is removed.

  Raises:
    ValueError: `folder` exists, or the one beside it, which may be another process's.
    OSError: it cannot be made or renamed.
  """
  partial = folder.with_name(f"{folder.name}.partial")
  try:
    partial.mkdir(parents=True)
  except FileExistsError as error:
    raise ValueError(
      f"{partial} exists already: another process writes {folder}, or was killed meanwhile; wait"
      " for it, or remove that folder"
    ) from error
  try:
    if folder.exists():
      raise ValueError(f"{folder} exists already; name a new folder")
    yield partial
    partial.rename(folder)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def _fill(reader: Reader, weight: Weight, struct, order: np.ndarray) -> jax.Array:
  def read(part: Part) -> np.ndarray:
    name = _tensor_name(weight, part, order)
    return _read(reader, name, weight, struct.shape, part)

  return _slabs(weight, struct).fill(read)


def _read(reader: Reader, name: str, weight: Weight, shape, part: Part) -> np.ndarray:
  """Returns a part of a tensor, its merged dimensions apart."""
  slice_by_dimension = dict(zip(_flat(weight), part.slices, strict=True))
  of_file, inner, sizes = [], [], []
  for group in weight.dimensions:
    first, *rest = group
    stride = math.prod(shape[d] for d in rest)
    outer = slice_by_dimension[first]
    of_file.append(slice(outer.start * stride, outer.stop * stride))
    sizes += [outer.stop - outer.start, *(shape[d] for d in rest)]
    inner += [slice(None), *(slice_by_dimension[d] for d in rest)]
  return reader.read(name, of_file).reshape(sizes)[tuple(inner)]


def _take(arrays, weight: Weight, leaf: jax.Array, order: np.ndarray, dtype: np.dtype) -> None:
  for part, values in _slabs(weight, leaf).take(leaf, dtype):
    array = arrays[_tensor_name(weight, part, order)]
    array.reshape([leaf.shape[d] for d in _flat(weight)])[part.slices] = values


def _slabs(weight: Weight, leaf) -> Slabs:
  return Slabs(leaf, weight.counted, _flat(weight))


def _flat(weight: Weight) -> tuple[int, ...]:
  return tuple(d for group in weight.dimensions for d in group)


def _tensor_name(weight: Weight, part: Part, order: np.ndarray) -> str:
  # What a name does not count it does not hold either.
  layer, expert, number = (*part.stacked, *(0, 0, 0)[len(part.stacked) :])
  parts = weight.parts or ("",)
  return weight.name.format(layer=order[layer], expert=expert, part=parts[number])


def _expected(weights: tuple[Weight, ...], leaves: Mapping) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every tensor by its name."""
  found = {}
  for weight in weights:
    shape = leaves[weight.path].shape
    in_file = tuple(math.prod(shape[d] for d in group) for group in weight.dimensions)
    for at in np.ndindex(*(shape[d] for d in weight.counted)):
      found[_tensor_name(weight, Part(at, ()), np.arange(shape[0]))] = in_file
  return found


def _check(folder: Path, tensors: Mapping[str, Tensor], expected: Mapping) -> None:
  missing = [name for name in expected if name not in tensors]
  unknown = [name for name in tensors if name not in expected]
  both = [name for name in expected if name in tensors]
  flaws = [f"lacks {listed(missing)}"] if missing else []
  flaws += [f"has {listed(unknown)} that its model does not"] if unknown else []
  misshaped = [
    f"{name} is {list(tensors[name].shape)}, expected {list(expected[name])}"
    for name in both
    if tensors[name].shape != expected[name]
  ]
  flaws += [f"has other shapes than {CONFIG} says: {listed(misshaped)}"] if misshaped else []
  strange = [
    f"{name} is {tensors[name].dtype}" for name in both if tensors[name].dtype not in DTYPES
  ]
  flaws += [f"has weights that are not {', '.join(DTYPES)}: {listed(strange)}"] if strange else []
  if flaws:
    raise ValueError(f"{folder} {'; '.join(flaws)}; fetch it again, or import another model")


def _check_one_dtype(folder: Path, tensors, weights: tuple[Weight, ...], shapes: Mapping) -> None:
  for weight in weights:
    dtypes = {tensors[name].dtype for name in _expected((weight,), shapes)}
    if len(dtypes) > 1:
      raise ValueError(
        f"{folder}: {weight.name} is of {' and '.join(sorted(dtypes))}; save it in one of them"
      )


def _check_same_model(folder: Path, structs: Mapping, shapes: Mapping) -> None:
  for path in [*shapes, *structs]:
    expected, got = (leaves[path].shape if path in leaves else None for leaves in (structs, shapes))
    if expected != got:
      raise ValueError(
        f"{folder} is of another model: {path} is {got} there, expected {expected}; take the model"
        " that its config.json describes"
      )


def _abstract(model: config.Model) -> Parameters:
  return jax.eval_shape(lambda: transformer.init(jax.random.key(0), model))


def _leaves(parameters: Parameters) -> dict:
  return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(parameters)}


def _name(path) -> str:
  """Returns "layers/attention/query" of a leaf's path, which ends with the nnx.Variable's value."""
  keys = (getattr(key, "name", getattr(key, "key", None)) for key in path[:-1])
  return "/".join(map(str, keys))
