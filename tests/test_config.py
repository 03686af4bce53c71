"""A Config either is right or is refused with the field, the value and what would be right."""

import dataclasses
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.config import Config, Mesh, Model, Moe, Pipeline, as_dict, check_field, from_mapping

FIELD_TYPES = config_lib.field_types()
SIZES = st.integers(-1, 24) | st.sampled_from([32, 64, 96, 128, 256, 320, 512, 10**12, 10**400])
WORDS = st.sampled_from(
  [
    *config_lib.SCHEDULES, *config_lib.SAVE, *config_lib.DISPATCH, *config_lib.EXCHANGE,
    *config_lib.TOKENIZERS, *config_lib.DTYPES, *config_lib.QK_NORM, "", "zebra",
  ]
)  # fmt: skip
VALUES = {
  int: SIZES,
  float: st.floats() | st.sampled_from([0.0, 0.05, 0.5, 1.0]) | SIZES,
  str: WORDS,
  bool: st.booleans(),
}


@st.composite
def mappings(draw, values):
  """Nested dicts of some fields, each drawn from the strategy that `values` gives for its type."""
  mapping = {}
  for name in draw(st.lists(st.sampled_from(list(FIELD_TYPES)), unique=True, max_size=12)):
    section, field = name.split(".")
    mapping.setdefault(section, {})[field] = draw(values(FIELD_TYPES[name]))
  return mapping


def names_a_field(message):
  return any(name in message for name in FIELD_TYPES)


def assert_sound(config):
  """What everything downstream assumes, written out once more."""
  model, mesh, pipeline, train = config.model, config.mesh, config.pipeline, config.train
  ranks = mesh.expert, mesh.tensor, mesh.stage
  assert min(ranks) >= 1 and mesh.num_devices == math.prod(ranks)
  assert model.heads % mesh.tensor == model.kv_heads % mesh.tensor == 0
  assert model.expert_hidden % mesh.tensor == train.sequence % mesh.tensor == 0
  assert model.heads % model.kv_heads == 0 and model.head_dim % 2 == 0
  assert model.experts % mesh.expert == 0 and 1 <= model.experts_per_token <= model.experts
  assert model.vocab % (mesh.tensor * mesh.stage) == 0
  assert model.layers % (mesh.stage * pipeline.chunks) == 0
  assert train.batch % (pipeline.micro_batches * mesh.expert) == 0
  assert pipeline.chunks == 1 or pipeline.schedule == "interleaved"
  for section in dataclasses.fields(config):
    for field, expected in section.type.__annotations__.items():
      value = getattr(getattr(config, section.name), field)
      assert type(value) is expected
      assert expected is not float or math.isfinite(value)


@given(mappings(lambda expected: VALUES[expected]))
def test_any_combination_builds_or_names_a_field(mapping):
  try:
    config = from_mapping(mapping)
  except ValueError as error:
    assert names_a_field(str(error)), error
    assert "\n" not in str(error)
  else:
    assert_sound(config)
    assert from_mapping(as_dict(config)) == config
    assert from_mapping(ConfigDict(mapping)) == config


@st.composite
def fitting(draw):
  """Sizes that fit by construction."""
  ranks = st.sampled_from([1, 2, 3, 4, 8])
  expert, tensor, stage, chunks, micro = (draw(ranks) for _ in range(5))
  times = lambda *factors: math.prod(factors) * draw(st.integers(1, 3))
  kv_heads = times(tensor)
  experts = times(expert)
  return {
    "mesh": {"expert": expert, "tensor": tensor, "stage": stage},
    "model": {
      "kv_heads": kv_heads,
      "heads": times(kv_heads),
      "head_dim": times(2),
      "experts": experts,
      "experts_per_token": draw(st.integers(1, experts)),
      "expert_hidden": times(tensor),
      "vocab": times(256, tensor, stage),
      "layers": times(stage, chunks),
    },
    "pipeline": {"schedule": "interleaved", "chunks": chunks, "micro_batches": micro},
    "train": {"sequence": times(tensor), "batch": times(micro, expert)},
  }


@given(fitting())
def test_sizes_that_fit_are_accepted(mapping):
  config = from_mapping(mapping)
  assert_sound(config)
  assert from_mapping(as_dict(config)) == config
  for section, fields in mapping.items():
    for field, value in fields.items():
      assert getattr(getattr(config, section), field) == value


