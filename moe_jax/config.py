"""What a deployment is: frozen, checked dataclasses, and the only way to make one from a mapping.

Every size that must divide another is checked here, once, and the message names the field, the
value and what would be right. This module knows names and numbers; it must not know jax, files or
flags.
"""

import dataclasses
import difflib
import functools
import sys
import typing
from collections.abc import Mapping

from moe_jax import checks

# The keys of the tables that implement each choice; tests hold the two equal.
SCHEDULES = ("gpipe", "1f1b", "interleaved")
SAVE = ("inputs", "exchanges", "residuals", "everything")
DISPATCH = ("capacity", "dropless", "stealing", "ragged", "two_level", "dense", "gathered")
EXCHANGE = ("hierarchical", "flat", "hierarchical_float8")
TOKENIZERS = ("bytes", "bpe", "imported")
DTYPES = ("float32", "bfloat16")
QK_NORM = ("none", "head", "projection")
ROUTER_BALANCE = ("auxiliary", "bias", "quantile", "none")
KV_DTYPES = ("float32", "bfloat16", "int8", "float8")
CHIPS = ("a100", "h100", "h200", "b200", "planned")


@dataclasses.dataclass(frozen=True)
class Model:
  """The network. Widths are numbers of elements."""

  layers: int = 4
  d_model: int = 512
  heads: int = 16
  kv_heads: int = 16
  head_dim: int = 32
  experts: int = 16
  experts_per_token: int = 2
  expert_hidden: int = 1024
  vocab: int = 256
  dtype: str = "bfloat16"  # of the computation; master weights are float32
  tied_embeddings: bool = False
  rope_theta: float = 10_000.0
  norm_epsilon: float = 1e-5
  qk_norm: str = "none"  # of queries and keys before they turn; projection: over all heads together
  clip_qkv: float = 0.0  # queries, keys and values to within +- this; 0 does not clip
  normalize_choices: bool = True  # a token's expert weights sum to 1
  router_bias: bool = False  # of each expert, which its choice sees and its weight does not

  def __post_init__(self):
    checks.positive(
      self, "model", "layers", "d_model", "heads", "kv_heads", "head_dim", "experts",
      "experts_per_token", "expert_hidden", "vocab", "rope_theta", "norm_epsilon",
    )  # fmt: skip
    checks.one_of(self, "model", "dtype", DTYPES)
    checks.one_of(self, "model", "qk_norm", QK_NORM)
    checks.not_negative(self, "model", "clip_qkv")
    checks.divides("model.heads", self.heads, "model.kv_heads", self.kv_heads)
    if self.head_dim % 2:
      raise ValueError(
        f"model.head_dim={self.head_dim} is odd; rotary embedding turns pairs, choose an even width"
      )
    if self.experts_per_token > self.experts:
      raise ValueError(
        f"model.experts_per_token={self.experts_per_token} is more than"
        f" model.experts={self.experts}; choose at most {self.experts}"
      )
    if self.router_bias and self.experts_per_token == self.experts:
      raise ValueError(
        f"model.router_bias=True chooses nothing where every token takes all {self.experts} experts"
        " (model.experts_per_token); choose router_bias=False or fewer experts_per_token"
      )


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices along each axis. All four axes always exist; size 1 is normal."""

  expert: int = 1
  tensor: int = 1
  stage: int = 1
  data: int = 1  # copies of the three others, which share a micro-batch's sequences

  def __post_init__(self):
    checks.positive(self, "mesh", "expert", "tensor", "stage", "data")

  @property
  def num_devices(self) -> int:
    return self.data * self.stage * self.expert * self.tensor

  @property
  def sequence_shares(self) -> int:
    """Ranks that hold different sequences of a micro-batch."""
    return self.data * self.expert


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """When each micro-batch runs, and what of it waits for its backward pass."""

  schedule: str = "1f1b"
  micro_batches: int = 1
  chunks: int = 1  # pieces of consecutive layers on each stage
  save: str = "inputs"  # of a layer, from little memory to little computed again: SAVE
  gradient_dtype: str = "float32"  # of the sums over micro-batches
  # Whether a layer works a micro-batch's sequences as two halves side by side: one multiplies while
  # the other exchanges tokens, also where no other micro-batch is there to do so.
  halves: bool = False
  # Layers whose weights are gathered before they are used, attention's along mesh.expert and
  # mesh.data, experts' along mesh.data; until then each rank holds a share (ZeRO-3). 0: each holds
  # them whole, once gathered.
  prefetch_layers: int = 0

  def __post_init__(self):
    checks.positive(self, "pipeline", "micro_batches", "chunks")
    checks.not_negative(self, "pipeline", "prefetch_layers")
    checks.one_of(self, "pipeline", "schedule", SCHEDULES)
    checks.one_of(self, "pipeline", "save", SAVE)
    checks.one_of(self, "pipeline", "gradient_dtype", DTYPES)
    if self.schedule != "interleaved" and self.chunks != 1:
      raise ValueError(
        f"pipeline.chunks={self.chunks} needs pipeline.schedule=interleaved,"
        f" got {self.schedule}; choose chunks=1 or schedule=interleaved"
      )

  @property
  def multiplies_again(self) -> bool:
    """Whether the backward unit multiplies again, for no product's result is saved."""
    return self.save in ("inputs", "exchanges")


