"""Somebody else's model: Hugging Face's MixtralForCausalLM on torch CPU, its weights as our tree.

It needs torch and transformers, which only tests install. It converts names and axes; of the
mathematics it must know nothing, or it would prove nothing. Shapes as in tests/reference.py.
"""

import numpy as np
import torch
import transformers

from moe_jax.config import Model

MARGIN = 1e-4  # of router logits, as Hugging Face computes them
MAX_SEEDS = 100


def build(model: Model, seed: int) -> transformers.MixtralForCausalLM:
  """Returns a float32 Mixtral of these sizes in which every weight, norm scales too, is random."""
  settings = transformers.MixtralConfig(
    num_hidden_layers=model.layers,
    hidden_size=model.d_model,
    num_attention_heads=model.heads,
    num_key_value_heads=model.kv_heads,
    head_dim=model.head_dim,
    num_local_experts=model.experts,
    num_experts_per_tok=model.experts_per_token,
    intermediate_size=model.expert_hidden,
    vocab_size=model.vocab,
    tie_word_embeddings=model.tied_embeddings,
    rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
    rms_norm_eps=model.norm_epsilon,
    router_jitter_noise=0.0,
    attention_dropout=0.0,
    # With a key-value cache it would not look for documents in the positions.
    use_cache=False,
    bos_token_id=None,
    eos_token_id=None,
  )
  mixtral = transformers.AutoModelForCausalLM.from_config(
    settings, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
  ).eval()
  random = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, weight in mixtral.named_parameters():
      if weight.ndim == 1:
        weight.uniform_(0.5, 1.5, generator=random)
      else:
        # The last axis is the input, but of the embedding, whose rows are looked up.
        is_table = name == "model.embed_tokens.weight" and not model.tied_embeddings
        weight.normal_(0.0, 1.0 if is_table else weight.shape[-1] ** -0.5, generator=random)
  return mixtral


def fixture(model: Model, batch: int, sequence: int, seed: int = 0):
  """Returns (mixtral, params, tokens) of the first seed from `seed` whose margin is above MARGIN.

  Args:
    model: the sizes.
    batch: sequences.
    sequence: tokens in each.
    seed: where to start.

  Returns:
    The torch model, its weights as the tree of tests/reference.py, and int32 [batch, sequence].

  Raises:
    ValueError: none of MAX_SEEDS seeds has such a margin; the case has too many tokens for it.
  """
  for candidate in range(seed, seed + MAX_SEEDS):
    mixtral = build(model, candidate)
    random = np.random.default_rng(candidate)
    tokens = random.integers(0, model.vocab, (batch, sequence), dtype=np.int32)
    if margin(mixtral, tokens) > MARGIN:
      return mixtral, parameters(mixtral, model), tokens
  raise ValueError(
    f"no seed from {seed} to {seed + MAX_SEEDS - 1} has a router margin above {MARGIN};"
    " choose a smaller batch, sequence or model.layers"
  )


def logits(mixtral, tokens, positions=None) -> np.ndarray:
  """Returns logits_BSV. Where `positions` restart, transformers starts a document by itself."""
  return _forward(mixtral, tokens, positions).logits.numpy()


def losses(mixtral, tokens) -> tuple[float, float]:
  """Returns (mean cross-entropy of the next tokens in nats, auxiliary loss without its weight).

  The auxiliary loss is K times the load balance of tests/reference.py, for one layer; of several
  layers transformers adds up the counts before it multiplies, which is another quantity.
  """
  found = _forward(mixtral, tokens, labels=torch.from_numpy(tokens).long())
  aux_loss = found.aux_loss.item()
  return found.loss.item() - mixtral.router_aux_loss_coef * aux_loss, aux_loss


def margin(mixtral, tokens, positions=None) -> float:
  """Returns the smallest gap between the K-th and next router logit over all tokens and layers."""
  K = mixtral.num_experts_per_tok
  if mixtral.num_experts == K:
    return float("inf")
  logit_LTE = torch.stack(_forward(mixtral, tokens, positions).router_logits)
  largest_LTK = logit_LTE.topk(K + 1, dim=-1).values
  return (largest_LTK[..., K - 1] - largest_LTK[..., K]).min().item()


def parameters(mixtral, model: Model) -> dict:
  """Returns the weights as the numpy tree of tests/reference.py, owning its memory.

  Raises:
    ValueError: the state has names that this conversion does not know, or lacks some; transformers
      renamed them.
  """
  N, G, H, F = model.heads, model.kv_heads, model.head_dim, model.expert_hidden
  state = {name: weight.detach().numpy().copy() for name, weight in mixtral.state_dict().items()}

  def take(name):
    if name not in state:
      raise ValueError(f"{name} is not in Mixtral's state; it has {sorted(state)}")
    return state.pop(name)

  def layers(name, convert=lambda weight: weight):
    return np.stack([convert(take(f"model.layers.{l}.{name}.weight")) for l in range(model.layers)])

  def experts(name):
    # torch keeps [E, out, in]
    stacked = [take(f"model.layers.{l}.mlp.experts.{name}") for l in range(model.layers)]
    return np.stack(stacked).swapaxes(-1, -2).copy()

  def heads_out(count):
    return lambda weight: weight.T.reshape(model.d_model, count, H)

  gate_up = experts("gate_up_proj")
  params = {
    "embedding": {"table": take("model.embed_tokens.weight")},
    "final_norm": {"scale": take("model.norm.weight")},
    "layers": {
      "attention_norm": {"scale": layers("input_layernorm")},
      "attention": {
        "query": layers("self_attn.q_proj", heads_out(N)),
        "key": layers("self_attn.k_proj", heads_out(G)),
        "value": layers("self_attn.v_proj", heads_out(G)),
        "out": layers("self_attn.o_proj", lambda weight: weight.T.reshape(N, H, model.d_model)),
      },
      "expert_norm": {"scale": layers("post_attention_layernorm")},
      "router": {"kernel": layers("mlp.gate", lambda weight: weight.T)},
      "experts": {
        "gate_up": gate_up.reshape(*gate_up.shape[:-1], 2, F),
        "down": experts("down_proj"),
      },
    },
  }
  head = take("lm_head.weight")
  if not model.tied_embeddings:
    params["head"] = {"kernel": head.T.copy()}
  if state:
    raise ValueError(f"Mixtral's state has weights that are not converted: {sorted(state)}")
  return params


@torch.no_grad()
def _forward(mixtral, tokens, positions=None, labels=None):
  return mixtral(
    torch.from_numpy(tokens).long(),
    position_ids=None if positions is None else torch.from_numpy(positions).long(),
    labels=labels,
    output_router_logits=True,
  )
