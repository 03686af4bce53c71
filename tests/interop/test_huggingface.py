"""Folders of safetensors: what they hold there and back, host memory meanwhile, and bad ones."""

import dataclasses
import errno
import gc
import json
import os
import tracemalloc
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import numpy as safetensors

from moe_jax import config
from moe_jax.interop import huggingface, tokenizer
from moe_jax.interop.safetensors_folder import Reader
from moe_jax.model import transformer
from moe_jax.parallel import mesh as mesh_lib

SMALL = config.Model(
  layers=2, d_model=16, heads=4, kv_heads=2, head_dim=4, experts=4, experts_per_token=2,
  expert_hidden=8, vocab=32, dtype="float32",
)  # fmt: skip


def like(model, mesh, dtype=None):
  """Returns the structs of a model's parameters on a mesh."""
  shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), model))
  struct = lambda leaf, spec: jax.ShapeDtypeStruct(
    leaf.shape, dtype or leaf.dtype, sharding=NamedSharding(mesh, spec)
  )
  return jax.tree.map(struct, shapes, transformer.specs(model))


def on_one_device():
  return mesh_lib.make(config.Mesh(), jax.devices()[:1])


@pytest.fixture
def ours(tmp_path):
  """A folder of SMALL that we wrote, in one file; and what its weights are."""
  parameters = random_parameters(like(SMALL, on_one_device()))
  folder = tmp_path / "ours"
  huggingface.save(
    folder, parameters, SMALL, np.arange(SMALL.layers), tokenizer.Bytes(), num_positions=64
  )
  return types.SimpleNamespace(folder=folder, parameters=parameters)


def random_parameters(structs):
  random = np.random.default_rng(0)
  draw = lambda struct: random.normal(size=struct.shape).astype(struct.dtype)
  return jax.tree.map(lambda struct: jax.device_put(draw(struct), struct.sharding), structs)


def load(folder, model=SMALL, mesh=None):
  return huggingface.load(folder, like(model, mesh or on_one_device()), np.arange(model.layers))


def test_half_precision_files_give_and_take_rounded_weights(ours, tmp_path):
  folder = tmp_path / "half"
  huggingface.save(
    folder, ours.parameters, SMALL, np.arange(2), tokenizer.Bytes(), num_positions=64,
    dtype="bfloat16",
  )  # fmt: skip
  assert huggingface.read_model(folder).dtype == "bfloat16"
  assert huggingface.read_model(folder, "float32").dtype == "float32"
  found = load(folder)
  for leaf, whole in zip(jax.tree.leaves(found), jax.tree.leaves(ours.parameters), strict=True):
    assert leaf.dtype == jnp.float32
    np.testing.assert_array_equal(leaf, whole.astype(jnp.bfloat16).astype(jnp.float32))
  half = huggingface.load(folder, like(SMALL, on_one_device(), jnp.bfloat16), np.arange(2))
  assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


def test_weights_split_over_more_axes_come_and_go(ours, tmp_path):
  """As ZeRO-1 may split them: widths of heads too, which files keep together with heads."""
  mesh = mesh_lib.make(config.Mesh(expert=2, tensor=2, stage=2))
  structs = like(SMALL, mesh)

  def split(path, struct):
    name = jax.tree_util.keystr(path)
    entries = {
      "['query']": P("stage", None, "tensor", "expert"),
      "['out']": P("stage", "tensor", "expert", None),
      "['attention_norm']": P("stage", ("tensor", "expert")),
    }
    spec = next((spec for part, spec in entries.items() if part in name), struct.sharding.spec)
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=NamedSharding(mesh, spec))

  structs = jax.tree_util.tree_map_with_path(split, structs)
  order = np.array([1, 0])
  found = huggingface.load(ours.folder, structs, order)
  for leaf, struct in zip(jax.tree.leaves(found), jax.tree.leaves(structs), strict=True):
    assert leaf.sharding == struct.sharding
  placed = jax.tree.map(lambda leaf: leaf[order], ours.parameters.layers)
  for leaf, expected in zip(jax.tree.leaves(found.layers), jax.tree.leaves(placed), strict=True):
    np.testing.assert_array_equal(leaf, expected)
  huggingface.save(tmp_path / "back", found, SMALL, order, tokenizer.Bytes(), num_positions=64)
  same_tensors(tmp_path / "back", ours.folder)