@dataclasses.dataclass(frozen=True)
class Moe:
  """How tokens reach their experts."""

  dispatch: str = "capacity"
  exchange: str = "hierarchical"
  capacity_factor: float = 1.25  # rows sent to an expert (dropless: to a rank), over the even share
  spill: bool = False  # overflow goes to the token's next-ranked expert with room
  expert_ranks_per_host: int = 1  # consecutive ranks of mesh.expert that share a host
  hosts_per_token: int = 0  # the router chooses experts on at most so many hosts; 0: on any
  shadows: int = 4  # stealing: experts whose weights a micro-batch sends to every rank, at most
  shadow_tokens: float = 0.0  # stealing: tokens that a rank serves in the time of one shadow
  router_balance: str = "auxiliary"  # what evens the experts: a loss, or the bias moved each step
  load_balance_weight: float = 0.01  # of the loss of router_balance=auxiliary
  bias_speed: float = 0.01  # router_balance=bias: of each expert's bias a step, in logits
  router_z_weight: float = 0.001

  def __post_init__(self):
    checks.one_of(self, "moe", "dispatch", DISPATCH)
    checks.one_of(self, "moe", "router_balance", ROUTER_BALANCE)
    checks.one_of(self, "moe", "exchange", EXCHANGE)
    if self.dispatch in ("ragged", "two_level", "gathered") and self.exchange != "hierarchical":
      raise ValueError(
        f"moe.dispatch={self.dispatch} has an exchange of its own, got"
        f" moe.exchange={self.exchange}; choose exchange=hierarchical"
      )
    checks.positive(
      self, "moe", "capacity_factor", "expert_ranks_per_host", "shadows", "bias_speed"
    )
    if self.spill and self.dispatch != "capacity":
      raise ValueError(
        f"moe.spill=True needs moe.dispatch=capacity, got {self.dispatch}, which lets nothing"
        " overflow; choose spill=False or dispatch=capacity"
      )
    if self.shadow_tokens and self.dispatch != "stealing":
      raise ValueError(
        f"moe.shadow_tokens={self.shadow_tokens} needs moe.dispatch=stealing, got {self.dispatch},"
        " which sends no weights; choose shadow_tokens=0 or dispatch=stealing"
      )
    checks.not_negative(
      self, "moe", "load_balance_weight", "router_z_weight", "hosts_per_token", "shadow_tokens"
    )


@dataclasses.dataclass(frozen=True)
class Balance:
  """When experts move between ranks, so that busy ones share a rank with idle ones."""

  every: int = 0  # steps between looks at the loads; 0: experts stay where they are
  most_moved: int = 0  # experts that one look may move, over all layers; 0: any number
  chip: str = "h100"  # by whose table a move has to pay for itself until the next look

  def __post_init__(self):
    checks.not_negative(self, "balance", "every", "most_moved")
    checks.one_of(self, "balance", "chip", CHIPS)
    if self.most_moved == 1:
      raise ValueError(
        "balance.most_moved=1 moves nothing, for two experts change places; choose 2 or more, or 0"
        " for any number"
      )


