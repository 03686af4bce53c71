"""The oracle: Mixtral as slow and obvious jax.numpy on one device. No flax, no scan, no shard_map.

Everything is computed in the dtype of the parameters: float32, or float64 where a test asks how
far float32 itself is off. Of moe_jax it knows the configuration alone, and production code never
imports it. `_layer` and `_head` are jitted one by one, so that compiling does not grow with layers
or micro-batches: call `loss` and its gradient without `jax.jit` around them.

Shapes: B sequences, S positions, M key positions, T tokens = B*S, D model, N query heads, G KV
heads, H head width, F expert hidden, E experts, K experts per token, L layers, V vocabulary,
U micro-batches.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import Config, Model

MARGIN = 1e-4  # of router logits; float32 rounding moves them by some 1e-6
MAX_SEEDS = 100


def init_params(key, model: Model) -> dict:
  """Returns float32 parameters in which no two directions are alike: norm scales are random too."""
  D, N, G, H = model.d_model, model.heads, model.kv_heads, model.head_dim
  E, F, L, V = model.experts, model.expert_hidden, model.layers, model.vocab
  # numpy's generator, because jax would compile a program for each shape.
  random = np.random.default_rng(np.asarray(jax.random.key_data(key)))

  def normal(shape, std):
    return jnp.asarray(random.normal(0.0, std, shape), jnp.float32)

  def scale(shape):
    return jnp.asarray(random.uniform(0.5, 1.5, shape), jnp.float32)

  params = {
    # A tied table is also the head, whose logits should have a standard deviation near 1.
    "embedding": {"table": normal((V, D), D**-0.5 if model.tied_embeddings else 1.0)},
    "final_norm": {"scale": scale((D,))},
    "layers": {
      "attention_norm": {"scale": scale((L, D))},
      "attention": {
        "query": normal((L, D, N, H), D**-0.5),
        "key": normal((L, D, G, H), D**-0.5),
        "value": normal((L, D, G, H), D**-0.5),
        "out": normal((L, N, H, D), (N * H) ** -0.5),
      },
      "expert_norm": {"scale": scale((L, D))},
      "router": {"kernel": normal((L, D, E), 1.5 * D**-0.5)},
      "experts": {
        "gate_up": jnp.stack([normal((L, E, D, F), D**-0.5) for _ in range(2)], 3),
        "down": normal((L, E, F, D), F**-0.5),
      },
    },
  }
  if not model.tied_embeddings:
    params["head"] = {"kernel": normal((D, V), D**-0.5)}
  if model.router_bias:
    params["layers"]["router"]["bias"] = normal((L, E), 0.5)
  # Of queries and keys: one scale for each element of a head, or of all heads together.
  shapes = {"none": None, "head": ((L, H), (L, H)), "projection": ((L, N, H), (L, G, H))}
  if shapes[model.qk_norm]:
    query, key_ = shapes[model.qk_norm]
    norms = {"query_norm": {"scale": scale(query)}, "key_norm": {"scale": scale(key_)}}
    params["layers"]["attention"] |= norms
  return params


def random_batch(config: Config, seed: int) -> dict:
  """Returns the numpy batch of a step: packed documents, many targets without weight.

  Args:
    config: `train.batch`, `train.sequence` and `model.vocab` are read.
    seed: the same seed and sizes give the same batch.

  Returns:
    tokens, targets, positions, segments: int32 [B, S]; weights: float32 [B, S]. Positions restart
    and segments count up from 1 at each document. A document's last target has no weight; others
    lose theirs at a rate that differs between rows, and some weigh 1/2.
  """
  B, S, V = config.train.batch, config.train.sequence, config.model.vocab
  random = np.random.default_rng(seed)
  text = random.integers(0, V, (B, S + 1), dtype=np.int32)
  starts = random.random((B, S)) < min(0.5, 3 / S)
  starts[:, 0] = True
  starts[:: max(B - 1, 1), S // 2] = True  # at least two documents in the first row and in the last
  segments = np.cumsum(starts, axis=1, dtype=np.int32)
  at = np.arange(S, dtype=np.int32)[None, :]
  positions = at - np.maximum.accumulate(np.where(starts, at, 0), axis=1)
  is_last = np.concatenate([starts[:, 1:], np.ones((B, 1), bool)], axis=1)
  keep_rate = np.linspace(0.9, 0.4, B)[:, None]
  weights = random.choice([0.5, 1.0], (B, S), p=[0.2, 0.8])
  weights = np.where(is_last | (random.random((B, S)) > keep_rate), 0.0, weights)
  return {
    "tokens": text[:, :-1],
    "targets": text[:, 1:],
    "positions": positions.astype(np.int32),
    "segments": segments,
    "weights": weights.astype(np.float32),
  }


def fixture(config: Config, seed: int = 0) -> tuple[dict, dict]:
  """Returns the parameters and batch of the first seed from `seed` whose margin is above MARGIN.

  Raises:
    ValueError: none of MAX_SEEDS seeds has such a margin; the case has too many tokens for it.
  """
  best = 0.0
  for candidate in range(seed, seed + MAX_SEEDS):
    params = init_params(jax.random.key(candidate), config.model)
    batch = random_batch(config, candidate)
    found = margin(params, config.model, batch)
    if found > MARGIN:
      return params, batch
    best = max(best, found)
  raise ValueError(
    f"the best router margin of seeds {seed} to {seed + MAX_SEEDS - 1} is {best:.2g}, not above"
    f" {MARGIN}; choose a smaller train.batch, train.sequence or model.layers"
  )


def logits(params: dict, model: Model, tokens, positions, segments):
  """Returns logits_BSV of int32 [B, S] each; a token attends only within its own segment."""
  x_BSD, _ = _body(params, model, tokens, positions, segments)
  return _head(params, model, x_BSD)


def margin(params: dict, model: Model, batch: dict) -> float:
  """Returns the smallest gap between the K-th and next router logit; infinite where K = E.

  Above the rounding of two programs, both choose the same experts for every token of every layer.
  """
  _, statistics = _body(params, model, batch["tokens"], batch["positions"], batch["segments"])
  return min(float(each["margin"]) for each in statistics)


def loss(params: dict, config: Config, batch: dict):
  """Returns the loss of one step, and the parts that it is made of.

  Args:
    params: the tree of `init_params`.
    config: `model`, `moe`'s two weights and `pipeline.micro_batches` are read.
    batch: what `random_batch` returns; micro-batch u is its rows u*B/U to (u+1)*B/U.

  Returns:
    loss = cross_entropy + load_balance_weight * load_balance + router_z_weight * router_z, and a
    dict of those three and `counts`, int32 [L, E], the assignments over the whole step.
    Cross-entropy is the weighted mean over the whole batch, in nats; the other two are means over
    layers and micro-batches of statistics of one micro-batch in one layer.

  Raises:
    ValueError: the rows do not split into `pipeline.micro_batches`.

  Source: load balance: Switch Transformer (arXiv:2101.03961) equations 4-6, of T*K assignments;
    router z-loss: ST-MoE (arXiv:2202.08906) equation 5.
  """
  model, U = config.model, config.pipeline.micro_batches
  num_rows = batch["tokens"].shape[0]
  if num_rows % U:
    raise ValueError(f"{num_rows} rows do not split into pipeline.micro_batches={U}")
  total, load_balance, router_z = [], [], []
  counts_LE = 0
  for u in range(U):
    rows = slice(u * num_rows // U, (u + 1) * num_rows // U)
    micro = {name: jnp.asarray(array[rows]) for name, array in batch.items()}
    x_BSD, statistics = _body(params, model, micro["tokens"], micro["positions"], micro["segments"])
    log_p_BSV = jax.nn.log_softmax(_head(params, model, x_BSD), axis=-1)
    nll_BS = -jnp.take_along_axis(log_p_BSV, micro["targets"][:, :, None], axis=-1)[:, :, 0]
    total.append(jnp.sum(micro["weights"].astype(nll_BS.dtype) * nll_BS))
    load_balance += [each["load_balance"] for each in statistics]
    router_z += [each["router_z"] for each in statistics]
    counts_LE += jnp.stack([each["counts"] for each in statistics])
  weight = jnp.sum(jnp.asarray(batch["weights"]).astype(total[0].dtype))
  parts = {
    "cross_entropy": sum(total) / weight,
    "load_balance": sum(load_balance) / len(load_balance),
    "router_z": sum(router_z) / len(router_z),
    "counts": counts_LE,
  }
  return (
    parts["cross_entropy"]
    + config.moe.load_balance_weight * parts["load_balance"]
    + config.moe.router_z_weight * parts["router_z"]
  ), parts


def _body(params, model, tokens, positions, segments):
  """Returns x_BSD after the last layer, and each layer's router statistics."""
  tokens, positions, segments = map(jnp.asarray, (tokens, positions, segments))
  x_BSD = params["embedding"]["table"][tokens]
  statistics = []
  for l in range(model.layers):
    x_BSD, each = _layer(params["layers"], l, model, x_BSD, positions, segments)
    statistics.append(each)
  return x_BSD, statistics


