"""The network: a Mixtral-shaped Mixture-of-Experts transformer as embed, layer and head functions.

The functions are per-device programs for inside the manual region; `loss_functions` and
`logits_functions` hand them to the pipeline. Between layers a device holds its sequences' positions
of its tensor rank, `x_bsD`. Knows the model; must not know schedules, optimizers or files.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.model import cross_entropy
from moe_jax.model.attention import Attention, attend
from moe_jax.model.layers import rms_norm
from moe_jax.moe.dispatch import READ_IN_STACK
from moe_jax.moe.experts import Stacked, Weights
from moe_jax.moe.layer import Experts, Report, Router, auxiliary_loss, moe
from moe_jax.moe.router import Statistics, joined
from moe_jax.parallel import collectives
from moe_jax.parallel.axes import STAGE, TENSOR
from moe_jax.parallel.mesh import axes_inside_host
from moe_jax.parallel.parameters import cast as cast_parameters
from moe_jax.parallel.parameters import parameter, scale
from moe_jax.parallel.parameters import specs as parameter_specs
from moe_jax.pipeline.functions import Functions, Halves
from moe_jax.pipeline.saving import residual


class Parameters(NamedTuple):
  """All parameters of the model.

  Attributes:
    layers: of `Layer`, leaves [L, ...]; the order along L is the pipeline's placement.
    shared: of `Shared`.
  """

  layers: nnx.State
  shared: nnx.State


class Inputs(NamedTuple):
  """What a micro-batch brings besides activations, this device's b sequences, whole.

  Attributes:
    tokens_bS, targets_bS, positions_bS, segments_bS: int32.
    weights_bS: weight of each target in the step's loss, float32; they sum to 1 over the whole
    step.
  """

  tokens_bS: jax.Array
  targets_bS: jax.Array
  positions_bS: jax.Array
  segments_bS: jax.Array
  weights_bS: jax.Array


class Norm(nnx.Module):
  """Parameters of a norm: scale [D]."""

  def __init__(self, model: config.Model):
    self.scale = scale((model.d_model,), ("model",))


class Layer(nnx.Module):
  """Parameters of one layer."""

  def __init__(self, model: config.Model, rngs: nnx.Rngs):
    self.attention_norm = Norm(model)
    self.attention = Attention(model, rngs)
    self.expert_norm = Norm(model)
    self.router = Router(model, rngs)
    self.experts = Experts(model, rngs)


class Embedding(nnx.Module):
  """Parameters of the embedding: table [V, D]."""

  def __init__(self, model: config.Model, rngs: nnx.Rngs):
    V, D = model.vocab, model.d_model
    # A tied table is the head's kernel too, which wants the smaller scale, and lies as that does.
    fan_in, vocab = (D, "vocab") if model.tied_embeddings else (1, "input_vocab")
    self.table = parameter(rngs, (V, D), (vocab, "model"), fan_in=fan_in)


class Head(nnx.Module):
  """Parameters of the head: kernel [D, V]."""

  def __init__(self, model: config.Model, rngs: nnx.Rngs):
    D, V = model.d_model, model.vocab
    self.kernel = parameter(rngs, (D, V), ("model", "vocab"), fan_in=D)


class Shared(nnx.Module):
  """Parameters outside the layers, on every stage: embedding, final norm, head (unless tied)."""

  def __init__(self, model: config.Model, rngs: nnx.Rngs):
    self.embedding = Embedding(model, rngs)
    self.final_norm = Norm(model)
    if not model.tied_embeddings:
      self.head = Head(model, rngs)

  @property
  def is_tied(self) -> bool:
    """Whether the embedding's table is the head's kernel too."""
    return not hasattr(self, "head")

  def head_kernel(self) -> jax.Array:
    """Returns the kernel of the head, [D, V] or this device's share of V."""
    return self.embedding.table[...].T if self.is_tied else self.head.kernel[...]


def is_of_head(shared: nnx.State) -> list[bool]:
  """Returns of each leaf of the parameters of `Shared` whether the head alone reads it."""
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(shared)]
  return [not path.startswith("['embedding']") for path in paths]


def embed(shared: Shared, tokens_bS: jax.Array) -> jax.Array:
  """Returns `x_bsD`, the embedding of this tensor rank's positions, the same on every stage.

  Every device looks up its share of the vocabulary: a tied table's is split over stages too.

  Communication: reduce-scatter over `tensor`, then of a tied table all-reduce over `stage`.
  """
  table_vD = shared.embedding.table[...]
  place_bS, is_mine_bS = _place(shared, tokens_bS)
  rows_bSD = table_vD[jnp.where(is_mine_bS, place_bS, 0)]
  x_bSD = jnp.where(is_mine_bS[..., None], rows_bSD, jnp.zeros((), table_vD.dtype))
  x_bsD = collectives.reduce_scatter(x_bSD, TENSOR, 1)
  return jax.lax.psum(x_bsD, STAGE) if shared.is_tied else x_bsD