@dataclasses.dataclass(frozen=True)
class Train:
  """A training run. `batch` counts sequences, `sequence` tokens, `*_every` and `*_steps` steps."""

  batch: int = 8
  sequence: int = 128
  steps: int = 100
  learning_rate: float = 3e-3
  warmup_steps: int = 10
  final_learning_rate_fraction: float = 0.1
  beta1: float = 0.9
  beta2: float = 0.95
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  seed: int = 0
  checkpoint_every: int = 50
  keep_checkpoints: int = 2
  eval_every: int = 50
  eval_batches: int = 4
  max_skipped_steps: int = 5  # in a row, for a loss or gradient that is not finite

  def __post_init__(self):
    checks.positive(
      self, "train", "batch", "sequence", "steps", "learning_rate", "clip_norm",
      "checkpoint_every", "eval_every", "eval_batches", "max_skipped_steps",
    )  # fmt: skip
    for name in ("steps", "warmup_steps"):
      if (number := getattr(self, name)) >= 2**31:
        raise ValueError(f"train.{name}={number} does not fit 31 bits; choose at most {2**31 - 1}")
    if self.keep_checkpoints < 2:
      raise ValueError(
        f"train.keep_checkpoints={self.keep_checkpoints} deletes the last good checkpoint, for a"
        " newer one counts as good only once the step after it is finite; choose at least 2"
      )
    checks.not_negative(self, "train", "warmup_steps", "weight_decay", "seed")
    if self.seed >= 2**32:
      raise ValueError(f"train.seed={self.seed} does not fit 32 bits; choose from 0 to {2**32 - 1}")
    checks.fraction(self, "train", "final_learning_rate_fraction", "beta1", "beta2")
    for name in ("beta1", "beta2"):
      if getattr(self, name) == 1:
        raise ValueError(
          f"train.{name}=1.0 never forgets a gradient; choose less than 1, such as 0.95"
        )


@dataclasses.dataclass(frozen=True)
class Data:
  """Text to train on: `paths` are globs, comma-separated; empty is Python's standard library."""

  paths: str = ""
  tokenizer: str = "bytes"
  held_out_fraction: float = 0.05  # of the files

  def __post_init__(self):
    checks.one_of(self, "data", "tokenizer", TOKENIZERS)
    checks.fraction(self, "data", "held_out_fraction")
    if not 0 < self.held_out_fraction < 1:
      raise ValueError(
        f"data.held_out_fraction={self.held_out_fraction} leaves nothing to train on or to"
        " evaluate; choose a fraction between 0 and 1, such as 0.05"
      )


@dataclasses.dataclass(frozen=True)
class Serve:
  """What a deployment holds while it serves. Sizes in tokens are rounded up to whole pages."""

  slots: int = 4  # sequences of each decode micro-batch on each rank of data and expert
  max_tokens: int = 1024  # of a sequence, prompt and what is generated
  page: int = 16  # tokens of a page of the key-value cache
  pages_fraction: float = 1.0  # of what all slots would take at max_tokens
  kv_dtype: str = "float32"  # of the cache; int8 and float8 with a scale for each token and head
  prefill_rows: int = 1  # chunks of prompts in a prefill micro-batch on such a rank
  prefill_chunk: int = 128  # tokens of a prompt that one row of a prefill call takes
  prefill_micro_batches: int = 2  # of a prefill call
  decode_tokens: int = 1  # tokens of each sequence that a decode call makes

  def __post_init__(self):
    checks.positive(
      self, "serve", "slots", "max_tokens", "page", "pages_fraction", "prefill_rows",
      "prefill_chunk", "prefill_micro_batches", "decode_tokens",
    )  # fmt: skip
    checks.one_of(self, "serve", "kv_dtype", KV_DTYPES)
    checks.fraction(self, "serve", "pages_fraction")