@functools.partial(jax.jit, static_argnames="model")
def _layer(layers, l, model, x_BSD, positions_BS, segments_BS):
  params = jax.tree.map(lambda stacked: stacked[l], layers)
  normed_BSD = _rms_norm(x_BSD, params["attention_norm"]["scale"], model.norm_epsilon)
  x_BSD = x_BSD + _attention(params["attention"], model, normed_BSD, positions_BS, segments_BS)
  normed_BSD = _rms_norm(x_BSD, params["expert_norm"]["scale"], model.norm_epsilon)
  y_TD, statistics = _moe(params, model, normed_BSD.reshape(-1, model.d_model))
  return x_BSD + y_TD.reshape(x_BSD.shape), statistics


@functools.partial(jax.jit, static_argnames="model")
def _head(params, model, x_BSD):
  x_BSD = _rms_norm(x_BSD, params["final_norm"]["scale"], model.norm_epsilon)
  if model.tied_embeddings:
    return jnp.einsum("BSD,VD->BSV", x_BSD, params["embedding"]["table"])
  return jnp.einsum("BSD,DV->BSV", x_BSD, params["head"]["kernel"])


def _rms_norm(x_BSD, scale_D, epsilon):
  mean_square = jnp.mean(x_BSD * x_BSD, axis=-1, keepdims=True)
  return x_BSD / jnp.sqrt(mean_square + epsilon) * scale_D[None, None, :]