def add_embed_gradient(
  sums: Shared, shared: Shared, tokens_bS: jax.Array, gx_bsD: jax.Array
) -> None:
  """Adds the embedding's gradient to a sum of gradients, from its cotangent on stage 0, in place:
  only the rows of the tokens are read and written.

  In float32 whatever the sum's dtype, for a row adds up token after token.

  Communication: of a tied table all-reduce over `stage` of `gx`; all-gather over `tensor`,
  (tensor - 1) * gx.size elements.
  """
  place_bS, is_mine_bS = _place(shared, tokens_bS)
  if shared.is_tied:
    gx_bsD = collectives.broadcast_from(gx_bsD, STAGE, 0)
  else:
    is_mine_bS &= jax.lax.axis_index(STAGE) == 0
  gx_bSD = collectives.gather(gx_bsD, TENSOR, 1).astype(jnp.float32)
  sum_vD = sums.embedding.table[...]
  nowhere = sum_vD.shape[0]
  place_bS = jnp.where(is_mine_bS, place_bS, nowhere)
  added_vD = sum_vD.astype(jnp.float32).at[place_bS].add(gx_bSD, mode="drop")
  sums.embedding.table[...] = added_vD.astype(sum_vD.dtype)


def _place(shared: Shared, tokens_bS: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns where tokens lie in this device's share of the table, and which of them do."""
  share = shared.embedding.table[...].shape[0]
  rank = jax.lax.axis_index((STAGE, TENSOR) if shared.is_tied else TENSOR)
  place_bS = tokens_bS - rank * share
  return place_bS, (place_bS >= 0) & (place_bS < share)


def run_layer(
  weights: Layer,
  model: config.Model,
  moe_config: config.Moe,
  x_bsD: jax.Array,
  inputs: Inputs,
  stacked: Stacked | None = None,
) -> tuple[jax.Array, Statistics, Report]:
  """Returns `y_bsD`, what the auxiliary losses ask of the layer, and the layer's report.

  Args:
    stacked: where the experts' weights lie in a stack, as `moe.layer.serve` takes it.

  Communication: attention's over `tensor`; the MoE layer's over `expert` and `tensor`.
  """
  with jax.named_scope("attention"):
    h_bsD = rms_norm(weights.attention_norm.scale[...], x_bsD, model.norm_epsilon)
    x_bsD += attend(weights.attention, model, h_bsD, inputs.positions_bS, inputs.segments_bS)
    x_bsD = residual(x_bsD)
  h_bsD = rms_norm(weights.expert_norm.scale[...], x_bsD, model.norm_epsilon)
  y_tD, statistics, report = moe(
    weights.router, weights.experts, moe_config, model.experts_per_token,
    h_bsD.reshape(-1, h_bsD.shape[-1]), model.normalize_choices, stacked,
  )  # fmt: skip
  return x_bsD + y_tD.reshape(x_bsD.shape), statistics, report


def head_logits(shared: Shared, model: config.Model, y_bsD: jax.Array) -> jax.Array:
  """Returns `logits_bSv`, float32: this device's share of the vocabulary, at every position.

  Communication: all-gather over `tensor`, (tensor - 1) * y.size elements.
  """
  return cross_entropy.logits(_head_input(shared, model, y_bsD), shared.head_kernel())


def head_loss(shared: Shared, model: config.Model, y_bsD: jax.Array, inputs: Inputs) -> jax.Array:
  """Returns this device's share of the weighted cross-entropy, a scalar, nats.

  Communication: all-gather of `y` over `tensor`; that of `cross_entropy`.
  """
  return cross_entropy.cross_entropy(
    _head_input(shared, model, y_bsD), shared.head_kernel(), inputs.targets_bS, inputs.weights_bS
  )


def _head_input(shared, model, y_bsD):
  """Returns `h_bSD`, normed, at every position."""
  h_bsD = rms_norm(shared.final_norm.scale[...], y_bsD, model.norm_epsilon)
  return collectives.gather(h_bsD, TENSOR, 1)


def init(key: jax.Array, model: config.Model) -> Parameters:
  """Returns float32 parameters, layers in logical order; each layer's depend on its number
  alone.
  """
  layer_keys = jax.random.split(key, model.layers + 1)
  layer = lambda key: nnx.state(Layer(model, nnx.Rngs(key)))
  return Parameters(
    layers=jax.vmap(layer)(layer_keys[1:]), shared=nnx.state(Shared(model, nnx.Rngs(layer_keys[0])))
  )


def specs(model: config.Model) -> Parameters:
  """Returns the PartitionSpec of every parameter."""
  parameters = jax.eval_shape(lambda: init(jax.random.key(0), model))
  return Parameters(
    layers=parameter_specs(parameters.layers, "layers"), shared=parameter_specs(parameters.shared)
  )


def cast(parameters: Parameters, dtype: jnp.dtype) -> Parameters:
  """Returns the parameters as the computation takes them."""
  return Parameters(*(cast_parameters(state, dtype) for state in parameters))


def loss_functions(settings: config.Config) -> Functions:
  """Returns the model for the pipeline; the head gives the loss and no outputs.

  The auxiliary loss is the mean over layers and micro-batches.
  """
  merge_shared = _merge_shared(settings.model)

  def head(shared, y_bsD, inputs):
    return head_loss(merge_shared(shared), settings.model, y_bsD, inputs), ()

  return _functions(settings, head)


def logits_functions(settings: config.Config) -> Functions:
  """Returns the model for the pipeline; the head gives no loss and this device's `logits_bSv`."""
  merge_shared = _merge_shared(settings.model)

  def head(shared, y_bsD, inputs):
    logits_bSv = head_logits(merge_shared(shared), settings.model, y_bsD)
    return collectives.varying(jnp.zeros((), jnp.float32)), logits_bSv

  return _functions(settings, head)


def _functions(settings: config.Config, head: Callable) -> Functions:
  model, micro_batches = settings.model, settings.pipeline.micro_batches
  definition = nnx.graphdef(nnx.eval_shape(lambda: Layer(model, nnx.Rngs(0))))
  merge_shared = _merge_shared(model)

  def embed_inputs(shared, inputs):
    return embed(merge_shared(shared), inputs.tokens_bS)

  def add_gradient(sums, shared, inputs, gx_bsD):
    into = merge_shared(sums)
    add_embed_gradient(into, merge_shared(shared), inputs.tokens_bS, gx_bsD)
    return nnx.state(into)

  def layer(weights, shared, x_bsD, inputs):
    inputs, stacked = inputs if isinstance(inputs, _WithStack) else (inputs, None)
    weights = nnx.merge(definition, weights)
    return run_layer(weights, model, settings.moe, x_bsD, inputs, stacked)

  # With two halves the stack would be split as inputs are.
  reads_stack = settings.moe.dispatch in READ_IN_STACK and not settings.pipeline.halves

  def auxiliary(statistics):
    loss, losses = auxiliary_loss(settings.moe, statistics)
    return loss / (model.layers * micro_batches), losses

  return Functions(
    embed_inputs, layer, auxiliary, head, add_gradient,
    halves=Halves(_split, _join, _merged) if settings.pipeline.halves else None,
    inside=axes_inside_host(settings),
    with_stack=_with_stack if reads_stack else None,
  )  # fmt: skip


class _WithStack(NamedTuple):
  """Inputs of a micro-batch, and the experts of a layer where they lie in the stage's."""

  inputs: Inputs
  experts: Stacked


def _with_stack(inputs, layers, number):
  return _WithStack(inputs, experts_in_stack(layers, number))


def experts_in_stack(layers: nnx.State, number: jax.Array | int) -> Stacked:
  """Returns the experts of a layer where they lie in the stage's: they are most of its weights."""
  experts = layers["experts"]
  return Stacked(Weights(experts["gate_up"][...], experts["down"][...]), number)


def _split(tree):
  """Returns two halves of the sequences, the first dimension of every leaf."""
  leaves, structure = jax.tree.flatten(tree)
  parts = [jnp.split(leaf, 2) for leaf in leaves]
  return tuple(jax.tree.unflatten(structure, half) for half in zip(*parts, strict=True))


def _join(one, other):
  """Returns the sequences of both halves."""
  return jnp.concatenate([one, other])


def _merged(one, other):
  """Returns the statistics and the report of both halves."""
  (statistics, report), (more_statistics, more_report) = one, other
  return joined(statistics, more_statistics), jax.tree.map(jnp.add, report, more_report)


def _merge_shared(model: config.Model) -> Callable[[nnx.State], Shared]:
  definition = nnx.graphdef(nnx.eval_shape(lambda: Shared(model, nnx.Rngs(0))))
  return lambda shared: nnx.merge(definition, shared)
