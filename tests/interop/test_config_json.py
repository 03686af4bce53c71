"""config.json of the three architectures: published models, what is refused, and the way back."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from moe_jax import config
from moe_jax.interop import architectures, config_json
from moe_jax.model import transformer
from moe_jax.plan import cost

# As published, without what has no effect but for one such field each.
MIXTRAL_8X7B = {
  "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu",
  "hidden_size": 4096, "intermediate_size": 14336, "model_type": "mixtral",
  "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
  "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
  "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
  "vocab_size": 32000,
}  # fmt: skip
QWEN3_30B_A3B = {
  "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
  "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
  "intermediate_size": 6144, "max_window_layers": 48, "mlp_only_layers": [],
  "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
  "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
  "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
  "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
  "vocab_size": 151936,
}  # fmt: skip
OLMOE_1B_7B = {
  "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
  "clip_qkv": None, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 1024,
  "model_type": "olmoe", "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64,
  "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
  "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
  "torch_dtype": "bfloat16", "vocab_size": 50304,
}  # fmt: skip
# Billions of parameters and tensors of each, as its publisher counts them.
PUBLISHED = {
  "mixtral": (MIXTRAL_8X7B, 46.70, 995),
  "qwen3_moe": (QWEN3_30B_A3B, 30.53, 18867),
  "olmoe": (OLMOE_1B_7B, 6.92, 3219),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_models_have_their_published_sizes(kind):
  fields, billions, num_tensors = PUBLISHED[kind]
  model = config_json.model_of(fields, "bfloat16")
  assert config_json.kind_of(model) == kind
  assert cost.num_parameters(model).total / 1e9 == pytest.approx(billions, abs=0.005)
  shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), model))
  shape_by_path = {
    "/".join(str(getattr(k, "name", getattr(k, "key", ""))) for k in path[:-1]): leaf.shape
    for path, leaf in jax.tree.leaves_with_path(shapes)
  }
  weights = architectures.weights(model, kind)
  assert {weight.path for weight in weights} == set(shape_by_path)
  stacked = [int(np.prod([shape_by_path[w.path][d] for d in w.counted])) for w in weights]
  assert sum(stacked) == num_tensors


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_way_back_describes_the_same_model(kind):
  model = config_json.model_of(PUBLISHED[kind][0], "bfloat16")
  fields = json.loads(json.dumps(config_json.fields_of(model, "bfloat16", 4096)))
  assert config_json.model_of(fields, "bfloat16") == model
  assert fields["architectures"] == PUBLISHED[kind][0]["architectures"]
  assert fields["max_position_embeddings"] == 4096


@pytest.mark.parametrize(
  ("named", "tokens"), [(None, ()), (2, (2,)), ([151645, 151643], (151645, 151643)), (0, (0,))]
)
def test_what_ends_a_text_goes_there_and_back(named, tokens):
  assert config_json.end_tokens_of({**QWEN3_30B_A3B, "eos_token_id": named}, 151936) == tokens
  model = config_json.model_of(QWEN3_30B_A3B, "bfloat16")
  assert config_json.fields_of(model, "bfloat16", 4096, tokens)["eos_token_id"] == named


@pytest.mark.parametrize("named", [32000, -1, "2", 2.0, True, [2, None], {}])
def test_what_ends_a_text_is_a_token(named):
  with pytest.raises(ValueError, match=r"eos_token_id=.* is neither a token from 0 to 31999 nor"):
    config_json.end_tokens_of({"eos_token_id": named}, 32000)


@pytest.mark.parametrize(("fields", "num"), [({"max_position_embeddings": 512}, 512), ({}, 64)])
def test_how_many_positions_a_model_was_trained_for(fields, num):
  assert config_json.num_positions_of(fields, default=64) == num


@pytest.mark.parametrize("found", [0, -1, "512", 512.0, True, None, math.nan])
def test_what_is_no_number_of_positions_is_refused(found):
  with pytest.raises(ValueError, match=r"max_position_embeddings=.* is not a whole number above 0"):
    config_json.num_positions_of({"max_position_embeddings": found}, default=64)


def test_fields_reach_the_model():
  model = config_json.model_of({**OLMOE_1B_7B, "clip_qkv": 8, "norm_topk_prob": True}, "float32")
  assert (model.qk_norm, model.clip_qkv, model.normalize_choices) == ("projection", 8.0, True)
  assert (model.head_dim, model.dtype, model.norm_epsilon) == (128, "float32", 1e-5)
  model = config_json.model_of(QWEN3_30B_A3B, "bfloat16")
  assert (model.qk_norm, model.head_dim, model.normalize_choices) == ("head", 128, True)
  assert (model.expert_hidden, model.rope_theta, model.clip_qkv) == (768, 1e6, 0.0)


def without(fields, *names):
  return {name: value for name, value in fields.items() if name not in names}


def test_what_transformers_leaves_out_is_what_it_takes():
  model = config_json.model_of(QWEN3_30B_A3B, "bfloat16")
  same = [
    without(QWEN3_30B_A3B, "tie_word_embeddings", "decoder_sparse_step", "mlp_only_layers"),
    {**without(QWEN3_30B_A3B, "num_experts"), "num_local_experts": 128},
    {**QWEN3_30B_A3B, "num_local_experts": 128},
    # transformers 5 keeps the base among others.
    {
      **without(QWEN3_30B_A3B, "rope_theta", "rope_scaling"),
      "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    # A window that is not used.
    {**QWEN3_30B_A3B, "sliding_window": 4096},
  ]
  assert [config_json.model_of(fields, "bfloat16") for fields in same] == [model] * len(same)
  unnormalised = config_json.model_of(without(QWEN3_30B_A3B, "norm_topk_prob"), "bfloat16")
  assert not unnormalised.normalize_choices
  grouped = config_json.model_of({**MIXTRAL_8X7B, "num_key_value_heads": None}, "bfloat16")
  assert grouped.kv_heads == 32


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model_type": "llama"}, r"model_type='llama' is not supported; .* mixtral, qwen3_moe, olmoe"),
    ({"model_type": [], "hidden_size": 8}, r"model_type=\[\] is not supported; .* mixtral"),
    ({**MIXTRAL_8X7B, "rope_parameters": "x"}, r"rope_parameters='x' is of type str; expected an"),
    ({"hidden_size": 8}, r"model_type=None is not supported"),
    ({**MIXTRAL_8X7B, "sliding_window": 4096}, r"sliding_window=4096 is not supported"),
    (
      {**QWEN3_30B_A3B, "use_sliding_window": True, "sliding_window": 4096},
      r"sliding_window=.* is not supported",
    ),
    ({**QWEN3_30B_A3B, "rope_scaling": YARN}, r"scaled rotary positions .*yarn.* not supported"),
    (
      {**QWEN3_30B_A3B, "rope_parameters": {"rope_theta": 1e6, **YARN}},
      r"scaled rotary positions .*yarn.* not supported",
    ),
    ({**MIXTRAL_8X7B, "hidden_act": "gelu"}, r"hidden_act='gelu' .* with hidden_act='silu'"),
    ({**MIXTRAL_8X7B, "router_jitter_noise": 0.1}, r"router_jitter_noise=0\.1 is not supported"),
    ({**QWEN3_30B_A3B, "attention_bias": True}, r"attention_bias=True is not supported"),
    ({**QWEN3_30B_A3B, "decoder_sparse_step": 2}, r"decoder_sparse_step=2 is not supported"),
    ({**QWEN3_30B_A3B, "mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not supported"),
    (
      {**QWEN3_30B_A3B, "quantization_config": {"bits": 4}, "shared_expert": 1},
      r"does not know, .*: quantization_config, shared_expert; import",
    ),
    ({**MIXTRAL_8X7B, "norm_topk_prob": True}, r"mixtral has fields .*: norm_topk_prob"),
    ({**OLMOE_1B_7B, "head_dim": 64}, r"olmoe has fields .* know.*: head_dim"),
    ({**OLMOE_1B_7B, "clip_qkv": 0}, r"clip_qkv=0 leaves nothing"),
    (
      {**MIXTRAL_8X7B, "architectures": ["MixtralForSequenceClassification"]},
      r"architectures=\['MixtralForSequenceClassification'\] is not supported",
    ),
    (without(MIXTRAL_8X7B, "hidden_size", "num_key_value_heads"), r"lacks hidden_size, num_key_"),
    (without(MIXTRAL_8X7B, "rope_theta"), r"lacks rope_theta"),
    (
      {**QWEN3_30B_A3B, "num_local_experts": 64},
      r"num_experts=128 and num_local_experts=64; leave out one",
    ),
    ({**MIXTRAL_8X7B, "hidden_size": "4096"}, r"model\.d_model='4096' is of type str; expected"),
    ({**MIXTRAL_8X7B, "num_attention_heads": 0}, r"model\.heads=0 is not positive"),
    ({**MIXTRAL_8X7B, "num_experts_per_tok": None}, r"model\.experts_per_token=None is of type"),
    ({**MIXTRAL_8X7B, "num_key_value_heads": 7}, r"model\.heads=32 is not divisible by"),
    ({**MIXTRAL_8X7B, "rms_norm_eps": math.nan}, r"norm_epsilon=nan is not a finite number"),
    ({**MIXTRAL_8X7B, "rms_norm_eps": math.inf}, r"norm_epsilon=inf is not a finite number"),
    ({**MIXTRAL_8X7B, "rope_theta": math.nan}, r"rope_theta=nan is not a finite number"),
    ({**OLMOE_1B_7B, "clip_qkv": math.nan}, r"clip_qkv=nan is not a finite number"),
    ({**MIXTRAL_8X7B, "attention_dropout": math.nan}, r"attention_dropout=nan is not supported"),
  ],
)  # fmt: skip
def test_what_we_do_not_compute_is_refused(fields, message):
  with pytest.raises(ValueError, match=message) as caught:
    config_json.model_of(fields, "bfloat16")
  assert "\n" not in str(caught.value)


BASE = config.Model(qk_norm="none", clip_qkv=0.0, normalize_choices=True)


@pytest.mark.parametrize(
  "changes",
  [
    {"normalize_choices": False},
    {"clip_qkv": 1.0},
    {"router_bias": True},
    {"qk_norm": "head", "clip_qkv": 1.0},
    {"qk_norm": "projection", "head_dim": 64},
  ],
)
def test_a_model_that_nobody_else_computes_is_not_exported(changes):
  with pytest.raises(
    ValueError, match="no architecture of Hugging Face's computes this model: mix"
  ):
    config_json.fields_of(dataclasses.replace(BASE, **changes), "float32", 64)