@dataclasses.dataclass(frozen=True)
class Config:
  """One deployment. Raises ValueError, with the fix in the message, where the parts do not fit."""

  model: Model = dataclasses.field(default_factory=Model)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  pipeline: Pipeline = dataclasses.field(default_factory=Pipeline)
  moe: Moe = dataclasses.field(default_factory=Moe)
  balance: Balance = dataclasses.field(default_factory=Balance)
  train: Train = dataclasses.field(default_factory=Train)
  data: Data = dataclasses.field(default_factory=Data)
  serve: Serve = dataclasses.field(default_factory=Serve)

  def __post_init__(self):
    model, mesh, pipeline, train = self.model, self.mesh, self.pipeline, self.train
    for name in ("heads", "kv_heads", "expert_hidden"):
      checks.divides(f"model.{name}", getattr(model, name), "mesh.tensor", mesh.tensor)
    checks.divides("model.experts", model.experts, "mesh.expert", mesh.expert)
    _check_hosts(self)
    if self.moe.router_balance in ("bias", "quantile") and not model.router_bias:
      raise ValueError(
        f"moe.router_balance={self.moe.router_balance} moves a bias that the model lacks, got"
        " model.router_bias=False; choose model.router_bias=True"
      )
    if self.balance.every and self.moe.dispatch in ("capacity", "dense", "gathered"):
      raise ValueError(
        f"balance.every={self.balance.every} moves experts from busy ranks, and with"
        f" moe.dispatch={self.moe.dispatch} all ranks take as long; choose moe.dispatch=dropless,"
        " stealing, ragged or two_level, or balance.every=0"
      )
    if self.moe.dispatch == "stealing" and self.moe.shadows > model.experts:
      raise ValueError(
        f"moe.shadows={self.moe.shadows} is more than model.experts={model.experts}; choose at most"
        f" {model.experts}"
      )
    checks.divides("model.vocab", model.vocab, "mesh.stage x mesh.tensor", mesh.stage * mesh.tensor)
    checks.divides(
      "model.layers", model.layers, "mesh.stage x pipeline.chunks", mesh.stage * pipeline.chunks
    )
    _check_prefetch(self)
    checks.divides("train.sequence", train.sequence, "mesh.tensor", mesh.tensor)
    checks.divides(
      "train.batch", train.batch,
      f"pipeline.micro_batches x mesh.expert{' x mesh.data' * (mesh.data > 1)}",
      pipeline.micro_batches * mesh.sequence_shares,
    )  # fmt: skip
    of_rank = train.batch // (pipeline.micro_batches * mesh.sequence_shares)
    if pipeline.halves and of_rank % 2:
      raise ValueError(
        f"pipeline.halves=True halves the sequences of a micro-batch on each rank, got {of_rank}"
        f" (train.batch={train.batch} on {mesh.sequence_shares} ranks in"
        f" {pipeline.micro_batches} micro-batches); choose halves=False or fewer micro-batches"
      )
    if self.data.tokenizer == "bytes" and model.vocab < 256:
      raise ValueError(
        f"model.vocab={model.vocab} cannot hold bytes; data.tokenizer=bytes needs at least 256"
      )

  @property
  def router_hosts(self) -> int:
    """Hosts that the router tells apart, the model's on any mesh; 1 where it has no limit."""
    return router_hosts(self.mesh, self.moe)

  def moe_on(self, mesh: Mesh) -> Moe:
    """Returns `moe` for another mesh, on which the router tells as many hosts apart.

    Raises:
      ValueError: `mesh.expert` does not fall into so many hosts.
    """
    hosts = self.router_hosts
    if hosts == 1:
      return dataclasses.replace(self.moe, hosts_per_token=0, expert_ranks_per_host=1)
    if mesh.expert % hosts:
      raise ValueError(
        f"moe.hosts_per_token={self.moe.hosts_per_token} chooses a token's experts on some of"
        f" {hosts} hosts, and mesh.expert={mesh.expert} does not fall into {hosts}; choose a"
        f" multiple of {hosts}"
      )
    return dataclasses.replace(self.moe, expert_ranks_per_host=mesh.expert // hosts)


def router_hosts(mesh: Mesh, moe: Moe) -> int:
  """Returns `Config.router_hosts` of these parts of one."""
  num_hosts = mesh.expert // moe.expert_ranks_per_host
  return num_hosts if 0 < moe.hosts_per_token < num_hosts else 1


def _check_prefetch(config: Config):
  """Checks that layers gathered ahead have somebody to be gathered from, and are not all."""
  ahead, mesh = config.pipeline.prefetch_layers, config.mesh
  if ahead and mesh.sequence_shares == 1:
    raise ValueError(
      f"pipeline.prefetch_layers={ahead} gathers weights along mesh.expert and mesh.data, got"
      " mesh.expert=1 and mesh.data=1, which hold them whole; choose prefetch_layers=0 or a larger"
      " mesh.expert"
    )
  of_stage = config.model.layers // mesh.stage
  if ahead and ahead >= of_stage:
    raise ValueError(
      f"pipeline.prefetch_layers={ahead} holds as many layers whole as a stage has"
      f" ({config.model.layers} layers on mesh.stage={mesh.stage}: {of_stage}); choose at most"
      f" {of_stage - 1}, or 0 for no streaming"
    )


def _check_hosts(config: Config):
  """Checks that the expert axis falls into whole hosts, and that a token finds enough experts on
  those it is limited to.
  """
  moe, model = config.moe, config.model
  checks.divides(
    "mesh.expert", config.mesh.expert, "moe.expert_ranks_per_host", moe.expert_ranks_per_host
  )
  num_hosts = config.mesh.expert // moe.expert_ranks_per_host
  if moe.hosts_per_token > num_hosts:
    raise ValueError(
      f"moe.hosts_per_token={moe.hosts_per_token} is more than the {num_hosts} hosts that"
      f" mesh.expert={config.mesh.expert} spans with"
      f" moe.expert_ranks_per_host={moe.expert_ranks_per_host}; choose at most {num_hosts}, or 0"
      " for no limit"
    )
  found = moe.hosts_per_token * model.experts // num_hosts
  if 0 < found < model.experts_per_token:
    needed = -(-model.experts_per_token * num_hosts // model.experts)
    raise ValueError(
      f"moe.hosts_per_token={moe.hosts_per_token} leaves a token {found} experts for"
      f" model.experts_per_token={model.experts_per_token}; choose at least {needed}, or 0 for no"
      " limit"
    )


def from_mapping(mapping: Mapping) -> Config:
  """Returns the checked Config that a nested mapping describes; absent fields take their defaults.

  Args:
    mapping: sections (`model`, `mesh`, ...) of fields; a ConfigDict or plain dicts.

  Raises:
    ValueError: an unknown section or field (the nearest known one is named), a value of the wrong
      type, or sizes that do not fit.
  """
  sections = {f.name: f.type for f in dataclasses.fields(Config)}
  for name in mapping:
    if name not in sections:
      near = difflib.get_close_matches(str(name), sections, 1)
      hint = f"did you mean {near[0]}?" if near else f"sections are {', '.join(sections)}"
      raise ValueError(f"{name} is not a config section; {hint}")
  return Config(**{name: _section(name, sections[name], mapping[name]) for name in mapping})


def as_dict(config: Config) -> dict:
  """Returns `config` as nested plain dicts; `from_mapping` takes them back."""
  return dataclasses.asdict(config)


@functools.cache
def field_types() -> Mapping[str, type]:
  """Returns the type of every field of a Config by its dotted name, such as `train.steps`."""
  return {
    f"{section.name}.{name}": expected
    for section in dataclasses.fields(Config)
    for name, expected in typing.get_type_hints(section.type).items()
  }


def check_field(name: str) -> None:
  """Checks that `name`, such as `train.steps`, is a field of a Config.

  Raises:
    ValueError: it is not; the message names the nearest field.
  """
  known = list(field_types())
  if name in known:
    return
  section, field = name.partition(".")[0], name.rpartition(".")[2]
  siblings = {k.partition(".")[2]: k for k in known if k.startswith(f"{section}.")}
  elsewhere = [k for k in known if k.partition(".")[2] == field]
  near = (
    elsewhere
    or [siblings[k] for k in difflib.get_close_matches(field, siblings, 1)]
    # The dot and the section weigh in here, so that a weaker match would be a random one.
    or difflib.get_close_matches(name, known, 1, cutoff=0.75)
  )
  if siblings and name == section:
    raise ValueError(f"{name} is a config section; set one of {', '.join(siblings.values())}")
  if near:
    hint = f"did you mean {near[0]}?"
  elif siblings:
    hint = f"{section} has {', '.join(siblings)}"
  else:
    hint = f"sections are {', '.join(dict.fromkeys(k.partition('.')[0] for k in known))}"
  raise ValueError(f"{name} is not a config field; {hint}")


def _section(section: str, cls: type, mapping: Mapping):
  if not isinstance(mapping, Mapping) and not hasattr(mapping, "items"):
    raise ValueError(
      f"{section}={mapping!r} is of type {type(mapping).__name__}; expected a mapping of its fields"
    )
  values = {}
  for name, value in mapping.items():
    check_field(f"{section}.{name}")
    values[name] = _typed(f"{section}.{name}", value, field_types()[f"{section}.{name}"])
  return cls(**values)


def _typed(name: str, value, expected: type):
  if type(value) is not expected and not (expected is float and type(value) is int):
    raise ValueError(
      f"{name}={value!r} is of type {type(value).__name__}; expected {expected.__name__}"
    )
  if expected is float and not abs(value) <= sys.float_info.max:
    raise ValueError(f"{name}={value} is not a finite number; choose one such as 0.1")
  return expected(value)