def same_tensors(folder, other):
  found, expected = (safetensors.load_file(f / "model.safetensors") for f in (folder, other))
  assert set(found) == set(expected)
  for name, values in expected.items():
    np.testing.assert_array_equal(found[name], values, err_msg=name)


class Alive:
  """What a Reader gave out that is still in memory and is no device's buffer.

  A CPU device takes a host's array as its own where it lies at a multiple of 64 bytes: then it is
  the device's memory.
  """

  def __init__(self, read):
    self._read, self._given = read, []
    self.most_bytes = 0

  def __call__(self, reader, name, part):
    of_devices = {
      shard.data.unsafe_buffer_pointer()
      for array in jax.live_arrays()
      for shard in array.addressable_shards
    }
    self._given = [ref for ref in self._given if ref() is not None]
    kept = [ref() for ref in self._given if ref().ctypes.data not in of_devices]
    array = self._read(reader, name, part)
    self.most_bytes = max(self.most_bytes, array.nbytes + sum(each.nbytes for each in kept))
    root = array
    while isinstance(root.base, np.ndarray):
      root = root.base
    self._given.append(weakref.ref(root))
    return array


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 2)], ids=["1x1x1", "2x1x2"])
def test_host_memory_stays_under_twice_the_largest_tensor(mesh, tmp_path, monkeypatch):
  model = dataclasses.replace(SMALL, d_model=512, expert_hidden=2048)
  sizes = config.Mesh(*mesh)
  structs = like(model, mesh_lib.make(sizes, jax.devices()[: sizes.num_devices]))
  ones = jax.tree.map(
    lambda s: jax.jit(lambda: jnp.ones(s.shape, s.dtype), out_shardings=s.sharding)(), structs
  )
  largest = 4 * model.d_model * model.expert_hidden
  total = sum(leaf.nbytes for leaf in jax.tree.leaves(ones))
  assert total > 20 * largest
  order, folder = np.arange(model.layers), tmp_path / "large"
  save = lambda: huggingface.save(folder, ones, model, order, tokenizer.Bytes(), num_positions=64)
  assert peak_bytes(save) < 2 * largest
  assert sum(path.stat().st_size for path in folder.iterdir()) > total

  alive = Alive(Reader.read)
  monkeypatch.setattr(Reader, "read", lambda *arguments: alive(*arguments))
  huggingface.load(folder, structs, order)
  assert largest <= alive.most_bytes < 2 * largest


def test_reading_takes_the_memory_of_what_is_read_alone(tmp_path):
  values = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)
  safetensors.save_file({"values": values}, tmp_path / "model.safetensors")
  reader = Reader(tmp_path)
  kept = []
  for part in ((slice(0, 1024), slice(0, 1024)), (slice(256, 512), slice(128, 640))):
    assert peak_bytes(lambda part=part: kept.append(reader.read("values", part))) < (
      1.1 * values[part].nbytes
    )
    np.testing.assert_array_equal(kept[-1], values[part])
  # The measure sees what it should: a whole file for a part.
  whole = lambda: safetensors.load_file(tmp_path / "model.safetensors")["values"][part]
  assert peak_bytes(whole) >= values.nbytes


def peak_bytes(call) -> int:
  """Returns the most that numpy and Python hold during a call, beyond what they held before."""
  gc.collect()
  tracemalloc.start()
  try:
    before = tracemalloc.get_traced_memory()[0]
    kept = call()
    del kept
    return tracemalloc.get_traced_memory()[1] - before
  finally:
    tracemalloc.stop()


