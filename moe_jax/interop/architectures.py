"""What Hugging Face calls our sizes and parameters: a table with an entry for each architecture.

Knows names; must not know files or devices.
"""

from collections.abc import Mapping
from typing import NamedTuple

from moe_jax import config


class Weight(NamedTuple):
  """How files keep one parameter.

  Attributes:
    name: of the tensor, `{layer}`, `{expert}` and `{part}` standing for what each has its own of.
    path: of the parameter, such as "layers/attention/query".
    dimensions: for each dimension of the tensor, those of the parameter that it holds, outermost
      first.
    counted: the parameter's other dimensions, which the name counts, in the order above.
    parts: what `{part}` stands for.
  """

  name: str
  path: str
  dimensions: tuple[tuple[int, ...], ...]
  counted: tuple[int, ...] = ()
  parts: tuple[str, ...] = ()


class Architecture(NamedTuple):
  """One model of Hugging Face's.

  Attributes:
    class_name: of its causal language model.
    fields: the field of config.Model that each field of its config.json sets.
    defaults: what transformers takes where one of them is absent, if that is not an error.
    required: what other fields of its config.json must be if they are there.
    implied: fields of config.Model that it leaves no choice about.
    router: name of its tensor within a layer.
    expert: likewise of an expert's tensors, `{part}` standing for one of `parts`.
    parts: gate, up and down.
  """

  class_name: str
  fields: Mapping[str, str]
  defaults: Mapping[str, object]
  required: Mapping[str, object]
  implied: Mapping[str, object]
  router: str
  expert: str
  parts: tuple[str, str, str]


_FIELDS = {
  "hidden_size": "d_model",
  "num_hidden_layers": "layers",
  "num_attention_heads": "heads",
  "num_key_value_heads": "kv_heads",
  "num_experts_per_tok": "experts_per_token",
  "vocab_size": "vocab",
  "rms_norm_eps": "norm_epsilon",
  "tie_word_embeddings": "tied_embeddings",
}
_DEFAULTS = {"tie_word_embeddings": False, "head_dim": None}
_REQUIRED = {"hidden_act": "silu", "attention_dropout": 0.0}
_MLP = "mlp.gate", "mlp.experts.{expert}.{part}_proj", ("gate", "up", "down")
# Each is what its modeling file in transformers 5.23 computes.
ARCHITECTURES: dict[str, Architecture] = {
  "mixtral": Architecture(
    "MixtralForCausalLM",
    {
      **_FIELDS,
      "num_local_experts": "experts",
      "intermediate_size": "expert_hidden",
      "head_dim": "head_dim",
    },
    _DEFAULTS,
    {**_REQUIRED, "sliding_window": None, "router_jitter_noise": 0.0},
    {"qk_norm": "none", "normalize_choices": True, "clip_qkv": None, "router_bias": False},
    "block_sparse_moe.gate",
    "block_sparse_moe.experts.{expert}.{part}",
    ("w1", "w3", "w2"),
  ),
  "qwen3_moe": Architecture(
    "Qwen3MoeForCausalLM",
    {
      **_FIELDS,
      "num_experts": "experts",
      "moe_intermediate_size": "expert_hidden",
      "head_dim": "head_dim",
      "norm_topk_prob": "normalize_choices",
    },
    {**_DEFAULTS, "norm_topk_prob": False},
    {
      **_REQUIRED,
      "attention_bias": False,
      "sliding_window": None,
      "use_sliding_window": False,
      "decoder_sparse_step": 1,
      "mlp_only_layers": [],
    },
    {"qk_norm": "head", "clip_qkv": None, "router_bias": False},
    *_MLP,
  ),
  "olmoe": Architecture(
    "OlmoeForCausalLM",
    {
      **_FIELDS,
      "num_experts": "experts",
      "intermediate_size": "expert_hidden",
      "norm_topk_prob": "normalize_choices",
      "clip_qkv": "clip_qkv",
    },
    {**_DEFAULTS, "norm_topk_prob": False, "clip_qkv": None, "num_key_value_heads": None},
    {**_REQUIRED, "attention_bias": False},
    {"qk_norm": "projection", "router_bias": False},
    *_MLP,
  ),
}


def weights(model: config.Model, kind: str) -> tuple[Weight, ...]:
  """Returns how files of an architecture keep each parameter of a model."""
  architecture = ARCHITECTURES[kind]
  *gate_up, down = architecture.parts
  of_layer = lambda name: f"model.layers.{{layer}}.{name}.weight"
  attention = lambda name: of_layer(f"self_attn.{name}")
  expert = of_layer(architecture.expert)
  norm = {"none": None, "head": ((1,),), "projection": ((1, 2),)}[model.qk_norm]
  found = [
    Weight("model.embed_tokens.weight", "shared/embedding/table", ((0,), (1,))),
    Weight(of_layer("input_layernorm"), "layers/attention_norm/scale", ((1,),), (0,)),
    Weight(attention("q_proj"), "layers/attention/query", ((2, 3), (1,)), (0,)),
    Weight(attention("k_proj"), "layers/attention/key", ((2, 3), (1,)), (0,)),
    Weight(attention("v_proj"), "layers/attention/value", ((2, 3), (1,)), (0,)),
    Weight(attention("o_proj"), "layers/attention/out", ((3,), (1, 2)), (0,)),
    Weight(of_layer("post_attention_layernorm"), "layers/expert_norm/scale", ((1,),), (0,)),
    Weight(of_layer(architecture.router), "layers/router/kernel", ((2,), (1,)), (0,)),
    Weight(expert, "layers/experts/gate_up", ((4,), (2,)), (0, 1, 3), tuple(gate_up)),
    Weight(expert, "layers/experts/down", ((3,), (2,)), (0, 1), (down,)),
    Weight("model.norm.weight", "shared/final_norm/scale", ((0,),)),
  ]
  if norm:
    found.append(Weight(attention("q_norm"), "layers/attention/query_norm/scale", norm, (0,)))
    found.append(Weight(attention("k_norm"), "layers/attention/key_norm/scale", norm, (0,)))
  if not model.tied_embeddings:
    found.append(Weight("lm_head.weight", "shared/head/kernel", ((1,), (0,))))
  return tuple(found)
