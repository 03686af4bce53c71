"""Takes a model from Hugging Face's format to a run's folder, or a run's newest checkpoint back.

  python -m launch.convert --from=Qwen3-30B-A3B --to=runs/qwen3
  python -m launch.convert --from=runs/laptop --to=laptop-hf --dtype=bfloat16

Reads and writes config.json, tokenizer.json and safetensors of Mixtral, Qwen3-MoE and OLMoE; which
way to go, --from says. The run's folder is like one that launch.train has left after step 0.
"""

import pathlib

from absl import flags, logging

from launch import paths, trained
from launch.flags import run
from moe_jax import config

_FROM = paths.define(
  "from", "folder with a model in Hugging Face's format, or of a run", required=True
)
_TO = paths.define("to", "new folder to write", required=True)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  list(config.DTYPES),
  "of an imported model's computation, by default that of its weights; of the files of an exported"
  " one, by default float32",
)
_MESH = flags.DEFINE_string(
  "mesh", "1x1x1", "devices, expert x tensor x stage, or x data, that hold the model meanwhile"
)
_LARGEST_DEFAULT = 2048
_SEQUENCE = flags.DEFINE_integer(
  "sequence",
  None,
  "train.sequence of an imported run, its window of tokens; by default the model's"
  f" max_position_embeddings, but at most {_LARGEST_DEFAULT}",
  lower_bound=1,
)
_TOKENIZER = flags.DEFINE_enum(
  "tokenizer",
  "imported",
  ["imported", "bytes"],
  "of an imported model: its tokenizer.json, or bytes if its ids are bytes",
)


def main() -> None:
  # orbax logs the traceback of every error that it raises; the error's one line is enough.
  logging.set_verbosity(logging.FATAL)
  source, target = (pathlib.Path(flag.value) for flag in (_FROM, _TO))
  if target.exists():
    raise ValueError(f"--to={target} exists already; name a new folder")
  mesh_sizes = trained.mesh_sizes(_MESH.value)
  # Here and not above: a mistyped flag is answered before jax is imported.
  from moe_jax.interop import huggingface

  fields = huggingface.read_fields(source)
  if "model_type" in fields:
    _import(source, target, mesh_sizes)
  elif "model" in fields:
    _export(source, target, mesh_sizes)
  else:
    raise ValueError(
      f"{source / huggingface.CONFIG} has neither model_type, as Hugging Face's, nor a model"
      " section, as a run's; name another folder"
    )


def _import(source: pathlib.Path, workdir: pathlib.Path, mesh_sizes: config.Mesh) -> None:
  import jax
  import numpy as np

  from moe_jax.interop import huggingface
  from moe_jax.interop.tokenizer import FILE, TOKENIZERS
  from moe_jax.observe.metrics import write_summary
  from moe_jax.train import checkpoint, state

  model = huggingface.read_model(source, _DTYPE.value)
  settings = config.Config(
    model=model,
    mesh=mesh_sizes,
    moe=config.Moe(dispatch="dropless"),  # as it was trained
    train=config.Train(batch=mesh_sizes.sequence_shares, sequence=_sequence(source)),
    data=config.Data(tokenizer=_TOKENIZER.value),
  )
  if _TOKENIZER.value == "imported" and not (source / FILE).is_file():
    raise ValueError(
      f"{source} has no {FILE}; fetch it from where the weights are from, or choose"
      " --tokenizer=bytes if their ids are bytes"
    )
  tokenizer = TOKENIZERS[_TOKENIZER.value].load(source, model.vocab)
  end_tokens = huggingface.read_end_tokens(source, model.vocab)
  abstract, shardings, optimizer = _abstract(settings)
  parameters = huggingface.load(source, abstract.parameters, np.arange(model.layers))
  zero = np.int32(0)
  begin = lambda parameters: state.State(zero, parameters, optimizer.init(parameters), zero, zero)
  whole = jax.jit(begin, out_shardings=shardings, donate_argnums=0)(parameters)
  train = settings.train
  meta = {
    "config": config.as_dict(settings),
    # As train.data.Dataset.state keeps it; of the text that it was trained on nothing is known.
    "data": {
      "next_step": 0, "fingerprint": "", "tokenizer": tokenizer.identity, "seed": train.seed,
      "batch": train.batch, "sequence": train.sequence,
    },
    "train_seconds": 0.0,
  }  # fmt: skip
  with huggingface.new_folder(workdir) as partial:
    tokenizer.save(partial)
    write_summary(partial / huggingface.CONFIG, config.as_dict(settings))
    write_summary(partial / huggingface.GENERATION, {"eos_token_id": list(end_tokens)})
    checkpoints = checkpoint.Checkpoints(partial / "checkpoints", keep=1, report=print)
    try:
      checkpoints.save(0, state.by_name(whole), meta)
    finally:
      checkpoints.close()
  print(f"imported {_size(whole.parameters)} from {source} to {workdir}, checkpoint 0")


def _sequence(source: pathlib.Path) -> int:
  """Returns the window of an imported run; ValueError if its model was trained for less."""
  from moe_jax.interop import config_json, huggingface

  fields = huggingface.read_fields(source)
  most = config_json.num_positions_of(fields, _LARGEST_DEFAULT)
  if _SEQUENCE.value is None:
    return min(most, _LARGEST_DEFAULT)
  if _SEQUENCE.value > most:
    raise ValueError(
      f"--sequence={_SEQUENCE.value} is past what the model was trained for,"
      f" max_position_embeddings={most} of {source / huggingface.CONFIG} ({_LARGEST_DEFAULT} where"
      f" it has none); choose at most {most}"
    )
  return _SEQUENCE.value


def _export(workdir: pathlib.Path, target: pathlib.Path, mesh_sizes: config.Mesh) -> None:
  import numpy as np

  from moe_jax.interop import huggingface

  hosts = trained.saved(workdir).router_hosts
  if hosts > 1:
    raise ValueError(
      f"{workdir} was trained with moe.hosts_per_token, some of {hosts} hosts for each token, which"
      " Hugging Face's format cannot say: the exported model would choose other experts; train on"
      " without it before you export"
    )
  settings, window = trained.settings_of(workdir, mesh_sizes, config.Serve())
  model = trained.load(workdir, settings)
  huggingface.save(
    target, model.parameters, settings.model, np.arange(settings.model.layers), model.tokenizer,
    num_positions=window, end_tokens=model.end_tokens, dtype=_DTYPE.value or "float32",
  )  # fmt: skip
  print(f"exported {_size(model.parameters)}, checkpoint {model.step} of {workdir}, to {target}")


def _abstract(settings: config.Config):
  """Returns shapes and shardings of a run's state on disk, the shardings alone, the optimizer."""
  import jax

  from moe_jax.parallel import mesh
  from moe_jax.train import optimizer, state

  made = optimizer.make(settings.train)
  devices = jax.devices()[: settings.mesh.num_devices]
  shardings = state.shardings(settings, mesh.make(settings.mesh, devices), made)
  struct = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  shapes = state.abstract(settings.model, made)
  return jax.tree.map(struct, shapes, shardings), shardings, made


def _size(parameters) -> str:
  import jax

  return f"{sum(leaf.size for leaf in jax.tree.leaves(parameters)):,} parameters"


if __name__ == "__main__":
  run(main, config=False, devices=True)