def change(tensors, **changes):
  """Returns tensors with some replaced, added or (None) left out; `__` stands for a dot."""
  found = dict(tensors)
  for name, values in changes.items():
    found[name.replace("__", ".")] = values
  return {name: values for name, values in found.items() if values is not None}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"model__norm__weight": None, "lm_head__weight": None},
      r"lacks 2 tensors \(model\.norm\.weight, lm_head\.weight\)",
    ),
    (
      {"model__layers__0__self_attn__q_norm__weight": np.ones(4, np.float32)},
      r"has 1 tensor \(model\.layers\.0\.self_attn\.q_norm\.weight\) that its model does not",
    ),
    (
      {"model__norm__weight": np.ones(17, np.float32)},
      r"other shapes .*1 tensor \(model\.norm\.weight is \[17\], expected \[16\]\)",
    ),
    (
      {"model__norm__weight": np.ones(16, np.int8)},
      r"not F32, BF16, F16: 1 tensor \(model\.norm\.weight is I8\)",
    ),
    (
      {"model__layers__1__input_layernorm__weight": np.ones(16, np.float16)},
      r"input_layernorm\.weight is of F16 and F32; save it in one",
    ),
    (
      {"model__norm__weight": None, "model__strange__weight": np.ones(16, np.float32)},
      r"lacks 1 tensor \(model\.norm.*; has 1 tensor \(model\.strange",
    ),
  ],
)
def test_what_does_not_fit_is_listed(ours, changes, message):
  path = ours.folder / "model.safetensors"
  tensors = change(safetensors.load_file(path), **changes)
  safetensors.save_file(tensors, path)
  refused(lambda: load(ours.folder), message)


def test_many_missing_tensors_are_counted(ours):
  path = ours.folder / "model.safetensors"
  tensors = safetensors.load_file(path)
  kept = {name: values for name, values in tensors.items() if "experts" not in name}
  safetensors.save_file(kept, path)
  refused(lambda: load(ours.folder), r"lacks 24 tensors \(model\.layers.* and 16 more\)")


def refused(call, message):
  with pytest.raises(ValueError, match=message) as caught:
    call()
  assert "\n" not in str(caught.value)


def test_a_folder_of_another_model_is_refused(ours):
  wider = dataclasses.replace(SMALL, d_model=32)
  refused(
    lambda: load(ours.folder, wider),
    r"is of another model: layers/.* is \(2, 16.*\) there, expected \(2, 32",
  )
  normed = dataclasses.replace(SMALL, qk_norm="head")
  refused(lambda: load(ours.folder, normed), r"of another model: .*_norm/scale is None there")


def damage(name):
  """Returns the damage of that name, done to a folder of several files."""

  def truncated(folder, files, index):
    files[0].write_bytes(files[0].read_bytes()[:-4])

  def no_file(folder, files, index):
    files[0].unlink()

  def wrong_place(folder, files, index):
    index["weight_map"]["model.norm.weight"] = files[0].name

  def not_in_index(folder, files, index):
    del index["weight_map"]["model.norm.weight"]

  def outside(folder, files, index):
    index["weight_map"]["model.norm.weight"] = "../other.safetensors"

  def no_map(folder, files, index):
    del index["weight_map"]

  def both(folder, files, index):
    (folder / "model.safetensors").write_bytes(files[0].read_bytes())

  return locals()[name]


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("truncated", r"model-00001-of-0000\d\.safetensors is damaged: .*; fetch it again"),
    ("no_file", r"model-00001-of-0000\d\.safetensors is missing, though .* names it"),
    ("wrong_place", r"disagrees with the files about 1 tensor \(model\.norm\.weight\)"),
    ("not_in_index", r"disagrees with the files about 1 tensor \(model\.norm\.weight\)"),
    ("outside", r"names files outside of its folder"),
    ("no_map", r"is not an index of safetensors files: KeyError\('weight_map'\)"),
    ("both", r"holds both model\.safetensors and model\.safetensors\.index\.json"),
  ],
)
def test_a_damaged_folder_is_refused(ours, name, message, tmp_path):
  folder = tmp_path / "several"
  huggingface.save(
    folder, ours.parameters, SMALL, np.arange(2), tokenizer.Bytes(), num_positions=64,
    largest_file_bytes=8_000,
  )  # fmt: skip
  load(folder)
  path = folder / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  damage(name)(folder, sorted(folder.glob("*.safetensors")), index)
  path.write_text(json.dumps(index))
  refused(lambda: load(folder), message)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (None, r"config\.json is missing; name a folder"),
    ("{", r"config\.json is not JSON"),
    ("[]", r"config\.json is a list; expected an object"),
  ],
)
def test_a_folder_without_a_config_is_refused(text, message, tmp_path):
  if text is not None:
    (tmp_path / "config.json").write_text(text)
  refused(lambda: huggingface.read_model(tmp_path), message)


