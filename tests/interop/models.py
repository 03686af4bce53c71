"""Somebody else's three models, built by transformers on torch CPU with every weight random.

It needs torch and transformers, which only tests install. Of our mathematics, names and files it
must know nothing.
"""

import numpy as np
import torch
import transformers

MARGIN = 1e-4  # of router logits, as transformers computes them
MAX_SEEDS = 100
_COMMON = {
  "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
  "num_experts_per_tok": 2, "vocab_size": 256, "use_cache": False, "bos_token_id": None,
  "eos_token_id": None, "pad_token_id": None, "attention_dropout": 0.0,
}  # fmt: skip
CONFIGS = {
  "mixtral": lambda: transformers.MixtralConfig(
    **_COMMON, num_local_experts=8, intermediate_size=24, tie_word_embeddings=True
  ),
  "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
    **_COMMON, num_experts=8, moe_intermediate_size=24, head_dim=12, norm_topk_prob=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
  ),
  "olmoe": lambda: transformers.OlmoeConfig(
    **_COMMON, num_experts=8, intermediate_size=24, clip_qkv=0.9, norm_topk_prob=False
  ),
}  # fmt: skip


def build(kind: str, seed: int) -> transformers.PreTrainedModel:
  """Returns a float32 model in which every weight, norm scales too, is random."""
  model = transformers.AutoModelForCausalLM.from_config(
    CONFIGS[kind](), attn_implementation="eager", experts_implementation="eager",
    dtype=torch.float32,
  ).eval()  # fmt: skip
  random = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if weight.ndim == 1:
        weight.uniform_(0.5, 1.5, generator=random)
      else:
        is_table = name == "model.embed_tokens.weight" and not model.config.tie_word_embeddings
        weight.normal_(0.0, 1.0 if is_table else weight.shape[-1] ** -0.5, generator=random)
  return model


def fixture(
  kind: str, batch: int, sequence: int
) -> tuple[transformers.PreTrainedModel, np.ndarray]:
  """Returns (model, int32 tokens [batch, sequence]) of the first seed whose margin is above MARGIN.

  Raises:
    ValueError: none of MAX_SEEDS seeds has such a margin; the case has too many tokens for it.
  """
  for seed in range(MAX_SEEDS):
    model = build(kind, seed)
    random = np.random.default_rng(seed)
    tokens = random.integers(0, model.config.vocab_size, (batch, sequence), dtype=np.int32)
    if margin(model, tokens) > MARGIN:
      return model, tokens
  raise ValueError(f"no seed up to {MAX_SEEDS} has a router margin above {MARGIN} for {kind}")


@torch.no_grad()
def logits(model, tokens) -> np.ndarray:
  """Returns logits_BSV of int32 tokens [B, S]."""
  return model(torch.from_numpy(tokens).long()).logits.numpy()


@torch.no_grad()
def margin(model, tokens) -> float:
  """Returns the smallest gap between the K-th and next router logit over all tokens and layers."""
  K = model.config.num_experts_per_tok
  found = model(torch.from_numpy(tokens).long(), output_router_logits=True).router_logits
  assert len(found) == model.config.num_hidden_layers
  largest_LTK = torch.stack(found).topk(K + 1, dim=-1).values
  return (largest_LTK[..., K - 1] - largest_LTK[..., K]).min().item()


@torch.no_grad()
def generate(model, prompt, num_tokens: int) -> list[int]:
  """Returns the `num_tokens` tokens of the greedy continuation."""
  found = model.generate(
    torch.from_numpy(prompt[None]).long(), max_new_tokens=num_tokens, do_sample=False,
    use_cache=True,
  )  # fmt: skip
  return found[0, len(prompt) :].tolist()


def load(folder) -> transformers.PreTrainedModel:
  """Returns the float32 model that transformers finds in a folder."""
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
  ).eval()
