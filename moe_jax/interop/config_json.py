"""config.json of Hugging Face's models to config.Model and back.

Reading is strict: a field that is neither in the architecture's table nor known to change nothing
is refused, for it may change the model. Knows fields; must not know tensors or files.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from moe_jax import config
from moe_jax.interop.architectures import ARCHITECTURES, Architecture

# Other names of a field.
_ALIASES = {"num_local_experts": "num_experts"}
# They name, train or store the model, or speak of layers that it does not have; its logits are the
# same whatever they say.
_WITHOUT_EFFECT = frozenset(
  {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "intermediate_size", "max_position_embeddings", "max_window_layers", "model_type",
    "output_router_logits", "pad_token_id", "rope_parameters", "rope_scaling", "rope_theta",
    "router_aux_loss_coef", "torch_dtype", "transformers_version", "use_cache",
  }
)  # fmt: skip


def model_of(fields: Mapping, dtype: str) -> config.Model:
  """Returns the model that a config.json describes.

  Args:
    fields: of the file.
    dtype: of the computation, which is ours to choose.

  Raises:
    ValueError: another architecture, or a field that is missing, unknown, of a wrong type or set to
      what this program does not compute.
  """
  kind, architecture = _architecture_of(fields)
  fields = _without_aliases(fields, architecture)
  unknown = set(fields) - {*architecture.fields, *architecture.required, *_WITHOUT_EFFECT}
  if unknown:
    raise ValueError(
      f"config.json of {kind} has fields that this program does not know, so they may change the"
      f" model: {', '.join(sorted(unknown))}; import a model without them"
    )
  for name, expected in architecture.required.items():
    if fields.get(name, expected) != expected:
      raise ValueError(
        f"config.json: {name}={fields[name]!r} is not supported; this program computes {kind} with"
        f" {name}={expected!r}"
      )
  values = {**architecture.implied, "rope_theta": _rope_theta(fields), "dtype": dtype}
  given = {**architecture.defaults, **fields}
  missing = [name for name in architecture.fields if name not in given]
  if missing:
    raise ValueError(f"config.json of {kind} lacks {', '.join(missing)}")
  values |= {ours: given[name] for name, ours in architecture.fields.items()}
  _derive(values)
  # "imported", for the vocabulary need not hold bytes.
  whole = config.from_mapping({"model": values, "data": {"tokenizer": "imported"}})
  return whole.model


def end_tokens_of(fields: Mapping, vocab: int) -> tuple[int, ...]:
  """Returns the tokens each of which ends a text; none where the fields name none.

  Args:
    fields: of config.json or generation_config.json.
    vocab: of the model.

  Raises:
    ValueError: what is named is no token of the model.
  """
  named = fields.get("eos_token_id")
  if named is None:
    return ()
  found = named if isinstance(named, list) else [named]
  if not all(type(token) is int and 0 <= token < vocab for token in found):
    raise ValueError(
      f"eos_token_id={named!r} is neither a token from 0 to {vocab - 1} nor a list of those;"
      " correct it, or use null for none"
    )
  return tuple(found)


def num_positions_of(fields: Mapping, default: int) -> int:
  """Returns how many positions a model was trained for; the default where the fields do not say.

  Args:
    fields: of config.json.

  Raises:
    ValueError: what they say is no number of positions.
  """
  found = fields.get("max_position_embeddings", default)
  if type(found) is not int or found < 1:
    raise ValueError(
      f"config.json: max_position_embeddings={found!r} is not a whole number above 0; correct it,"
      " or leave it out"
    )
  return found


def fields_of(
  model: config.Model, dtype: str, num_positions: int, end_tokens: Sequence[int] = ()
) -> dict:
  """Returns the config.json of a model.

  Args:
    dtype: of the weights in the files.
    num_positions: that the model was trained for; Hugging Face keeps it as a hint.
    end_tokens: each ends a text.

  Raises:
    ValueError: no architecture computes what this model does.
  """
  kind = kind_of(model)
  architecture = ARCHITECTURES[kind]
  values = _as_dict(model)
  fields = {name: values[ours] for name, ours in architecture.fields.items()}
  return {
    "architectures": [architecture.class_name],
    "model_type": kind,
    "dtype": dtype,
    **fields,
    **architecture.required,
    "rope_theta": model.rope_theta,
    "rope_scaling": None,
    "max_position_embeddings": num_positions,
    "bos_token_id": None,
    "eos_token_id": list(end_tokens) if len(end_tokens) > 1 else next(iter(end_tokens), None),
    "pad_token_id": None,
  }


def kind_of(model: config.Model) -> str:
  """Returns the `model_type` of the architecture that computes what this model does.

  Raises:
    ValueError: none does.
  """
  values = _as_dict(model)
  reasons = []
  for kind, architecture in ARCHITECTURES.items():
    wrong = [name for name, value in architecture.implied.items() if values[name] != value]
    if "head_dim" not in architecture.fields and model.heads * model.head_dim != model.d_model:
      wrong.append("head_dim")
    if not wrong:
      return kind
    reasons.append(f"{kind} has another {wrong[0]}")
  raise ValueError(
    f"no architecture of Hugging Face's computes this model: {', '.join(reasons)}; it has"
    f" model.qk_norm={model.qk_norm}, normalize_choices={model.normalize_choices},"
    f" clip_qkv={model.clip_qkv}, router_bias={model.router_bias},"
    f" heads x head_dim={model.heads} x {model.head_dim}"
  )


def _architecture_of(fields: Mapping) -> tuple[str, Architecture]:
  kind = fields.get("model_type")
  if not isinstance(kind, str) or kind not in ARCHITECTURES:
    raise ValueError(
      f"config.json: model_type={kind!r} is not supported; this program reads"
      f" {', '.join(ARCHITECTURES)}"
    )
  architecture = ARCHITECTURES[kind]
  if fields.get("architectures", [architecture.class_name]) != [architecture.class_name]:
    raise ValueError(
      f"config.json: architectures={fields['architectures']!r} is not supported; this program reads"
      f" {architecture.class_name}"
    )
  return kind, architecture


def _without_aliases(fields: Mapping, architecture: Architecture) -> dict:
  known = {}
  for name, value in fields.items():
    alias = _ALIASES.get(name)
    canonical = alias if alias in architecture.fields and name not in architecture.fields else name
    if canonical in known and known[canonical] != value:
      raise ValueError(
        f"config.json has {canonical}={known[canonical]!r} and {name}={value!r}; leave out one"
      )
    known[canonical] = value
  if known.get("use_sliding_window") is False:
    known.pop("sliding_window", None)  # transformers does not look at it
  return known


def _rope_theta(fields: Mapping) -> float | None:
  """Returns the base of the rotary positions; transformers 5 keeps it in `rope_parameters`."""
  scaling, parameters = fields.get("rope_scaling"), fields.get("rope_parameters") or {}
  if not isinstance(parameters, Mapping):
    raise ValueError(
      f"config.json: rope_parameters={parameters!r} is of type {type(parameters).__name__};"
      " expected an object of fields, such as rope_type and rope_theta"
    )
  parameters = {"rope_type": "default", **parameters}
  theta = parameters.pop("rope_theta", fields.get("rope_theta"))
  if scaling is not None or parameters != {"rope_type": "default"}:
    raise ValueError(
      f"config.json: scaled rotary positions {scaling or parameters!r} are not supported; this"
      " program computes rope_type=default"
    )
  if theta is None:
    raise ValueError("config.json lacks rope_theta, by itself or in rope_parameters")
  return theta


def _as_dict(model: config.Model) -> dict:
  """Returns the fields of a model; as in Hugging Face's files, no clipping is None."""
  return {**dataclasses.asdict(model), "clip_qkv": model.clip_qkv or None}


def _derive(values: dict) -> None:
  """Fills in what transformers derives where the file has null."""
  heads, width = values["heads"], values["d_model"]
  if values["kv_heads"] is None:
    values["kv_heads"] = heads
  if values["clip_qkv"] == 0:
    raise ValueError(
      "config.json: clip_qkv=0 leaves nothing of queries and keys; use null for none"
    )
  if values["clip_qkv"] is None:
    values["clip_qkv"] = 0.0
  # Wrong types and zeros are refused with all others, when the Model is made.
  if values.get("head_dim") is None and isinstance(heads, int) and isinstance(width, int):
    values["head_dim"] = width // max(heads, 1)