def test_what_ends_a_text_is_read_as_transformers_does(tmp_path):
  read = lambda: huggingface.read_end_tokens(tmp_path, 32)
  write = lambda name, tokens: (tmp_path / name).write_text(json.dumps({"eos_token_id": tokens}))
  assert read() == ()
  write("config.json", 2)
  assert read() == (2,)
  write("generation_config.json", None)
  assert read() == (2,)
  write("generation_config.json", [3, 2])
  assert read() == (3, 2)
  write("generation_config.json", 32)
  refused(read, r"generation_config.json: eos_token_id=32 is neither a token from 0 to 31 nor")


def test_a_folder_without_tensors_is_refused(ours):
  (ours.folder / "model.safetensors").unlink()
  refused(lambda: load(ours.folder), r"holds neither model\.safetensors and|holds neither")


def test_weights_in_a_dtype_that_we_do_not_compute_in_need_a_choice(ours):
  path = ours.folder / "config.json"
  fields = json.loads(path.read_text())
  path.write_text(json.dumps({**fields, "dtype": "float16"}))
  refused(
    lambda: huggingface.read_model(ours.folder), r"dtype 'float16', in which .* choose one of"
  )
  assert huggingface.read_model(ours.folder, "bfloat16").dtype == "bfloat16"


def test_an_export_is_whole_or_not_there(ours, tmp_path):
  refused(save_of(ours, ours.folder), "ours exists already; name a new folder")
  nobodys = dataclasses.replace(SMALL, normalize_choices=False)
  target = tmp_path / "new"
  refused(
    lambda: huggingface.save(
      target, ours.parameters, nobodys, np.arange(2), tokenizer.Bytes(), num_positions=64
    ),
    "no architecture of Hugging Face's computes this model",
  )
  assert [path.name for path in tmp_path.iterdir()] == ["ours"]
  assert {path.name for path in ours.folder.iterdir()} == {
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
  }  # fmt: skip


def save_of(ours, folder):
  return lambda: huggingface.save(
    folder, ours.parameters, SMALL, np.arange(2), tokenizer.Bytes(), num_positions=64
  )


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this platform cannot make room")
def test_an_export_to_a_full_disk_leaves_nothing(ours, tmp_path, monkeypatch):
  """Room is made before a map is written to: there a full disk is a signal and no error."""

  def full(file, offset, num_bytes):
    assert (offset, num_bytes) == (0, (ours.folder / "model.safetensors").stat().st_size)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, "posix_fallocate", full)
  with pytest.raises(OSError, match="No space left") as caught:
    save_of(ours, tmp_path / "new")()
  assert caught.value.errno == errno.ENOSPC
  assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_an_export_without_a_way_to_make_room(ours, tmp_path, monkeypatch):
  monkeypatch.delattr(os, "posix_fallocate", raising=False)
  save_of(ours, tmp_path / "new")()
  same_tensors(tmp_path / "new", ours.folder)


def test_an_export_leaves_another_process_its_files(ours, tmp_path):
  theirs = tmp_path / "new.partial"
  theirs.mkdir()
  (theirs / "config.json").write_text("theirs")
  refused(save_of(ours, tmp_path / "new"), r"new\.partial exists already: another process writes")
  assert (theirs / "config.json").read_text() == "theirs"
  assert not (tmp_path / "new").exists()