def _qk_norm(params, name, model, x_BSNH):
  """Root-mean-square norm of each head alone, or of all heads of a position together."""
  if model.qk_norm == "none":
    return x_BSNH
  axes = {"head": (3,), "projection": (2, 3)}[model.qk_norm]
  mean_square = jnp.mean(x_BSNH * x_BSNH, axis=axes, keepdims=True)
  scale = params[f"{name}_norm"]["scale"].reshape(1, 1, -1, model.head_dim)
  return x_BSNH / jnp.sqrt(mean_square + model.norm_epsilon) * scale


def _attention(params, model, x_BSD, positions_BS, segments_BS):
  query_BSNH = jnp.einsum("BSD,DNH->BSNH", x_BSD, params["query"])
  key_BMGH = jnp.einsum("BSD,DGH->BSGH", x_BSD, params["key"])
  value_BMGH = jnp.einsum("BSD,DGH->BSGH", x_BSD, params["value"])
  query_BSNH = _qk_norm(params, "query", model, query_BSNH)
  key_BMGH = _qk_norm(params, "key", model, key_BMGH)
  if model.clip_qkv > 0:
    clip = lambda x: jnp.minimum(jnp.maximum(x, -model.clip_qkv), model.clip_qkv)
    query_BSNH, key_BMGH, value_BMGH = clip(query_BSNH), clip(key_BMGH), clip(value_BMGH)
  query_BSNH = _rotate(query_BSNH, positions_BS, model)
  key_BMGH = _rotate(key_BMGH, positions_BS, model)
  # Query head n reads KV head n // (N/G).
  key_BMNH = jnp.repeat(key_BMGH, model.heads // model.kv_heads, axis=2)
  value_BMNH = jnp.repeat(value_BMGH, model.heads // model.kv_heads, axis=2)
  score_BNSM = jnp.einsum("BSNH,BMNH->BNSM", query_BSNH, key_BMNH) / model.head_dim**0.5
  at = jnp.arange(x_BSD.shape[1])
  allowed_BSM = (at[:, None] >= at[None, :])[None] & (
    segments_BS[:, :, None] == segments_BS[:, None, :]
  )
  score_BNSM = jnp.where(allowed_BSM[:, None], score_BNSM, -jnp.inf)
  out_BSNH = jnp.einsum("BNSM,BMNH->BSNH", jax.nn.softmax(score_BNSM, axis=-1), value_BMNH)
  return jnp.einsum("BSNH,NHD->BSD", out_BSNH, params["out"])


def _rotate(x_BSNH, positions_BS, model):
  """Rotary embedding; dimension i turns with i + H/2, as in Hugging Face's weights."""
  half = model.head_dim // 2
  frequency = model.rope_theta ** (-jnp.arange(half, dtype=x_BSNH.dtype) / half)
  angle = positions_BS.astype(x_BSNH.dtype)[:, :, None, None] * frequency[None, None, None, :]
  first, second = x_BSNH[..., :half], x_BSNH[..., half:]
  return jnp.concatenate(
    [
      first * jnp.cos(angle) - second * jnp.sin(angle),
      second * jnp.cos(angle) + first * jnp.sin(angle),
    ],
    axis=-1,
  )


def _moe(params, model, x_TD):
  """Returns y_TD, every token having reached all its K experts, and the router's statistics."""
  E, K = model.experts, model.experts_per_token
  logit_TE = jnp.einsum("TD,DE->TE", x_TD, params["router"]["kernel"])
  probability_TE = jax.nn.softmax(logit_TE, axis=-1)
  # Which experts serve a token goes by the biased logit, how much each counts by the probability.
  choice_TE = logit_TE + params["router"]["bias"][None] if model.router_bias else logit_TE
  _, expert_TK = jax.lax.top_k(choice_TE, K)
  weight_TK = jnp.take_along_axis(probability_TE, expert_TK, axis=1)
  if model.normalize_choices:
    weight_TK = weight_TK / jnp.sum(weight_TK, axis=-1, keepdims=True)
  y_TD = jnp.zeros_like(x_TD)
  counts = []
  for e in range(E):
    is_chosen_TK = expert_TK == e
    weight_T = jnp.sum(jnp.where(is_chosen_TK, weight_TK, 0.0), axis=-1)
    gate_DF, up_DF = params["experts"]["gate_up"][e].swapaxes(0, 1)
    hidden_TF = jax.nn.silu(x_TD @ gate_DF) * (x_TD @ up_DF)
    y_TD = y_TD + weight_T[:, None] * (hidden_TF @ params["experts"]["down"][e])
    counts.append(jnp.sum(is_chosen_TK, dtype=jnp.int32))
  counts_E = jnp.stack(counts)
  fraction_E = counts_E.astype(x_TD.dtype) / expert_TK.size
  largest_first_TE = jnp.flip(jnp.sort(choice_TE, axis=-1), axis=-1)
  return y_TD, {
    "load_balance": E * jnp.sum(fraction_E * jnp.mean(probability_TE, axis=0)),
    "router_z": jnp.mean(jax.nn.logsumexp(logit_TE, axis=-1) ** 2),
    "counts": counts_E,
    "margin": jnp.min(largest_first_TE[:, K - 1] - largest_first_TE[:, K])
    if K < E
    else jnp.array(jnp.inf, x_TD.dtype),
  }