# Each size that must divide, by what, and the sections that it takes to see it.
INDIVISIBLE = {
  ("model.heads", "mesh.tensor"): {"model": {"heads": 6, "kv_heads": 2}, "mesh": {"tensor": 4}},
  ("model.kv_heads", "mesh.tensor"): {"model": {"heads": 8, "kv_heads": 2}, "mesh": {"tensor": 4}},
  ("model.heads", "model.kv_heads"): {"model": {"heads": 8, "kv_heads": 3}},
  ("model.expert_hidden", "mesh.tensor"): {"model": {"expert_hidden": 18}, "mesh": {"tensor": 4}},
  ("train.sequence", "mesh.tensor"): {"train": {"sequence": 18}, "mesh": {"tensor": 4}},
  ("model.experts", "mesh.expert"): {"model": {"experts": 6}, "mesh": {"expert": 4}},
  ("model.vocab", "mesh.stage x mesh.tensor"): {
    "model": {"vocab": 260}, "mesh": {"tensor": 4, "stage": 2},
  },
  ("model.layers", "mesh.stage x pipeline.chunks"): {
    "model": {"layers": 6}, "mesh": {"stage": 2},
    "pipeline": {"chunks": 2, "schedule": "interleaved"},
  },
  ("train.batch", "pipeline.micro_batches x mesh.expert"): {
    "train": {"batch": 12}, "pipeline": {"micro_batches": 4}, "mesh": {"expert": 2},
  },
  ("train.batch", "pipeline.micro_batches x mesh.expert x mesh.data"): {
    "train": {"batch": 12}, "pipeline": {"micro_batches": 2}, "mesh": {"expert": 2, "data": 2},
  },
}  # fmt: skip


@pytest.mark.parametrize("names", INDIVISIBLE, ids="-".join)
def test_an_indivisible_size_is_refused_by_name(names):
  with pytest.raises(
    ValueError, match=rf"^{names[0]}=\d+ is not divisible by {names[1]}=\d+; choose"
  ):
    from_mapping(INDIVISIBLE[names])


@given(
  st.sampled_from(list(FIELD_TYPES)),
  st.one_of(st.none(), st.text(), st.booleans(), st.floats(), st.lists(st.integers()), SIZES),
)
def test_a_value_of_the_wrong_type_is_refused_by_name(name, value):
  expected = FIELD_TYPES[name]
  if type(value) is expected or (expected is float and type(value) is int):
    return
  section, field = name.split(".")
  with pytest.raises(ValueError, match=f"^{name}=.* is of type {type(value).__name__}; expected"):
    from_mapping({section: {field: value}})


@given(st.text(max_size=20) | WORDS | st.sampled_from(["serve", "train.seed", "train"]))
def test_an_unknown_name_is_refused(name):
  if name not in {field.partition(".")[0] for field in FIELD_TYPES}:
    with pytest.raises(ValueError, match="is not a config section"):
      from_mapping({name: {}})
  if name not in FIELD_TYPES:
    with pytest.raises(ValueError, match=r"is not a config field|is a config section"):
      check_field(name)


