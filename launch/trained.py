"""The model that a run's folder holds: its config, its tokenizer and its newest checkpoint.

For the programs that serve it, on any mesh that fits. It must not know how text is made.
"""

import dataclasses
import json
import pathlib
import re
from typing import Any, NamedTuple

from moe_jax import config

_SECTIONS = ("model", "mesh", "moe", "train", "data")


class Trained(NamedTuple):
  """A model to serve.

  Attributes:
    settings: as it was trained, on the mesh asked for.
    mesh: of live devices.
    tokenizer: of its text.
    end_tokens: each ends a text.
    parameters: master weights, layers in logical order, as a schedule without chunks takes them.
    step: of the checkpoint.
  """

  settings: config.Config
  mesh: Any
  tokenizer: Any
  end_tokens: tuple[int, ...]
  parameters: Any
  step: int


def saved(workdir: pathlib.Path) -> config.Config:
  """Returns the Config of a run, without what a model does not depend on.

  Raises:
    ValueError: the folder is not one of a run.
  """
  path = workdir / "config.json"
  if not path.is_file():
    raise ValueError(f"{path} is missing; name the folder of a run of launch.train")
  try:
    fields = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  missing = [name for name in _SECTIONS if not isinstance(fields, dict) or name not in fields]
  if missing:
    raise ValueError(
      f"{path} has no {missing[0]} section; name the folder of a run of launch.train"
    )
  return config.from_mapping({name: fields[name] for name in _SECTIONS})


def settings_of(
  workdir: pathlib.Path, mesh_sizes: config.Mesh, serve: config.Serve
) -> tuple[config.Config, int]:
  """Returns the Config of a run on another mesh, without chunks, and its window in tokens.

  Raises:
    ValueError: the folder is not one of a run, or the model does not fit the mesh.
  """
  trained = saved(workdir)
  # Of another mesh only the model must fit: nothing is trained.
  train = dataclasses.replace(
    trained.train, batch=mesh_sizes.sequence_shares, sequence=mesh_sizes.tensor
  )
  # Which hosts a token may choose is the model's; the rest of `moe` is of training.
  router = trained.moe_on(mesh_sizes)
  moe = config.Moe(
    hosts_per_token=router.hosts_per_token, expert_ranks_per_host=router.expert_ranks_per_host
  )
  settings = config.Config(
    model=trained.model, mesh=mesh_sizes, moe=moe, train=train, data=trained.data, serve=serve
  )
  return settings, trained.train.sequence


def load(workdir: pathlib.Path, settings: config.Config) -> Trained:
  """Returns the newest intact checkpoint of a run on the mesh of `settings`.

  Raises:
    ValueError: there is none, every one is damaged, a file beside them is, or the mesh does not fit
      the devices.
    OSError: a file cannot be read.
  """
  import jax

  from moe_jax.interop import huggingface
  from moe_jax.interop.tokenizer import TOKENIZERS
  from moe_jax.parallel import mesh as mesh_lib
  from moe_jax.train import checkpoint, optimizer, state

  devices = jax.devices()[: settings.mesh.num_devices]
  mesh = mesh_lib.make(settings.mesh, devices)
  tokenizer = TOKENIZERS[settings.data.tokenizer].load(workdir, settings.model.vocab)
  end_tokens = huggingface.read_end_tokens(workdir, settings.model.vocab)
  made = optimizer.make(settings.train)
  struct = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
  abstract = jax.tree.map(
    struct, state.abstract(settings.model, made), state.shardings(settings, mesh, made)
  )
  checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep=1, report=print)
  try:
    found = checkpoints.restore(state.by_name(abstract))
  finally:
    checkpoints.close()
  if found is None:
    raise ValueError(f"{workdir} holds no checkpoint; name the folder of a run that has saved one")
  step, leaves, _ = found
  parameters = state.from_names(abstract, leaves).parameters
  return Trained(settings, mesh, tokenizer, end_tokens, parameters, step)


def mesh_sizes(text: str) -> config.Mesh:
  """Returns the mesh that a flag such as 2x4x1 names: expert x tensor x stage, and x data where
  there are copies.

  Raises:
    ValueError: it is not of that form.
  """
  if not re.fullmatch(r"\d+(x\d+){2,3}", text):
    raise ValueError(f"--mesh={text} is not expert x tensor x stage, such as 2x4x1")
  return config.Mesh(*map(int, text.split("x")))