@pytest.mark.parametrize(
  ("mapping", "message"),
  [
    (
      {"moe": {"router_balance": "bias"}},
      "moe.router_balance=bias moves a bias that the model lacks, got model.router_bias=False;"
      " choose model.router_bias=True",
    ),
    (
      {"moe": {"router_balance": "quantiles"}},
      "moe.router_balance='quantiles' is not one of auxiliary, bias, quantile, none; did you mean"
      " quantile?",
    ),
    (
      {"model": {"router_bias": True, "experts": 4, "experts_per_token": 4}},
      "model.router_bias=True chooses nothing where every token takes all 4 experts"
      " (model.experts_per_token); choose router_bias=False or fewer experts_per_token",
    ),
    (
      {"moe": {"bias_speed": 0.0}},
      "moe.bias_speed=0.0 is not positive; choose a number above 0",
    ),
    (
      {"model": {"heads": 12, "kv_heads": 12}, "mesh": {"tensor": 8}},
      "model.heads=12 is not divisible by mesh.tensor=8;"
      " choose mesh.tensor from 1, 2, 3, 4, 6, 12 or model.heads=16",
    ),
    (
      {"model": {"vocab": 258}, "mesh": {"tensor": 2, "stage": 2}},
      "model.vocab=258 is not divisible by mesh.stage x mesh.tensor=4;"
      " choose mesh.stage x mesh.tensor from 1, 2, 3, 6, 43, 86, 129, 258 or model.vocab=260",
    ),
    (
      {"train": {"batch": 24}, "pipeline": {"micro_batches": 16}},
      "train.batch=24 is not divisible by pipeline.micro_batches x mesh.expert=16;"
      " choose pipeline.micro_batches x mesh.expert from 1, 2, 3, 4, 6, 8, 12, 24"
      " or train.batch=32",
    ),
    (
      {"pipeline": {"chunks": 2}},
      "pipeline.chunks=2 needs pipeline.schedule=interleaved, got 1f1b;"
      " choose chunks=1 or schedule=interleaved",
    ),
    (
      {"pipeline": {"prefetch_layers": 1}},
      "pipeline.prefetch_layers=1 gathers weights along mesh.expert and mesh.data, got"
      " mesh.expert=1 and mesh.data=1, which hold them whole; choose prefetch_layers=0",
    ),
    (
      {"pipeline": {"halves": True, "micro_batches": 2}, "mesh": {"expert": 2, "data": 2}},
      "pipeline.halves=True halves the sequences of a micro-batch on each rank, got 1"
      " (train.batch=8 on 4 ranks in 2 micro-batches); choose halves=False or fewer micro-batches",
    ),
    (
      {"pipeline": {"prefetch_layers": 4}, "mesh": {"expert": 2}},
      "pipeline.prefetch_layers=4 holds as many layers whole as a stage has (4 layers on"
      " mesh.stage=1: 4); choose at most 3, or 0 for no streaming",
    ),
    ({"pipeline": {"prefetch_layers": -1}}, "pipeline.prefetch_layers=-1 is negative; choose 0"),
    ({"model": {"layers": 0}}, "model.layers=0 is not positive; choose at least 1"),
    ({"moe": {"capacity_factor": 0}}, "moe.capacity_factor=0.0 is not positive; choose a number"),
    ({"train": {"clip_norm": 10**400}}, "train.clip_norm=1000"),
    ({"train": {"clip_norm": float("inf")}}, "train.clip_norm=inf is not a finite number"),
    ({"train": {"keep_checkpoints": 1}}, "train.keep_checkpoints=1 deletes the last good"),
    ({"train": {"keep_checkpoints": -2}}, "train.keep_checkpoints=-2 deletes the last good"),
    ({"train": {"seed": -1}}, "train.seed=-1 is negative; choose 0 or more"),
    ({"train": {"seed": 2**32}}, "train.seed=4294967296 does not fit 32 bits; choose from 0"),
    ({"train": {"steps": 2**31}}, "train.steps=2147483648 does not fit 31 bits; choose at most"),
    ({"train": {"warmup_steps": 2**31}}, "train.warmup_steps=2147483648 does not fit 31 bits"),
    ({"balance": {"most_moved": 1}}, "balance.most_moved=1 moves nothing"),
    ({"train": {"beta1": 1.5}}, "train.beta1=1.5 is not a fraction; choose from 0 to 1"),
    ({"train": {"beta2": 1}}, "train.beta2=1.0 never forgets a gradient; choose less than 1"),
    (
      {"moe": {"shadow_tokens": 8}},
      "moe.shadow_tokens=8.0 needs moe.dispatch=stealing, got capacity",
    ),
    (
      {"balance": {"every": 10}},
      "balance.every=10 moves experts from busy ranks, and with moe.dispatch=capacity all ranks",
    ),
    (
      {"moe": {"dispatch": "stealing", "shadows": 17}},
      "moe.shadows=17 is more than model.experts=16; choose at most 16",
    ),
    *[
      (
        {"moe": {"dispatch": dispatch, "exchange": "flat"}},
        f"moe.dispatch={dispatch} has an exchange of its own, got moe.exchange=flat; choose",
      )
      for dispatch in ("ragged", "two_level", "gathered")
    ],
    ({"moe": {"shadows": 0}}, "moe.shadows=0 is not positive; choose at least 1"),
    ({"moe": {"dispatch": "droples"}}, "moe.dispatch='droples' is not one of capacity, dropless"),
    ({"model": {"head_dim": 7}}, "model.head_dim=7 is odd"),
    ({"model": {"experts_per_token": 17}}, "model.experts_per_token=17 is more than"),
    ({"model": {"vocab": 100}}, "model.vocab=100 cannot hold bytes"),
    ({"data": {"held_out_fraction": 1.0}}, "data.held_out_fraction=1.0 leaves nothing"),
    ({"train": 3}, "train=3 is of type int; expected a mapping of its fields"),
    ({"train": {"stpes": 3}}, "train.stpes is not a config field; did you mean train.steps?"),
    ({"model": {"batch": 3}}, "model.batch is not a config field; did you mean train.batch?"),
    ({"mesh": {"zebra": 3}}, "mesh.zebra is not a config field; mesh has expert, tensor, stage"),
    (
      {"mesh": {"expert": 8}, "moe": {"expert_ranks_per_host": 3}},
      "mesh.expert=8 is not divisible by moe.expert_ranks_per_host=3;"
      " choose moe.expert_ranks_per_host from 1, 2, 4, 8 or mesh.expert=9",
    ),
    (
      {"mesh": {"expert": 8}, "moe": {"expert_ranks_per_host": 4, "hosts_per_token": 3}},
      "moe.hosts_per_token=3 is more than the 2 hosts that mesh.expert=8 spans",
    ),
    (
      {"mesh": {"expert": 16}, "train": {"batch": 16}, "moe": {"hosts_per_token": 1}},
      "moe.hosts_per_token=1 leaves a token 1 experts for model.experts_per_token=2;"
      " choose at least 2",
    ),
    ({"tarin": {}}, "tarin is not a config section; did you mean train?"),
  ],
)
def test_the_message_says_what_would_be_right(mapping, message):
  with pytest.raises(ValueError) as caught:
    from_mapping(mapping)
  assert str(caught.value).startswith(message)


def test_the_remedies_are_accepted():
  # What the first message above advises.
  heads = {"heads": 12, "kv_heads": 12}
  for tensor in (1, 2, 4):
    from_mapping({"model": heads, "mesh": {"tensor": tensor}})
  from_mapping({"model": {"heads": 16, "kv_heads": 16}, "mesh": {"tensor": 8}})


def test_a_config_cannot_change():
  config = Config()
  for part, field in ((config, "model"), (config.model, "layers")):
    with pytest.raises(dataclasses.FrozenInstanceError):
      setattr(part, field, None)
  assert hash(config) == hash(Config())


def test_replacing_a_part_checks_the_whole_again():
  config = Config(model=Model(layers=4))
  assert dataclasses.replace(config, mesh=Mesh(stage=4)).mesh.num_devices == 4
  with pytest.raises(ValueError, match=r"model\.layers=4 is not divisible by mesh\.stage"):
    dataclasses.replace(config, mesh=Mesh(stage=8))
  with pytest.raises(ValueError, match=r"pipeline\.chunks=2 needs"):
    dataclasses.replace(config, pipeline=Pipeline(chunks=2))


def test_config_imports_without_jax():
  code = "import sys; sys.modules['jax'] = None; import moe_jax.config; moe_jax.config.Config()"
  subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_router_that_counts_hosts_counts_as_many_on_another_mesh():
  of = lambda **moe: Config(mesh=Mesh(expert=8), moe=Moe(**moe))
  limited = of(expert_ranks_per_host=4, hosts_per_token=1)
  assert limited.router_hosts == 2
  assert limited.moe_on(Mesh(expert=2)).expert_ranks_per_host == 1
  assert limited.moe_on(Mesh(expert=16)).expert_ranks_per_host == 8
  with pytest.raises(ValueError, match=r"moe.hosts_per_token=1 .* 2 hosts, and mesh.expert=1 does"):
    limited.moe_on(Mesh())
  # Without a limit, or with one of all hosts, any mesh will do.
  for free in (of(expert_ranks_per_host=4), of(expert_ranks_per_host=4, hosts_per_token=2)):
    assert free.router_hosts == 1
    assert free.moe_on(Mesh()) == Moe()
